"""Comparisons: methods x learning rates x seeds over one base run, scored on tasks; resumable, one record per run.

The learning rate of a method is chosen on the validation split with the first seed; every seed then runs at the chosen rate, and the tables report
the test split, with the seeds' spread beside the differences between methods.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import operator
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.methods import count_params
from zflora_jax.checkpoint import FREE, BusyError, locked
from zflora_jax.config import AdapterConfig, EvalConfig, RunConfig, TrainConfig, from_file
from zflora_jax.data.dates import dated
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.evals import held_out_loss
from zflora_jax.fields import ConfigError, from_dict, require, to_dict
from zflora_jax.mesh import mesh_if_there
from zflora_jax.model import Model
from zflora_jax.plots import grouped_bars
from zflora_jax.report import atomic_write, environment, local_path, markdown_table, write_json
from zflora_jax.run import Trained, held_out, load_base, train
from zflora_jax.scorecard import SCORE_LEGEND, decoding, evaluate_tasks
from zflora_jax.trainer import NonFiniteError
from zflora_jax.trees import flatten

log = logging.getLogger(__name__)

Result = dict[str, Any]
_NO_NUMBERS = ("data/data_dir", *(key for key in FREE if key != "eval"))
BASE = "base"
_DIRTY = " (with local changes)"
_POLL = 5.0  # seconds between looks at a run that another process of the same comparison is training
_ORIGIN = ("commit", "dirty", "date", "device", "cpu_count", "jax")  # of environment(), kept with every run: a resumed comparison can change machines


@dataclass(frozen=True)
class Comparison:
    """What to run. name: of the result files. methods: label -> adapter. A seed sets both the adapters' initial values and the data order.

    pick_steps: the learning rate is chosen by runs of that many steps (with the schedule of their own length); None by whole runs.
    rates_from: a comparison whose choice of learning rates is taken over; its choosing runs are made where they are not there yet.
    tasks, scoring: what the chosen runs, and the base model, are scored on, and how; the score of a task is that of its clean rows.
    """

    name: str
    base: RunConfig
    methods: dict[str, AdapterConfig]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pick_steps: int | None = None
    rates_from: Comparison | None = None
    tasks: tuple[str, ...] = ()
    scoring: EvalConfig | None = None
    reading: str = ""  # what the tables show, in words, written by whoever has read them; stands under them

    def __post_init__(self) -> None:
        for field in ("methods", "learning_rates", "seeds"):
            require(len(getattr(self, field)) > 0, f"comparison.{field} is empty: give at least one.")
        require(BASE not in self.methods, f"comparison.methods: {BASE!r} is the untrained model's row; give the method another label.")
        require(bool(self.tasks) == (self.scoring is not None), "comparison.tasks and comparison.scoring go together: give both, or neither.")
        if (other := self.rates_from) is not None:
            same = all(other.methods.get(label) == adapter for label, adapter in self.methods.items())
            require(same and other.name != self.name, f"comparison.rates_from={other.name!r}: it must be another comparison, over the same methods.")
            for key in ("model", "train.dtype"):  # its choosing runs are made on the base that is loaded for this one
                own, its = (operator.attrgetter(key)(plan.base) for plan in (self, other))
                require(own == its, f"comparison.rates_from={other.name!r}: its {key} is {its!r}, and this one's {own!r}; give one for both.")
        steps, warmup, whole = self.pick_steps, self.base.optim.warmup_steps, self.base.train.steps
        require(
            steps is None or warmup < steps <= whole,
            f"comparison.pick_steps={steps}: must be above optim.warmup_steps={warmup} and at most train.steps={whole}. Change the config file.",
        )


def compare_methods(plan: Comparison, workdir: str | Path, out: str | Path, *, console: bool = True) -> Result:
    """Run `plan` under `workdir` and write <out>/<name>.json, .md and, with tasks, .png, after each method anew. Returns the JSON's contents.

    Each finished run leaves a record <out>/<name>/<run>.json with its config and commit, and is not run again while its record is there and its
    config the same.
    """
    workdir, out, env = local_path(workdir, "workdir"), local_path(out, "out"), environment()
    base_model = load_base(plan.base, mesh_if_there(plan.base.mesh))
    losses = {split: _loss(dated(plan.base), split, base_model)["loss"] for split in ("validation", "test")}
    rows: list[Result] = []
    runs: list[Result] = []

    def record(of: Comparison, run: RunConfig, label: str, seed: int, scored: bool) -> Result:
        steps = "" if run.train.steps == of.base.train.steps else f"-steps{run.train.steps}"
        name = f"{label}-lr{run.optim.learning_rate:g}{steps}-seed{seed}"
        folder = workdir if of is plan else workdir.parent / of.name
        tasks, tested = (plan.tasks if scored else ()), scored or not steps
        result = _run(plan, run, base_model, tasks, tested, folder / name, out / of.name / f"{name}.json", console)
        result = {"method": label, "learning_rate": run.optim.learning_rate, "steps": run.train.steps, "seed": seed} | result
        runs.extend([result] if of is plan else [])
        return result

    picker = plan.rates_from or plan

    if plan.tasks:
        rows.append({"method": BASE, "trainable": 0} | _scores([_base(plan, base_model, workdir / BASE, out / plan.name / f"{BASE}.json", console)]))
    for label, adapter in plan.methods.items():
        seed, pick_steps = picker.seeds[0], picker.pick_steps or picker.base.train.steps
        grid = [record(picker, _config(picker, adapter, rate, seed, pick_steps), label, seed, False) for rate in picker.learning_rates]
        finite = [r for r in grid if r["validation_loss"] is not None and math.isfinite(r["validation_loss"])]
        require(bool(finite), f"method {label!r} diverged at every learning rate of {picker.learning_rates}; give lower ones.")
        rate = min(finite, key=lambda r: r["validation_loss"])["learning_rate"]
        if remark := untuned(rate, picker.learning_rates):
            log.warning("%s: learning rate %g, %s", label, rate, remark)
        chosen = [record(plan, _config(plan, adapter, rate, seed, plan.base.train.steps), label, seed, True) for seed in plan.seeds]
        tests = [r["test_loss"] for r in chosen if r["test_loss"] is not None]
        rows.append(
            {
                "method": label,
                "trainable": count_params(base_model.config, adapter),
                "learning rate": rate,
                "untuned": untuned(rate, picker.learning_rates),
                **({f"validation, lr {r['learning_rate']:g}": r["validation_loss"] for r in grid} if picker is plan else {}),
                **({} if picker is plan and not plan.pick_steps else {f"validation, seed {r['seed']}": r["validation_loss"] for r in chosen}),
                **{f"test, seed {r['seed']}": r["test_loss"] for r in chosen},
                **({"test mean": statistics.mean(tests), "test spread": max(tests) - min(tests)} if len(tests) > 1 else {}),
                "seconds": statistics.mean(r["seconds"] for r in chosen if r["seconds"] is not None) if tests else None,
                **_scores(chosen),
            }
        )
        missing = [m for m in plan.methods if m not in {row["method"] for row in rows}]
        whole = {"name": plan.name, "base": losses, "rows": rows, "missing": missing, "runs": runs, "tasks": list(plan.tasks)}
        whole |= {"config": to_dict(plan.base), "environment": env}
        write_json(out / f"{plan.name}.json", whole)
        atomic_write(out / f"{plan.name}.md", _page(plan, whole).encode())
        if plan.tasks:
            shown = {row["method"]: row["scores"] for row in rows if row["scores"]}
            reach = {row["method"]: row["intervals"][row["headline"]] for row in rows if row["scores"]}
            grouped_bars(shown, out / plan.name, f"{plan.name}: {plan.base.model}", f"{rows[0]['headline']} (%), clean rows", reach)
    return whole


def untuned(rate: float, rates: Sequence[float]) -> str | None:
    """Why the best of `rates` may not be the method's best; None where it lies between two others.

    A rate that diverged counts as one that was tried: the best is then known to lie below it.
    """
    if len(set(rates)) == 1:
        return "the only one tried, so it is not tuned"
    if rate in (min(rates), max(rates)):
        edge, beyond = ("lowest", "lower") if rate == min(rates) else ("highest", "higher")
        return f"the {edge} one tried, so a {beyond} one may be better"
    return None


def overview(plans: Sequence[Comparison], out: str | Path) -> Path | None:
    """The pages of several comparisons, those that are there, as one: <out>/<the first word of their names>.md. None if none is there yet."""
    path = Path(out) / f"{plans[0].name.partition('_')[0]}.md"
    taken = [plan.name for plan in plans if f"{plan.name}.md" == path.name]
    require(not taken, f"comparison {taken}: its page would be the overview's, {path.name}; give it a name of two words, such as {taken}_first.")
    pages = [page.read_text(encoding="utf-8") for plan in plans if (page := Path(out) / f"{plan.name}.md").is_file()]
    if not pages:
        return None
    atomic_write(path, "\n".join(pages).encode())
    return path


def _config(plan: Comparison, adapter: AdapterConfig, rate: float, seed: int, steps: int) -> RunConfig:
    base = plan.base
    return dataclasses.replace(
        base,
        adapter=adapter.explicit(),  # so that no older run, of another start, is taken for this one
        optim=dataclasses.replace(base.optim, learning_rate=rate),
        train=dataclasses.replace(base.train, seed=seed, steps=steps),
        data=dataclasses.replace(base.data, seed=seed),
        eval=dataclasses.replace(base.eval, split="validation"),
    )


def _loss(run: RunConfig, split: str, model: Model, trained: Trained | None = None) -> dict[str, float]:
    _, encoded = held_out(run, model, split)
    extra: Any = {} if trained is None else {"adapter": run.adapter, "adapters": trained.adapters}
    return held_out_loss(model, encoded, run.data, batch_size=run.data.batch_size // run.data.accumulate, chunk=run.train.loss_chunk, **extra)


def _recorded(plan: Comparison, run: RunConfig, tasks: Sequence[str]) -> Result:
    """What decides the result of a run, as its record holds it."""
    return to_dict(run) | ({"tasks": list(tasks), "scoring": to_dict(plan.scoring)} if tasks else {})


def _saved(path: Path, config: Result) -> Result | None:
    """The result of a finished run of the same config, if its record is there; settings that are younger than the record count as their defaults.

    A record with scores also serves where none are asked for.
    """
    if not path.is_file():
        return None

    def trained(config: Result) -> RunConfig:
        run = from_file(RunConfig, {key: value for key, value in config.items() if key not in ("tasks", "scoring")})
        return dataclasses.replace(run, adapter=run.adapter.explicit())

    def scored(config: Result) -> tuple[list[str], EvalConfig]:
        return config.get("tasks", []), from_dict(EvalConfig, config.get("scoring", {}))

    def numbers(config: Result) -> Result:
        """The settings that decide the numbers: not where files lie, what is logged and kept, or which devices compute."""
        flat = flatten(to_dict(trained(config)))
        return {key: value for key, value in flat.items() if not key.startswith(_NO_NUMBERS)}

    saved = json.loads(path.read_text(encoding="utf-8"))
    try:
        same = numbers(saved["config"]) == numbers(config) and ("tasks" not in config or scored(saved["config"]) == scored(config))
    except ConfigError:  # a setting that is gone
        return None
    return saved["result"] if same else None


def _run(
    plan: Comparison, run: RunConfig, model: Model, tasks: Sequence[str], tested: bool, workdir: Path, path: Path, console: bool
) -> Result:  # tested: with the test loss, which a run that only chooses a learning rate does not need
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
        except NonFiniteError as error:  # a rate too high is a result, not the end of the comparison
            result = {"validation_loss": None, "test_loss": None, "seconds": None, "failed": str(error)}
            break
    write_json(path, {"config": config, "result": result})
    return result


def _result(plan: Comparison, run: RunConfig, trained: Trained, tasks: Sequence[str], tested: bool, workdir: Path, console: bool) -> Result:
    """What the record of a finished run says of it."""
    report, run = trained.report, dated(run, trained.date)  # prompts are scored as they were trained
    result = {
        "validation_loss": report["validation_loss"],
        "seconds": report["seconds"],
        "train_documents_cut": report["train_documents_cut"],
        "train_rows": report["train_rows"],
        "train_rows_dropped": report["train_rows_dropped"],
    } | {key: report["environment"][key] for key in _ORIGIN}
    if tested:
        test = _loss(run, "test", trained.model, trained)
        result |= {"test_loss": test["loss"], "test_rows": int(test["rows"]), "test_tokens": int(test["tokens"])}
    if tasks:
        result["scores"] = _score(plan, run, fuse(trained.model, run.adapter, trained.adapters), workdir / "eval", console)
    return result


def _base(plan: Comparison, model: Model, workdir: Path, path: Path, console: bool) -> Result:
    numerics = TrainConfig(dtype=plan.base.train.dtype, matmul_precision=plan.base.train.matmul_precision)
    settings = RunConfig(model=plan.base.model, data=plan.base.data, train=numerics)
    config = _recorded(plan, settings, plan.tasks)
    if (saved := _saved(path, config)) is None:
        saved = {"scores": _score(plan, plan.base, model, workdir, console)} | {key: environment()[key] for key in _ORIGIN}
        write_json(path, {"config": config, "result": saved})
    return saved


def _score(plan: Comparison, run: RunConfig, model: Model, out: Path, console: bool) -> Result:
    """Task -> its rows, clean rows and scores. Every example's record stays in `out`."""
    assert plan.scoring is not None
    scored = dataclasses.replace(run, eval=plan.scoring)
    summary = evaluate_tasks(scored, model, plan.tasks, out, "chosen", trained_on=[TrainedOn(run.data)], replace=True, console=console)
    kept = ("rows", "clean_rows", "questions", "contaminated", "answers_cut", "chance", "scores", "seconds")
    return {r["task"]: {key: r[key] for key in kept if key in r} for r in summary["tasks"]}


# --- tables -------------------------------------------------------------------------------------------------------


def _scores(chosen: Sequence[Result]) -> Result:
    """Task -> headline score in percent, mean over seeds, under "scores"; every score under "all scores"; spread of the tasks' mean over seeds."""
    runs = [r["scores"] for r in chosen if r.get("scores")]
    if not runs:
        return {"scores": {}, "all scores": {}, "intervals": {}}
    kinds = list(dict.fromkeys(kind for task in runs[0].values() for kind in task["scores"]["clean"]))
    require(bool(kinds), "nothing was scored: no task has a clean row, or scoring switches off all that the tasks have.")
    table = {
        kind: {
            task: 100 * statistics.mean(run[task]["scores"]["clean"][kind]["mean"] for run in runs)
            for task in runs[0]
            if kind in runs[0][task]["scores"]["clean"]
        }
        for kind in kinds
    }

    def bounds(task: str, kind: str) -> list[float]:
        return [100 * statistics.mean(run[task]["scores"]["clean"][kind][end] for run in runs) for end in ("low", "high")]

    intervals = {kind: {task: bounds(task, kind) for task in tasks} for kind, tasks in table.items()}
    head = kinds[kinds.index("accuracy") if "accuracy" in kinds else 0]
    means = [100 * statistics.mean(run[task]["scores"]["clean"][head]["mean"] for task in table[head]) for run in runs]
    rows = {task: runs[0][task]["clean_rows"] for task in runs[0]}
    return {
        "scores": table[head],
        "all scores": table,
        "intervals": intervals,
        "headline": head,
        "mean": statistics.mean(means),
        "spread": max(means) - min(means),
        "rows": rows,
        "cut": {task: statistics.mean(run[task]["answers_cut"] for run in runs) for task in runs[0] if "answers_cut" in runs[0][task]},
        "chance": {task: 100 * runs[0][task]["chance"] for task in runs[0] if "chance" in runs[0][task]},
    }


def _page(plan: Comparison, result: Result) -> str:
    run, env, first = plan.base, result["environment"], next((r for r in result["runs"] if "test_rows" in r), None)
    hidden = ("untuned", "scores", "all scores", "intervals", "headline", "mean", "spread", "rows", "cut", "chance")
    trained = [row for row in result["rows"] if row["method"] != BASE]
    shown = [
        {k: f"{v:.4f}" if k.startswith(("validation", "test")) and v is not None else v for k, v in row.items() if k not in hidden} for row in trained
    ]
    packed = "packed " if run.data.packing else ""
    picker = plan.rates_from or plan
    picked = f"by runs of {picker.pick_steps} steps" if picker.pick_steps else "by whole runs"
    where = f"the validation split of `{picker.base.data.task}` (as in {picker.name})" if picker is not plan else "validation"
    lines = [
        f"# {plan.name}",
        "",
        f"Mean cross-entropy (nats per target token) on held-out rows of `{run.data.task}`; {run.model}, {run.train.dtype}, "
        f"{run.train.steps} steps of {run.data.batch_size} {packed}row{'s' if run.data.batch_size > 1 else ''}, "
        f"prompt style {run.data.prompt_style}, loss on {'prompt and completion' if run.data.train_on_prompt else 'the completion only'}, "
        f"examples up to {run.data.lengths[-1]} tokens"
        + (f" ({first['train_rows']} train examples, {first['train_rows_dropped']} longer ones left out)." if first else "."),
        f"Untrained: validation {result['base']['validation']:.4f}, test {result['base']['test']:.4f}"
        + (f" ({first['test_rows']} rows, {first['test_tokens']} target tokens)." if first else "."),
        f"The learning rate is chosen on {where} with seed {picker.seeds[0]}, {picked}; test columns are at the chosen rate.",
        *[
            f"{row['method']}: the rate {row['learning rate']:g} is {row['untuned']}."
            for row in trained
            if row["untuned"]
        ],
        "",
        markdown_table(shown, list(dict.fromkeys(k for row in shown for k in row))),
        "",
    ]
    for kind in dict.fromkeys(kind for row in result["rows"] for kind in row["all scores"]):
        lines += [f"## {kind}, percent", "", _score_table(plan, result["rows"], kind), ""]
    if plan.scoring is not None:
        limit, clean_only = plan.scoring.limit, plan.scoring.clean_only
        if clean_only:
            rows = f"The first {limit} clean rows of each test set" if limit else "All clean rows of each test set"
        else:
            rows = f"Clean rows, out of {f'the first {limit}' if limit else 'all'} of each test set"
        lines += [f"{rows}, their number in brackets; {decoding(to_dict(plan.scoring))}. {SCORE_LEGEND}", ""]
        if (chance := result["rows"][0]["chance"]) and set(chance) == set(result["rows"][0]["rows"]):
            lines += [f"Chance: {', '.join(f'{task} {value:.1f}' for task, value in chance.items())}.", ""]
        cut = [
            f"{row['method']} {' '.join(f'{task} {count:g}' for task, count in row['cut'].items() if count)}"
            for row in result["rows"]
            if any(row.get("cut", {}).values())
        ]
        lines += [f"Answers that reached the limit of new tokens: {'; '.join(cut)}.", ""] if cut else []
        lines += [f"![{plan.name}]({plan.name}.png)", ""]
    lines += [plan.reading, ""] if plan.reading else []
    lines += [f"Not run yet: {', '.join(result['missing'])}.", ""] if result["missing"] else []
    # A run that chose the learning rate may be one that is chosen: it counts once.
    runs = {(run["method"], run["learning_rate"], run["steps"], run["seed"]): run for run in result["runs"]}
    known = [run for run in runs.values() if "commit" in run]
    made = Counter(f"commit {run['commit']}{_DIRTY * bool(run['dirty'])}, device {run['device']}, jax {run['jax']}" for run in known)
    lines += [f"Runs made at {'; '.join(f'{how} ({count})' for how, count in made.items())}.", ""] if made else []
    written = f"Page written by `{env['command']}`; commit {env['commit']}{_DIRTY * bool(env['dirty'])}"
    lines += [f"{written}; {env['date']}. Runs whose record is in {plan.name}/ are not made again; --out DIR elsewhere makes all of them.", ""]
    return "\n".join(lines)


def _score_table(plan: Comparison, rows: Sequence[Result], kind: str) -> str:
    counts = next(row["rows"] for row in rows if row["scores"])
    lines = []
    for row in rows:
        if values := row["all scores"].get(kind):
            spread = f" ± {row['spread']:.1f}" if len(plan.seeds) > 1 and row["method"] != BASE and values == row["scores"] else ""
            between = row["intervals"][kind]
            cells = {f"{task} ({counts[task]})": "{:.1f} [{:.1f}, {:.1f}]".format(value, *between[task]) for task, value in values.items()}
            lines.append(
                {"method": row["method"], "trainable": row["trainable"]} | cells | {"mean": f"{statistics.mean(values.values()):.1f}{spread}"}
            )
    return markdown_table(lines, list(dict.fromkeys(k for line in lines for k in line)))
