"""Comparisons: methods at their best learning rates, over several seeds, scored on tasks.

The learning rate of a method is chosen on the validation split with the first seed; every seed then
runs at the chosen rate, and the tables report the test split, with the seeds' spread beside the
differences between methods.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zflora_jax.adapters.counts import count_params
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig, TrainConfig
from zflora_jax.data.dates import dated
from zflora_jax.evaluation.statistics import SuiteScore, suite_score
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.comparison import BASE, Comparison
from zflora_jax.experiments.jobs import run_jobs, score, split_loss
from zflora_jax.experiments.page import comparison_page, write_page
from zflora_jax.experiments.rates import RateChoice, choose_rate
from zflora_jax.experiments.store import ORIGIN, Job, Result, read_result, write_record
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.reporting.files import atomic_write, local_path
from zflora_jax.reporting.plots import grouped_bars
from zflora_jax.reporting.provenance import environment
from zflora_jax.reporting.tables import markdown_table


@dataclass(frozen=True)
class MethodRuns:
    """What the runs of one method came to.

    Attributes:
      label: of the method.
      trainable: number of parameters.
      choice: of its learning rate.
      tried, chosen: its runs that chose the rate, and those at the chosen rate: entries of the
        result's "runs".
      score: on the tasks, where they were scored.
    """

    label: str
    trainable: int
    choice: RateChoice
    tried: list[Result]
    chosen: list[Result]
    score: SuiteScore | None

    def row(self, plan: Comparison) -> Result:
        """As the comparison's JSON holds it."""
        own_choice = plan.picker is plan
        losses = {r["seed"]: r.get("test_loss") for r in self.chosen}
        tests = [loss for loss in losses.values() if loss is not None]
        seconds = [r["seconds"] for r in self.chosen if r.get("seconds") is not None]
        row: Result = {
            "method": self.label,
            "trainable": self.trainable,
            "learning rate": self.choice.rate,
            "untuned": self.choice.untuned,
        }
        if own_choice:
            row |= {f"validation, lr {rate:g}": loss for rate, loss in self.choice.losses.items()}
        if plan.pick_steps or not own_choice:
            row |= {f"validation, seed {r['seed']}": r.get("validation_loss") for r in self.chosen}
        row |= {f"test, seed {seed}": loss for seed, loss in losses.items()}
        if len(tests) > 1:
            row |= {"test mean": statistics.mean(tests), "test spread": max(tests) - min(tests)}
        row["seconds"] = statistics.mean(seconds) if tests else None
        return row | score_fields(self.score)


def score_fields(score: SuiteScore | None) -> Result:
    return score.fields() if score else {"scores": {}, "all scores": {}, "intervals": {}}


def compare_methods(
    plan: Comparison, workdir: str | Path, out: str | Path, *, console: bool = True
) -> Result:
    """Run a comparison and write its tables after each method, <out>/<name>.json and .md, and with
    tasks a picture at the end, .png and .svg.

    Each finished run leaves a record <out>/<name>/<run>.json with its settings and commit, and is
    not run again while its record is there and its settings the same. Several processes may run the
    same comparison; they share its runs.

    Args:
      plan: what to run.
      workdir: of the runs.
      out: of the records and pages.
      console: whether runs show their progress.

    Returns:
      the JSON's contents: name, base (its losses), rows (one per method), missing, runs, tasks,
      config, environment.

    Raises:
      ConfigError: a method diverged at every rate, or nothing could be scored.
    """
    workdir, out, env = local_path(workdir, "workdir"), local_path(out, "out"), environment()
    with compile_cache(workdir / "compile_cache"):
        model = load_base(plan.base, mesh_if_there(plan.base.mesh))
        found: Result = {
            "name": plan.name,
            "base": {
                split: split_loss(dated(plan.base), split, model)["loss"]
                for split in ("validation", "test")
            },
            "rows": [],
            "missing": list(plan.methods),
            "runs": [],
            "tasks": list(plan.tasks),
            "config": to_dict(plan.base),
            "environment": env,
        }
        scores: dict[str, SuiteScore] = {}
        if plan.tasks:
            scores[BASE] = suite_score([_untrained(plan, model, workdir, out, console)])
            found["rows"].append({"method": BASE, "trainable": 0} | scores[BASE].fields())
        try:
            for label in plan.methods:
                method = _runs_of(plan, label, model, workdir, out, console)
                found["rows"].append(method.row(plan))
                found["missing"].remove(label)
                found["runs"] += [*(method.tried if plan.picker is plan else []), *method.chosen]
                if method.score:
                    scores[label] = method.score
                write_page(out / f"{plan.name}.md", comparison_page(plan, found, scores), found)
        finally:
            _draw(plan, scores, out)
    return found


def _runs_of(
    plan: Comparison, label: str, model: Model, workdir: Path, out: Path, console: bool
) -> MethodRuns:
    """Run one method: its rate first, then every seed at that rate."""
    picker = plan.picker

    def run(jobs: Mapping[Any, Job]) -> dict[Any, Result]:
        results = run_jobs(list(jobs.values()), lambda *_: model, console=console)
        done = {job.name: result for job, result in results}
        return {key: _entry(label, job, done[job.name]) for key, job in jobs.items()}

    folder = workdir if picker is plan else workdir.parent / picker.name
    tried = run(picker.rate_jobs(label, folder, out))
    choice = choose_rate(label, tried)
    chosen = list(run(plan.seed_jobs(label, choice.rate, workdir, out)).values())
    scored = [result["scores"] for result in chosen if result.get("scores")]
    return MethodRuns(
        label,
        count_params(model.config, plan.methods[label]),
        choice,
        list(tried.values()),
        chosen,
        suite_score(scored) if scored else None,
    )


def _entry(label: str, job: Job, result: Result) -> Result:
    run = job.run
    of = {"learning_rate": run.optim.learning_rate, "steps": run.train.steps}
    return {"method": label, **of, "seed": run.train.seed, **result}


def _untrained(
    plan: Comparison, model: Model, workdir: Path, out: Path, console: bool
) -> dict[str, Result]:
    """The scores of the base model, recorded as those of a run are."""
    base, scoring = plan.base, plan.scored
    assert scoring is not None
    numerics = TrainConfig(dtype=base.train.dtype, matmul_precision=base.train.matmul_precision)
    run = RunConfig(model=base.model, data=base.data, train=numerics)
    job = Job(BASE, run, workdir / BASE, out / plan.name / f"{BASE}.json", scoring)
    if (saved := read_result(job)) is None:
        env = environment()
        saved = {"scores": score(base, model, scoring, job.workdir, console)}
        saved |= {key: env[key] for key in ORIGIN}
        write_record(job, saved)
    return saved["scores"]


def _draw(plan: Comparison, scores: Mapping[str, SuiteScore], out: Path) -> None:
    if not scores:
        return
    tables = {label: score.headline_scores for label, score in scores.items()}
    headline = next(iter(scores.values())).headline
    grouped_bars(
        {label: {t: s.mean for t, s in table.items()} for label, table in tables.items()},
        out / plan.name,
        f"{plan.name}: {plan.base.model}",
        f"{headline} (%), clean rows",
        {label: {t: (s.low, s.high) for t, s in table.items()} for label, table in tables.items()},
    )


def overview(plans: Sequence[Comparison], out: str | Path) -> Path | None:
    """Write one page that links the pages of several comparisons: <out>/<the first word of their
    names>.md.

    Args:
      plans: the comparisons; those without a page are left out.
      out: where the pages are.

    Returns:
      Its path; None if no page is there yet.

    Raises:
      ConfigError: a comparison's own page would have that name.
    """
    path = Path(out) / f"{plans[0].name.partition('_')[0]}.md"
    taken = [plan.name for plan in plans if f"{plan.name}.md" == path.name]
    require(
        not taken,
        f"comparison {path.stem!r}: its page would be the overview's, {path.name}; give it a name"
        f" of two words, such as {path.stem}_first.",
    )
    there = [plan for plan in plans if (Path(out) / f"{plan.name}.md").is_file()]
    if not there:
        return None
    rows = [
        {
            "comparison": f"[{plan.name}]({plan.name}.md)",
            "trained on": plan.base.data.task,
            "steps": plan.base.train.steps,
            "seeds": len(plan.seeds),
            "methods": len(plan.methods),
            "tasks scored": ", ".join(plan.tasks) or None,
        }
        for plan in there
    ]
    lines = [f"# {path.stem.capitalize()}", "", markdown_table(rows, list(rows[0])), ""]
    lines += [f"- {plan.name}: {plan.reading}" for plan in there if plan.reading]
    atomic_write(path, ("\n".join(lines) + "\n").encode())
    return path
