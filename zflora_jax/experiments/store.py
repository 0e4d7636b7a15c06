"""Records of finished runs: one JSON file per run of a sweep, written once and not computed again
while its settings stay the same (`read_result`).

A record is {"config": the RunConfig, and "tasks" and "scoring" of a run that is scored; "rows": a
hash of the user's own files, if it has any; "result": the numbers, with commit, date and device}.
The result of a run that diverged is {"failed": why}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.core.fields import ConfigError, from_dict, require, to_dict
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.core.stored_config import from_file
from zflora_jax.data.mixture import own_rows_digest, parse_mixture
from zflora_jax.data.sources import files_digest
from zflora_jax.hf.bucket import MODEL_FILES
from zflora_jax.reporting.files import write_json
from zflora_jax.training.identity import ROUNDING, differences, same_files, same_numbers

if TYPE_CHECKING:
    from zflora_jax.experiments.train import Trained

Result = dict[str, Any]
# (settings, what was trained) -> what else is measured of a run.
Extra = Callable[[RunConfig, "Trained"], Mapping[str, Any]]
FINISHED = "finished"
# The place of those values in a result. Earlier records have them among the other values.
EXTRA = "of extra"
# Of `provenance.environment`, kept with every run: a sweep that goes on can change machines.
ORIGIN = ("commit", "dirty", "date", "device", "cpu_count", "cpu", "jax")


@dataclass(frozen=True)
class Scoring:
    """The tasks that a run's model is scored on, and how."""

    tasks: tuple[str, ...]
    settings: EvalConfig

    def __post_init__(self) -> None:
        require(len(self.tasks) > 0, "scoring.tasks is empty: give at least one task.")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
      name: of the run, unique in its sweep.
      run: its settings.
      workdir: where it trains.
      record: the file of its result.
      scoring: the tasks that its fused model is scored on; None for none.
      test_loss: whether the loss on the test split is measured after training, beside the loss that
        run.eval asks for.
      extra: what it returns is in the result, under `EXTRA`.
    """

    name: str
    run: RunConfig
    workdir: Path
    record: Path
    scoring: Scoring | None = None
    test_loss: bool = False
    extra: Extra | None = None


def own_files(job: Job, loaded: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Hashes of the user's own files that a job reads: "rows", those that it trains on or is scored
    on (`mixture.own_rows_digest`), and "model", those of a base in a directory or file. What is no
    file of one's own, or gone, is left out.

    Args:
      job: the run.
      loaded: run.model -> the `model_digest` from before it was loaded, of models that stay in
        memory for several runs: their files may have changed since.
    """
    scored = job.scoring.tasks if job.scoring else ()
    rows = own_rows_digest(job.run.data, [*parse_mixture(job.run.data.task)[0], *scored])
    found = {"rows": rows, "model": _of_model(job.run.model, loaded or {})}
    return {name: digest for name, digest in found.items() if digest is not None}


def _of_model(model: str, loaded: Mapping[str, str | None]) -> str | None:
    return loaded[model] if model in loaded else model_digest(model)


def model_digest(model: str) -> str | None:
    """A hash of the files of a model in a directory or file of the user's, read once; None for a
    preset, a hub id, a bucket or what is gone.
    """
    place = Path(model).expanduser()
    if not place.exists():
        return None
    found = (
        [place]
        if place.is_file()
        else sorted(f for p in MODEL_FILES for f in place.glob(p) if f.is_file())
    )
    return files_digest(found)


def write_record(job: Job, result: Result, files: Mapping[str, str] | None = None) -> None:
    """Write the record of a finished run, whole or not at all.

    Args:
      job: the run.
      result: its numbers.
      files: its `own_files` from before it read them: one that changed meanwhile is then seen.
    """
    config = to_dict(job.run)
    if job.scoring is not None:
        config |= {"tasks": list(job.scoring.tasks), "scoring": to_dict(job.scoring.settings)}
    write_json(job.record, {"config": config} | dict(files or {}) | {"result": result})


def read_result(job: Job) -> Result | None:
    """The result of a job that has a record.

    Settings are compared as `identity.same_numbers` does, after reading them by the names that they
    had when the record was written; a setting that is younger than the record counts as what it was
    then. A record with scores also serves where none are asked for, and so does one with the
    numbers of `Job.extra`, whatever that computed then; one without them does not serve where they
    are asked for. The user's own files must have the bytes that they had, unless they are gone.

    Returns:
      None where there is no record, or one of another run, model, rows or scores, or of a run that
      diverged with other settings of rounding.
    """
    if not job.record.is_file():
        return None
    saved = json.loads(job.record.read_text(encoding="utf-8"))
    config, scoring = dict(saved["config"]), job.scoring
    tasks, settings = tuple(config.pop("tasks", ())), config.pop("scoring", {})
    try:
        there = from_file(RunConfig, config)
        same = same_numbers(there, job.run) and (
            scoring is None
            or (
                (tasks, from_dict(EvalConfig, settings)) == (scoring.tasks, scoring.settings)
                and same_files(there, job.run, scoring.tasks)
            )
        )
        same = same and all(
            saved.get(name, digest) == digest for name, digest in own_files(job).items()
        )
    except ConfigError:  # a setting that is gone, or files that are not clear
        return None
    if not same:
        return None
    result = saved["result"] if "result" in saved else _of_a_row(saved["row"])
    if "failed" in result and differences(there, job.run).keys() & set(ROUNDING):
        return None  # rounding can be why a loss is no number
    measured = job.extra is None or "row" in saved or EXTRA in result or "failed" in result
    return result if measured else None


def _of_a_row(row: Result) -> Result:
    """The result in a record of an earlier version's grid: a row with its status."""
    status = row["status"]
    if status != FINISHED:
        return {"failed": status.removeprefix("failed: ")}
    return {key: value for key, value in row.items() if key != "status"}


def status(result: Result) -> str:
    """ "finished", or "failed: " and why."""
    return f"failed: {result['failed']}" if "failed" in result else FINISHED
