"""Compare methods at their best learning rates, over several seeds, by their scores on tasks.

The learning rate of a method is chosen on the validation split with the first seed; every seed then
runs at the chosen rate, and the tables report the test split, with the seeds' standard
deviation beside the differences between methods.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
from zflora_jax.experiments.difference_view import draw_differences
from zflora_jax.experiments.differences import TaskGaps, compare_runs
from zflora_jax.experiments.jobs import FAILURES, POLL, run_jobs, score, split_loss
from zflora_jax.experiments.page import comparison_page, write_page
from zflora_jax.experiments.progress import Progress
from zflora_jax.experiments.rates import RateChoice
from zflora_jax.experiments.store import (
    ORIGIN,
    Job,
    Result,
    model_digest,
    own_files,
    read_result,
    write_record,
)
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.reporting.files import local_path
from zflora_jax.reporting.plots import grouped_bars
from zflora_jax.reporting.provenance import environment
from zflora_jax.training.lock import BusyError, locked

log = logging.getLogger(__name__)


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
        losses = {r["seed"]: r.get("test_loss") for r in self.chosen}
        tests = [loss for loss in losses.values() if loss is not None]
        seconds = [r["seconds"] for r in self.chosen if r.get("seconds") is not None]
        row: Result = {
            "method": self.label,
            "trainable": self.trainable,
            "learning rate": self.choice.rate,
            "untuned": self.choice.untuned,
        }
        row |= {f"validation, lr {rate:g}": loss for rate, loss in self.choice.losses.items()}
        if plan.pick_steps:
            row |= {f"validation, seed {r['seed']}": r.get("validation_loss") for r in self.chosen}
        row |= {f"test, seed {seed}": loss for seed, loss in losses.items()}
        if len(tests) > 1:
            row |= {"test mean": statistics.mean(tests), "test std": statistics.stdev(tests)}
        row["seconds, fastest run"] = min(seconds) if tests else None
        return row | score_fields(self.score)


def score_fields(score: SuiteScore | None) -> Result:
    return score.fields() if score else {"scores": {}, "all scores": {}, "intervals": {}}


def compare_methods(
    plan: Comparison,
    workdir: str | Path,
    out: str | Path,
    *,
    console: bool = True,
    run: bool = True,
) -> Result:
    """Run a comparison and write its tables after each run, <out>/<name>.json and .md, with tasks
    pictures too, .png and .svg.

    Each finished run leaves a record <out>/<name>/<run>.json with its settings and commit, and is
    not run again while its record is there and its settings the same (`store.read_result`). Several
    processes may run the same comparison; they share its runs: each takes the first that is not
    done, the methods in the plan's order, of each the rates first and then the seeds.

    Args:
      plan: what to run.
      workdir: of the runs.
      out: of the records and pages.
      console: whether runs show their progress.
      run: False makes no run, and writes the tables of those that are there (`has_runs`).

    Returns:
      the JSON's contents: name, base (its losses), rows (one per method), missing, runs, tasks,
      compared by, differences (to plan.reference), contrasts, loss differences, config,
      environment.

    Raises:
      ConfigError: a method diverged at every rate or a run could not be made (the others are; the
        same call tries again), nothing could be scored, or no run is there and none may be made.
    """
    workdir, out = local_path(workdir, "workdir"), local_path(out, "out")
    if not run:
        _require_runs(plan, workdir, out)
    with compile_cache(workdir / "compile_cache"):
        loaded = {plan.base.model: model_digest(plan.base.model)}
        model = load_base(plan.base, mesh_if_there(plan.base.mesh))
        found = _facts(plan, model)
        untrained = partial(_untrained, plan, model, loaded, workdir, out, console, run)
        if base := untrained():  # a measure that the tasks do not have is refused before any run
            suite_score([base], plan.measure, plan.tasks)
        state = Progress(plan, workdir, out)
        while run and (jobs := state.unfinished()):
            settings: Any = {"loaded": loaded, "failures": FAILURES, "console": console}
            job, done = next(run_jobs(jobs, lambda *_: model, **settings))
            if state.is_made(job, done):
                log.info("%s: %s is done; %s", plan.name, job.name, state.left())
                base = base or untrained()
                _write_tables(plan, found, state, base, model, out)
        while run and plan.tasks and not base:  # another process is scoring it
            time.sleep(POLL)
            base = untrained()
        result = _write_tables(plan, found, state, base, model, out)
    state.require_made()
    return result


def _facts(plan: Comparison, model: Model) -> Result:
    """What a comparison's JSON holds before there are runs; "base": the losses of the base."""
    env, run = environment(), dated(plan.base)
    return {
        "name": plan.name,
        "base": {s: split_loss(run, s, model)["loss"] for s in ("validation", "test")},
        "tasks": list(plan.tasks),
        "config": to_dict(plan.base),
        "environment": env,
    }


def has_runs(plan: Comparison, workdir: str | Path, out: str | Path) -> bool:
    """Whether a comparison has a whole run, so that a table can be written without making one.

    Args:
      plan: the comparison.
      workdir, out: as of `compare_methods`.
    """
    return Progress(plan, Path(workdir), Path(out)).begun()


def _require_runs(plan: Comparison, workdir: Path, out: Path) -> None:
    require(
        has_runs(plan, workdir, out),
        f"{plan.name}: no record in {out / plan.name} is of a whole run with these settings at a"
        " chosen learning rate, so no table was written. Give the settings that the runs were made"
        " with, or let them be made.",
    )


def _write_tables(
    plan: Comparison, found: Result, state: Progress, base: Result, model: Model, out: Path
) -> Result:
    """Write the page of what is done so far, its JSON and pictures; returns what the JSON holds."""
    scores = {BASE: suite_score([base], plan.measure, plan.tasks)} if base else {}
    rows = [{"method": BASE, "trainable": 0} | scores[BASE].fields()] if base else []
    methods = [method for label in plan.methods if (method := _runs_of(state, label, model))]
    rows += [method.row(plan) for method in methods]
    scores |= {method.label: method.score for method in methods if method.score}
    runs = [run for method in methods for run in [*method.tried, *method.chosen]]
    chosen = {method.label: method.chosen for method in methods}
    measure = next(iter(scores.values())).headline if scores else plan.measure
    compared = compare_runs(plan, chosen, base, measure)
    result = (
        found
        | {
            "rows": rows,
            "missing": state.missing(),
            "runs": runs,
            "compared by": {
                "measure": plan.measure,
                "reference": plan.reference,
                "margin": plan.margin,
            },
        }
        | compared.fields()
    )
    write_page(out / f"{plan.name}.md", comparison_page(plan, result, scores, compared), result)
    _draw(plan, scores, compared.to_reference, out)
    return result


def _runs_of(state: Progress, label: str, model: Model) -> MethodRuns | None:
    """What the runs of a method came to so far; None before its first whole run."""
    plan, choice = state.plan, state.choice(label)
    results = {job: state.result(job) for job in state.seed_jobs(label).values()}
    chosen = [_entry(label, job, result) for job, result in results.items() if result]
    if choice is None or not chosen:
        return None
    tried = {job: state.result(job) for job in state.rate_jobs(label).values()}
    scored = [result["scores"] for result in chosen if result.get("scores")]
    return MethodRuns(
        label,
        count_params(model.config, plan.methods[label]),
        choice,
        [_entry(label, job, result) for job, result in tried.items() if result],
        chosen,
        suite_score(scored, plan.measure, plan.tasks) if scored else None,
    )


def _entry(label: str, job: Job, result: Result) -> Result:
    run = job.run
    of = {"learning_rate": run.optim.learning_rate, "steps": run.train.steps}
    return {"method": label, **of, "seed": run.train.seed, **result}


def _untrained(
    plan: Comparison,
    model: Model,
    loaded: Mapping[str, str | None],
    workdir: Path,
    out: Path,
    console: bool,
    run: bool,
) -> dict[str, Result]:
    """The scores of the base model, recorded as those of a run are; empty where there are no tasks,
    as long as another process computes them, and without a record if nothing may `run`. loaded: as
    for `own_files`.
    """
    base, scoring = plan.base, plan.scored
    if scoring is None:
        return {}
    numerics = TrainConfig(dtype=base.train.dtype, matmul_precision=base.train.matmul_precision)
    untrained = RunConfig(model=base.model, data=base.data, train=numerics, quantize=base.quantize)
    job = Job(BASE, untrained, workdir / BASE, out / plan.name / f"{BASE}.json", scoring)
    if (saved := read_result(job)) is not None:
        return saved["scores"]
    if not run:
        return {}
    job.workdir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(job.workdir):
            if (saved := read_result(job)) is not None:
                return saved["scores"]
            env, files = environment(), own_files(job, loaded)
            result = {"scores": score(base, model, scoring, job.workdir, console)}
            write_record(job, result | {key: env[key] for key in ORIGIN}, files)
    except BusyError:
        return {}
    return result["scores"]


def _draw(
    plan: Comparison,
    scores: Mapping[str, SuiteScore],
    gaps: Mapping[str, TaskGaps],
    out: Path,
) -> None:
    if not scores:
        return
    measure = next(iter(scores.values())).headline
    if gaps.keys() - {BASE}:
        draw_differences(
            [(plan, gaps)],
            out / plan.name,
            f"{plan.title}: difference to {plan.reference}, 95% intervals (right: better)",
            f"{measure}, points",
        )
        return
    tables = {label: score.headline_scores for label, score in scores.items()}
    grouped_bars(
        {label: {t: s.mean for t, s in table.items()} for label, table in tables.items()},
        out / plan.name,
        f"{plan.name}: {plan.base.model}",
        f"{measure} (%), clean rows",
        {label: {t: (s.low, s.high) for t, s in table.items()} for label, table in tables.items()},
    )
