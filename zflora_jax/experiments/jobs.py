"""Run a list of jobs: train each once, measure it and record the result. A stopped job goes on.
Several processes may share the list, and several jobs may run at one time on devices of their own.

`grid` (every combination of settings) and `compare` (methods at their best learning rates) make
such lists.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax

from zflora_jax.core.errors import CheckpointError, NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.suite import evaluate_tasks, kept_scores
from zflora_jax.experiments.restore import fuse_trained
from zflora_jax.experiments.setup import held_out
from zflora_jax.experiments.store import (
    EXTRA,
    ORIGIN,
    Job,
    Result,
    Scoring,
    own_files,
    read_result,
    write_record,
)
from zflora_jax.experiments.train import Trained, train
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.provenance import commit_text
from zflora_jax.training.identity import rounded_as
from zflora_jax.training.lock import BusyError, locked
from zflora_jax.training.workdir import require_no_jump

log = logging.getLogger(__name__)

Devices = Sequence[jax.Device] | None
POLL = 5.0  # seconds between looks at runs that other processes are training
# Errors of one run that leave others alone: settings or a model that cannot be used; XLA's, of
# memory too, are JaxRuntimeErrors.
FAILURES = (ConfigError, CheckpointError, jax.errors.JaxRuntimeError, MemoryError)
# What a record copies from the report of a run.
_KEPT = (
    "params_trainable",
    "validation_loss",
    "test_loss",
    "steps",
    "seconds",
    "first_step_seconds",
    "train_rows",
    "train_rows_dropped",
    "train_documents_cut",
)


def run_jobs(
    jobs: Sequence[Job],
    base: Callable[[RunConfig, Devices], Model | None],
    slots: Sequence[Devices] = (None,),
    *,
    loaded: Mapping[str, str | None] | None = None,
    failures: tuple[type[Exception], ...] = (),
    console: bool = True,
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, result) as results come.

    A job that has a record is not run again. A job that was stopped goes on. A job that another
    process trains is left to that process; its record is read once no other job is left. A run that
    diverges is recorded as {"failed": why}.

    Args:
      jobs: the runs, in the order in which they begin.
      base: (settings, devices) -> the base model, or None for one that the run loads itself.
      slots: for each job that may run at the same time, its devices. With one slot the jobs run in
        this thread, which receives the signals if it is the main one.
      loaded: of the models that `base` keeps in memory; see `store.own_files`.
      failures: errors that become a result, {"failed": why}, but no record: the next call tries
        such a job again.
      console: show the progress of a job, if there is one slot.

    Raises:
      Preempted: a signal came; the runs that were training are saved.
    """
    free: queue.SimpleQueue[Devices] = queue.SimpleQueue()
    for devices in slots:
        free.put(devices)

    def attempt(job: Job) -> tuple[Job, Result | None]:
        devices = free.get()
        try:
            return job, _result(job, base, loaded, devices, console and len(slots) == 1)
        except BusyError:
            return job, None
        except failures as error:
            return job, {"failed": str(error) or type(error).__name__}
        finally:
            free.put(devices)

    left = list(jobs)
    while left:
        busy = []
        for job, result in _each(attempt, left, len(slots)):
            if result is None:
                busy.append(job)
            else:
                yield job, result
        left = busy
        if left:
            time.sleep(POLL)


def _each(
    attempt: Callable[[Job], tuple[Job, Result | None]], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result | None]]:
    """Yield `attempt(job)` for each job: in this thread, or with several `workers` in a pool."""
    if workers == 1:
        yield from map(attempt, jobs)
        return
    with StopSignals(), ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(attempt, job) for job in jobs]):
                yield done.result()
        # A signal, or an error that is no result: begin no more jobs. Those that run stop or end.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(
    job: Job,
    base: Callable[[RunConfig, Devices], Model | None],
    loaded: Mapping[str, str | None] | None,
    devices: Devices,
    console: bool,
) -> Result:
    """Read the recorded result of `job`; if there is none, train the job and record its result.

    Raises:
      BusyError: another process is training it.
    """
    if (saved := read_result(job)) is not None:
        log.info("%s is there, made at commit %s: not run again", job.record, commit_text(saved))
        return saved
    if job.workdir.is_dir():  # raise BusyError before anything slow
        with locked(job.workdir):
            require_no_jump(job.workdir, job.run)
    model = base(job.run, devices)
    files = own_files(job, loaded)  # before they are read
    try:
        trained = train(job.run, job.workdir, model=model, devices=devices, console=console)
        if trained.signalled:
            raise Preempted(
                f"stopped by a signal after {job.name} was trained, which is saved in"
                f" {job.workdir}; the same command goes on from there."
            )
    except NonFiniteError as error:
        result: Result = {"failed": str(error)}
        write_record(job, result, files)
        return result
    # A run that was finished keeps its settings.
    job = dataclasses.replace(job, run=rounded_as(trained.run, job.run))
    folder = job.workdir / "eval"
    folder.mkdir(exist_ok=True)
    with locked(folder):  # the run itself is free again
        if (saved := read_result(job)) is not None:
            return saved
        try:
            result = _measured(job, trained, console)
        except NonFiniteError as error:
            result = {"failed": str(error)}
        write_record(job, result, files)
    return result


def _measured(job: Job, trained: Trained, console: bool) -> Result:
    """What the record of `job` holds: parts of the report, and what the job asks for besides."""
    report, run = trained.report, trained.run
    result: Result = {key: report[key] for key in _KEPT if key in report}
    if job.test_loss:
        test = split_loss(run, "test", trained.model, trained)
        result |= {
            "test_loss": test["loss"],
            "test_rows": int(test["rows"]),
            "test_tokens": int(test["tokens"]),
        }
    if job.scoring is not None:
        fused = fuse_trained(trained.model, run.adapter, trained.adapters, donate=False)
        result["scores"] = score(run, fused, job.scoring, job.workdir / "eval", console)
    result |= {key: report["environment"].get(key) for key in ORIGIN}
    return result if job.extra is None else result | {EXTRA: dict(job.extra(run, trained))}


def split_loss(
    run: RunConfig, split: str, model: Model, trained: Trained | None = None
) -> dict[str, float]:
    """Compute `held_out_loss` on a split: of the base, or with the adapters of `trained`."""
    adapters = None if trained is None else trained.adapters
    return held_out_loss(run, model, held_out(run, model, split), adapters)


def score(
    run: RunConfig, model: Model, scoring: Scoring, out: Path, console: bool
) -> dict[str, Result]:
    """Score `model` on tasks: task -> rows, scores, and the scores of each row. The record of every
    example is in `out`.
    """
    summary = evaluate_tasks(
        dataclasses.replace(run, eval=scoring.settings),
        model,
        scoring.tasks,
        out,
        "chosen",
        trained_on=[TrainedOn(run.data)],
        replace=True,
        console=console,
    )
    return kept_scores(summary)
