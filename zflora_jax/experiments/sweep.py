"""The runs of a sweep: each trained once, measured and recorded; stopped ones go on; several
processes share the work, and several devices too.

`grid` (every combination of settings) and `compare` (methods at their best learning rates) are two
ways to write down which runs these are.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax

from zflora_jax.adapters.fuse import fuse
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.dates import dated
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.suite import evaluate_tasks, kept_scores
from zflora_jax.experiments.setup import held_out
from zflora_jax.experiments.store import ORIGIN, Job, Result, Scoring, read_result, write_record
from zflora_jax.experiments.train import Trained, train
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.training.trainer import NonFiniteError
from zflora_jax.training.workdir import BusyError, locked

log = logging.getLogger(__name__)

Devices = Sequence[jax.Device] | None
POLL = 5.0  # seconds between looks at runs that other processes are training
# What the record of a finished run keeps of its report.
_KEPT = (
    "params_trainable",
    "validation_loss",
    "test_loss",
    "steps",
    "seconds",
    "first_step_seconds",
    "data_wait_share",
    "train_rows",
    "train_rows_dropped",
    "train_documents_cut",
)


def run_jobs(
    jobs: Sequence[Job],
    base: Callable[[RunConfig, Devices], Model | None],
    slots: Sequence[Devices] = (None,),
    *,
    failures: tuple[type[Exception], ...] = (),
    console: bool = True,
) -> Iterator[tuple[Job, Result]]:
    """The results of `jobs`, as they come.

    A job with a record is not run again; what was stopped goes on; a job that another process is
    training is left to it, and its record awaited while there is nothing else to do. A loss that is
    no number is a result, recorded: {"failed": why}.

    Args:
      jobs: the runs, in the order in which they begin.
      base: (settings, devices) -> the base model, or None for one that the run loads itself.
      slots: the devices of each job that runs at one time. One slot: in this thread, where signals
        are heard.
      failures: errors that are results too, but not recorded: such a job is tried again next time.
      console: whether a job that runs alone shows its progress.

    Raises:
      Preempted: a signal came; what trained is saved.
    """
    free: queue.SimpleQueue[Devices] = queue.SimpleQueue()
    for devices in slots:
        free.put(devices)

    def attempt(job: Job) -> tuple[Job, Result | None]:
        devices = free.get()
        try:
            return job, _result(job, base, devices, console and len(slots) == 1)
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
    """`attempt` at each job, in this thread unless there are several workers."""
    if workers == 1:
        yield from map(attempt, jobs)
        return
    with StopSignals(), ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(attempt, job) for job in jobs]):
                yield done.result()
        # A signal, or an error that is no result: runs that train are saved or end, the others are
        # not begun.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(
    job: Job,
    base: Callable[[RunConfig, Devices], Model | None],
    devices: Devices,
    console: bool,
) -> Result:
    """The recorded result of `job`, or that of its run, which is then recorded.

    Raises:
      BusyError: another process is training it.
    """
    if (saved := read_result(job)) is not None:
        log.info("%s is there, made at commit %s: not run again", job.record, saved.get("commit"))
        return saved
    if job.workdir.is_dir():  # said before anything slow
        with locked(job.workdir):
            pass
    try:
        model = base(job.run, devices)
        trained = train(job.run, job.workdir, model=model, devices=devices, console=console)
        result = _measured(job, trained, console)
    except NonFiniteError as error:
        result = {"failed": str(error)}
    write_record(job, result)
    return result


def _measured(job: Job, trained: Trained, console: bool) -> Result:
    report = trained.report
    run = dated(job.run, trained.date)  # scored with the prompts that it was trained with
    result: Result = {key: report[key] for key in _KEPT if key in report}
    if job.test_loss:
        test = split_loss(run, "test", trained.model, trained)
        result |= {
            "test_loss": test["loss"],
            "test_rows": int(test["rows"]),
            "test_tokens": int(test["tokens"]),
        }
    if job.scoring is not None:
        fused = fuse(trained.model, run.adapter, trained.adapters)
        result["scores"] = score(run, fused, job.scoring, job.workdir / "eval", console)
    if job.extra is not None:
        result |= job.extra(run, trained)
    return result | {key: report["environment"][key] for key in ORIGIN}


def split_loss(
    run: RunConfig, split: str, model: Model, trained: Trained | None = None
) -> dict[str, float]:
    """`held_out_loss` of the base on a split, or of the base with what `trained` put beside it."""
    _, encoded = held_out(run, model, split)
    loss = functools.partial(
        held_out_loss,
        model,
        encoded,
        run.data,
        batch_size=run.data.batch_size // run.data.grad_accum_steps,
        chunk=run.train.loss_chunk,
    )
    return loss() if trained is None else loss(adapter=run.adapter, adapters=trained.adapters)


def score(
    run: RunConfig, model: Model, scoring: Scoring, out: Path, console: bool
) -> dict[str, Result]:
    """Task -> rows and scores of `model`. Every example's record stays in `out`."""
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
