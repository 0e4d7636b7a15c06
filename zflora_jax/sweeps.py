"""Sweeps: methods x learning rates x seeds over one base run; resumable, one record per run.

The learning rate of a method is chosen on the validation split with the first seed; the other seeds then run at the chosen rate, and the table
reports the test
split over all seeds, with the seeds' spread beside the differences between methods.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zflora_jax.adapters.methods import count_params
from zflora_jax.config import AdapterConfig, RunConfig
from zflora_jax.evals import held_out_loss
from zflora_jax.fields import require, to_dict
from zflora_jax.report import atomic_write, environment, markdown_table, write_json
from zflora_jax.run import Trained, held_out, load_base, train
from zflora_jax.trainer import NonFiniteError


@dataclass(frozen=True)
class Sweep:
    """What to run. name: of the result files. methods: label -> adapter. A seed sets both the adapters' initial values and the data order."""

    name: str
    base: RunConfig
    methods: dict[str, AdapterConfig]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("methods", "learning_rates", "seeds"):
            require(len(getattr(self, field)) > 0, f"sweep.{field} is empty: give at least one.")


def sweep(plan: Sweep, workdir: str | Path, out: str | Path, *, console: bool = True) -> dict[str, Any]:
    """Run `plan` under `workdir` and write <out>/<name>.json and <out>/<name>.md, after each method anew. Returns the JSON's contents.

    Each finished run leaves a record <out>/<name>/<run>.json with its config and commit, and is not run again while its record is there and its
    config the same.
    """
    workdir, rows, runs, env = Path(workdir), [], [], environment()
    base_model = load_base(plan.base)
    base = {split: _loss(plan.base, split, base_model)["loss"] for split in ("validation", "test")}
    for label, adapter in plan.methods.items():

        def one(rate: float, seed: int, label: str = label, adapter: AdapterConfig = adapter) -> dict[str, Any]:
            run_name = f"{label}-lr{rate:g}-seed{seed}"
            result = _run(plan.base, adapter, rate, seed, workdir / run_name, Path(out) / plan.name / f"{run_name}.json", console)
            runs.append({"method": label, "learning_rate": rate, "seed": seed} | result)
            return runs[-1]

        grid = [one(rate, plan.seeds[0]) for rate in plan.learning_rates]
        finite = [r for r in grid if r["validation_loss"] is not None]
        require(bool(finite), f"method {label!r} diverged at every learning rate of {plan.learning_rates}; give lower ones.")
        best = min(finite, key=lambda r: r["validation_loss"])
        chosen = [best] + [one(best["learning_rate"], seed) for seed in plan.seeds[1:]]
        tests = [r["test_loss"] for r in chosen if r["test_loss"] is not None]
        rows.append(
            {
                "method": label,
                "trainable": count_params(base_model.config, adapter),
                "learning rate": best["learning_rate"],
                **{f"validation, lr {r['learning_rate']:g}": r["validation_loss"] for r in grid},
                **{f"test, seed {r['seed']}": r["test_loss"] for r in chosen},
                "test mean": statistics.mean(tests),
                "test spread": max(tests) - min(tests),
                "seconds": statistics.mean(r["seconds"] for r in chosen if r["seconds"] is not None),
            }
        )
        missing = [m for m in plan.methods if m not in {row["method"] for row in rows}]
        result = {"name": plan.name, "base": base, "rows": rows, "missing": missing, "runs": runs, "config": to_dict(plan.base), "environment": env}
        write_json(Path(out) / f"{plan.name}.json", result)
        atomic_write(Path(out) / f"{plan.name}.md", _page(plan, result).encode())
    return result


def _loss(run: RunConfig, split: str, model: Any, trained: Trained | None = None) -> dict[str, float]:
    _, encoded = held_out(run, model, split)
    extra = {} if trained is None else {"adapter": run.adapter, "adapters": trained.adapters}
    return held_out_loss(model, encoded, run.data, batch_size=run.data.batch_size // run.data.accumulate, chunk=run.train.loss_chunk, **extra)  # type: ignore[arg-type]


def _run(base: RunConfig, adapter: AdapterConfig, rate: float, seed: int, workdir: Path, record: Path, console: bool) -> dict[str, Any]:
    run = dataclasses.replace(
        base,
        adapter=adapter,
        optim=dataclasses.replace(base.optim, learning_rate=rate),
        train=dataclasses.replace(base.train, seed=seed),
        data=dataclasses.replace(base.data, seed=seed),
        eval=dataclasses.replace(base.eval, split="validation"),
    )
    if record.is_file() and (saved := json.loads(record.read_text()))["config"] == json.loads(json.dumps(to_dict(run))):
        return saved["result"]
    try:
        trained = train(run, workdir, console=console)
    except NonFiniteError as error:  # a rate too high is a result, not the end of the sweep
        failed = {"validation_loss": None, "test_loss": None, "seconds": None, "failed": str(error)}
        write_json(record, {"config": to_dict(run), "result": failed})
        return failed
    test = _loss(run, "test", trained.model, trained)
    result = {
        "validation_loss": trained.report["validation_loss"],
        "test_loss": test["loss"],
        "test_rows": int(test["rows"]),
        "test_tokens": int(test["tokens"]),
    }
    result |= {
        "seconds": trained.report["seconds"],
        "commit": trained.report["environment"]["commit"],
        "train_rows": trained.report["train_rows"],
        "train_rows_dropped": trained.report["train_rows_dropped"],
    }
    write_json(record, {"config": to_dict(run), "result": result})
    return result


def _page(plan: Sweep, result: dict[str, Any]) -> str:
    run, env, first = plan.base, result["environment"], result["runs"][0]
    shown = [{k: f"{v:.4f}" if k.startswith(("validation", "test")) and v is not None else v for k, v in row.items()} for row in result["rows"]]
    return "\n".join(
        [
            f"# {plan.name}",
            "",
            f"Mean cross-entropy (nats per target token) on held-out rows of `{run.data.task}`; {run.model}, {run.train.dtype}, "
            f"{run.train.steps} steps of {run.data.batch_size} rows, "
            f"prompt style {run.data.prompt_style}, loss on {'prompt and completion' if run.data.train_on_prompt else 'the completion only'}, "
            f"rows up to {run.data.lengths[-1]} tokens ({first['train_rows']} train rows, {first['train_rows_dropped']} longer ones left out).",
            f"Untrained: validation {result['base']['validation']:.4f}, test {result['base']['test']:.4f} ({first['test_rows']} rows, "
            f"{first['test_tokens']} target tokens).",
            f"The learning rate is chosen on validation with seed {plan.seeds[0]}; test columns are at the chosen rate.",
            "",
            markdown_table(shown, list(dict.fromkeys(k for row in shown for k in row))),
            "",
            *([f"Not run yet: {', '.join(result['missing'])}.", ""] if result["missing"] else []),
            f"Command: `{env['command']}`; commit {env['commit']}{' (with local changes)' if env['dirty'] else ''}; device {env['device']}; "
            f"jax {env['jax']}; {env['date']}.",
            "",
        ]
    )
