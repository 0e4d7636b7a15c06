"""Comparisons: methods x learning rates x seeds over one base run, scored on tasks; resumable, one
record per run.

The learning rate of a method is chosen on the validation split with the first seed; every seed then
runs at the chosen rate, and the tables report the test split, with the seeds' spread beside the
differences between methods.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.methods import count_params
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict, require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import EvalConfig, RunConfig, TrainConfig, from_file
from zflora_jax.core.trees import flatten
from zflora_jax.data.dates import dated
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.evaluation.evals import held_out_loss
from zflora_jax.evaluation.scorecard import evaluate_tasks
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.compare_page import comparison_page, score_fields
from zflora_jax.experiments.comparison import BASE, Comparison, Result, untuned
from zflora_jax.experiments.setup import held_out
from zflora_jax.experiments.train import Trained, train
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.reporting.files import atomic_write, local_path, write_json
from zflora_jax.reporting.plots import grouped_bars
from zflora_jax.reporting.provenance import environment
from zflora_jax.training.trainer import NonFiniteError
from zflora_jax.training.workdir import FREE, BusyError, locked

log = logging.getLogger(__name__)

_NO_NUMBERS = ("data/data_dir", *(key for key in FREE if key != "eval"))
_POLL = (
    5.0  # seconds between looks at a run that another process of the same comparison is training
)
# Of environment(), kept with every run: a resumed comparison can change machines.
_ORIGIN = (
    "commit",
    "dirty",
    "date",
    "device",
    "cpu_count",
    "jax",
)


def compare_methods(
    plan: Comparison, workdir: str | Path, out: str | Path, *, console: bool = True
) -> Result:
    """Run `plan` under `workdir` and write <out>/<name>.json, .md and, with tasks, .png, after each
    method anew. Returns the JSON's contents.

    Each finished run leaves a record <out>/<name>/<run>.json with its config and commit, and is not
    run again while its record is there and its config the same.
    """
    workdir, out, env = local_path(workdir, "workdir"), local_path(out, "out"), environment()
    base_model = load_base(plan.base, mesh_if_there(plan.base.mesh))
    losses = {
        split: _loss(dated(plan.base), split, base_model)["loss"]
        for split in ("validation", "test")
    }
    rows: list[Result] = []
    runs: list[Result] = []

    def record(of: Comparison, run: RunConfig, label: str, seed: int, scored: bool) -> Result:
        steps = "" if run.train.steps == of.base.train.steps else f"-steps{run.train.steps}"
        name = f"{label}-lr{run.optim.learning_rate:g}{steps}-seed{seed}"
        folder = workdir if of is plan else workdir.parent / of.name
        tasks, tested = (plan.tasks if scored else ()), scored or not steps
        result = _run(
            plan,
            run,
            base_model,
            tasks,
            tested,
            folder / name,
            out / of.name / f"{name}.json",
            console,
        )
        result = {
            "method": label,
            "learning_rate": run.optim.learning_rate,
            "steps": run.train.steps,
            "seed": seed,
        } | result
        runs.extend([result] if of is plan else [])
        return result

    picker = plan.rates_from or plan

    if plan.tasks:
        untrained = _base(
            plan, base_model, workdir / BASE, out / plan.name / f"{BASE}.json", console
        )
        rows.append({"method": BASE, "trainable": 0} | score_fields([untrained]))
    for label, adapter in plan.methods.items():
        seed, pick_steps = picker.seeds[0], picker.pick_steps or picker.base.train.steps
        grid = [
            record(picker, _config(picker, adapter, rate, seed, pick_steps), label, seed, False)
            for rate in picker.learning_rates
        ]
        finite = [
            r
            for r in grid
            if r["validation_loss"] is not None and math.isfinite(r["validation_loss"])
        ]
        require(
            bool(finite),
            f"method {label!r} diverged at every learning rate of {picker.learning_rates}; give"
            " lower ones.",
        )
        rate = min(finite, key=lambda r: r["validation_loss"])["learning_rate"]
        if remark := untuned(rate, picker.learning_rates):
            log.warning("%s: learning rate %g, %s", label, rate, remark)
        chosen = [
            record(
                plan, _config(plan, adapter, rate, seed, plan.base.train.steps), label, seed, True
            )
            for seed in plan.seeds
        ]
        tests = [r["test_loss"] for r in chosen if r["test_loss"] is not None]
        rows.append(
            {
                "method": label,
                "trainable": count_params(base_model.config, adapter),
                "learning rate": rate,
                "untuned": untuned(rate, picker.learning_rates),
                **(
                    {f"validation, lr {r['learning_rate']:g}": r["validation_loss"] for r in grid}
                    if picker is plan
                    else {}
                ),
                **(
                    {}
                    if picker is plan and not plan.pick_steps
                    else {f"validation, seed {r['seed']}": r["validation_loss"] for r in chosen}
                ),
                **{f"test, seed {r['seed']}": r["test_loss"] for r in chosen},
                **(
                    {"test mean": statistics.mean(tests), "test spread": max(tests) - min(tests)}
                    if len(tests) > 1
                    else {}
                ),
                "seconds": (
                    statistics.mean(r["seconds"] for r in chosen if r["seconds"] is not None)
                    if tests
                    else None
                ),
                **score_fields(chosen),
            }
        )
        missing = [m for m in plan.methods if m not in {row["method"] for row in rows}]
        whole = {
            "name": plan.name,
            "base": losses,
            "rows": rows,
            "missing": missing,
            "runs": runs,
            "tasks": list(plan.tasks),
        }
        whole |= {"config": to_dict(plan.base), "environment": env}
        write_json(out / f"{plan.name}.json", whole)
        atomic_write(out / f"{plan.name}.md", comparison_page(plan, whole).encode())
        if plan.tasks:
            shown = {row["method"]: row["scores"] for row in rows if row["scores"]}
            reach = {
                row["method"]: row["intervals"][row["headline"]] for row in rows if row["scores"]
            }
            grouped_bars(
                shown,
                out / plan.name,
                f"{plan.name}: {plan.base.model}",
                f"{rows[0]['headline']} (%), clean rows",
                reach,
            )
    return whole


def overview(plans: Sequence[Comparison], out: str | Path) -> Path | None:
    """The pages of several comparisons, those that are there, as one: <out>/<the first word of
    their names>.md. None if none is there yet.
    """
    path = Path(out) / f"{plans[0].name.partition('_')[0]}.md"
    taken = [plan.name for plan in plans if f"{plan.name}.md" == path.name]
    require(
        not taken,
        f"comparison {taken}: its page would be the overview's, {path.name}; give it a name of two"
        f" words, such as {taken}_first.",
    )
    pages = [
        page.read_text(encoding="utf-8")
        for plan in plans
        if (page := Path(out) / f"{plan.name}.md").is_file()
    ]
    if not pages:
        return None
    atomic_write(path, "\n".join(pages).encode())
    return path


def _config(
    plan: Comparison, adapter: AdapterConfig, rate: float, seed: int, steps: int
) -> RunConfig:
    base = plan.base
    return dataclasses.replace(
        base,
        adapter=adapter.explicit(),  # so that no older run, of another start, is taken for this one
        optim=dataclasses.replace(base.optim, learning_rate=rate),
        train=dataclasses.replace(base.train, seed=seed, steps=steps),
        data=dataclasses.replace(base.data, seed=seed),
        eval=dataclasses.replace(base.eval, split="validation"),
    )


def _loss(
    run: RunConfig, split: str, model: Model, trained: Trained | None = None
) -> dict[str, float]:
    _, encoded = held_out(run, model, split)
    extra: Any = {} if trained is None else {"adapter": run.adapter, "adapters": trained.adapters}
    return held_out_loss(
        model,
        encoded,
        run.data,
        batch_size=run.data.batch_size // run.data.grad_accum_steps,
        chunk=run.train.loss_chunk,
        **extra,
    )


def _recorded(plan: Comparison, run: RunConfig, tasks: Sequence[str]) -> Result:
    """What decides the result of a run, as its record holds it."""
    return to_dict(run) | (
        {"tasks": list(tasks), "scoring": to_dict(plan.scoring)} if tasks else {}
    )


def _saved(path: Path, config: Result) -> Result | None:
    """The result of a finished run of the same config, if its record is there; settings that are
    younger than the record count as their defaults.

    A record with scores also serves where none are asked for.
    """
    if not path.is_file():
        return None

    def trained(config: Result) -> RunConfig:
        run = from_file(
            RunConfig,
            {key: value for key, value in config.items() if key not in ("tasks", "scoring")},
        )
        return dataclasses.replace(run, adapter=run.adapter.explicit())

    def scored(config: Result) -> tuple[list[str], EvalConfig]:
        return config.get("tasks", []), from_dict(EvalConfig, config.get("scoring", {}))

    def numbers(config: Result) -> Result:
        """The settings that decide the numbers: not where files lie, what is logged and kept, or
        which devices compute.
        """
        flat = flatten(to_dict(trained(config)))
        return {key: value for key, value in flat.items() if not key.startswith(_NO_NUMBERS)}

    saved = json.loads(path.read_text(encoding="utf-8"))
    try:
        same = numbers(saved["config"]) == numbers(config) and (
            "tasks" not in config or scored(saved["config"]) == scored(config)
        )
    except ConfigError:  # a setting that is gone
        return None
    return saved["result"] if same else None


def _run(
    plan: Comparison,
    run: RunConfig,
    model: Model,
    tasks: Sequence[str],
    tested: bool,
    workdir: Path,
    path: Path,
    console: bool,
) -> (
    Result
):  # tested: with the test loss, which a run that only chooses a learning rate does not need
    config = _recorded(plan, run, tasks)
    while True:
        if (saved := _saved(path, config)) is not None:
            log.info("%s is there, made at commit %s: not run again", path, saved.get("commit"))
            return saved
        try:
            if workdir.is_dir():  # busy is said before anything slow
                with locked(workdir):
                    pass
            trained = train(run, workdir, model=model, console=console)
            result = _result(plan, run, trained, tasks, tested, workdir, console)
            break
        except BusyError:
            time.sleep(_POLL)
        except (
            NonFiniteError
        ) as error:  # a rate too high is a result, not the end of the comparison
            result = {
                "validation_loss": None,
                "test_loss": None,
                "seconds": None,
                "failed": str(error),
            }
            break
    write_json(path, {"config": config, "result": result})
    return result


def _result(
    plan: Comparison,
    run: RunConfig,
    trained: Trained,
    tasks: Sequence[str],
    tested: bool,
    workdir: Path,
    console: bool,
) -> Result:
    """What the record of a finished run says of it."""
    # Prompts are scored as they were trained.
    report, run = (
        trained.report,
        dated(run, trained.date),
    )
    result = {
        "validation_loss": report["validation_loss"],
        "seconds": report["seconds"],
        "train_documents_cut": report["train_documents_cut"],
        "train_rows": report["train_rows"],
        "train_rows_dropped": report["train_rows_dropped"],
    } | {key: report["environment"][key] for key in _ORIGIN}
    if tested:
        test = _loss(run, "test", trained.model, trained)
        result |= {
            "test_loss": test["loss"],
            "test_rows": int(test["rows"]),
            "test_tokens": int(test["tokens"]),
        }
    if tasks:
        result["scores"] = _score(
            plan, run, fuse(trained.model, run.adapter, trained.adapters), workdir / "eval", console
        )
    return result


def _base(plan: Comparison, model: Model, workdir: Path, path: Path, console: bool) -> Result:
    numerics = TrainConfig(
        dtype=plan.base.train.dtype, matmul_precision=plan.base.train.matmul_precision
    )
    settings = RunConfig(model=plan.base.model, data=plan.base.data, train=numerics)
    config = _recorded(plan, settings, plan.tasks)
    if (saved := _saved(path, config)) is None:
        saved = {"scores": _score(plan, plan.base, model, workdir, console)} | {
            key: environment()[key] for key in _ORIGIN
        }
        write_json(path, {"config": config, "result": saved})
    return saved


def _score(plan: Comparison, run: RunConfig, model: Model, out: Path, console: bool) -> Result:
    """Task -> its rows, clean rows and scores. Every example's record stays in `out`."""
    assert plan.scoring is not None
    scored = dataclasses.replace(run, eval=plan.scoring)
    summary = evaluate_tasks(
        scored,
        model,
        plan.tasks,
        out,
        "chosen",
        trained_on=[TrainedOn(run.data)],
        replace=True,
        console=console,
    )
    kept = (
        "rows",
        "clean_rows",
        "questions",
        "contaminated",
        "answers_cut",
        "chance",
        "scores",
        "seconds",
    )
    return {r["task"]: {key: r[key] for key in kept if key in r} for r in summary["tasks"]}
