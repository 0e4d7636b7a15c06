"""Trains a run from start to report, or resumes it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from zflora_jax.core.errors import Preempted
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.core.trees import Tree
from zflora_jax.data.pipeline import train_batches
from zflora_jax.evaluation.task import one_day
from zflora_jax.experiments.roofline import batch_flops
from zflora_jax.experiments.run_report import Report, finished_report, new_report
from zflora_jax.experiments.saved_step import with_memory
from zflora_jax.experiments.setup import Setup, prepare
from zflora_jax.parallel import distributed
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.sharding import make_mesh, own_rows, put_rows
from zflora_jax.reporting.metrics import METRICS_FILE, MetricWriter, read_metrics
from zflora_jax.reporting.progress import announced
from zflora_jax.reporting.provenance import environment
from zflora_jax.reporting.trackers import require_trackers
from zflora_jax.training.checkpoint import Checkpoints, require_same
from zflora_jax.training.clock import Clock
from zflora_jax.training.group import Group
from zflora_jax.training.hooks import (
    HeldOutLoss,
    LogMetrics,
    Profile,
    RequireFinite,
    SaveCheckpoints,
    StopOnSignal,
)
from zflora_jax.training.identity import require_same_settings
from zflora_jax.training.loop import Hook, fit
from zflora_jax.training.objective import Batch, objective_of
from zflora_jax.training.optim import require_optimizer
from zflora_jax.training.trainer import Metrics, TrainState
from zflora_jax.training.workdir import (
    Changes,
    adopt,
    claimed,
    keep_settings,
    read_starts,
    record_start,
    saved_steps,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The outcome of a run."""

    model: Model  # the base
    adapters: Tree  # unmerged
    report: Report  # the contents of <workdir>/report.json
    run: RunConfig  # with its date and settings from an earlier start (`workdir.adopt`)
    signalled: bool = False  # whether a signal came after the last step, too late to stop one


def train(
    run: RunConfig,
    workdir: str | Path | None = None,
    *,
    model: Model | None = None,
    resume: bool = False,
    console: bool = True,
    compiled: str | Path | None = None,
    group: Group | None = None,
) -> Trained:
    """Trains a run in `workdir`, or resumes the run that is there.

    A finished run is loaded, with its report. Every process of a run calls this. `workdir` gets
    config.json, checkpoints/, metrics.jsonl, starts.jsonl, report.json, trackers' files and
    compile_cache/.

    Args:
      run: The settings.
      workdir: Directory or URL, shared by all processes; None for runs/<task>-<method>.
      model: The run's base if it is loaded already, see `base.given_base`.
      resume: Refuse a `workdir` without a run.
      console: Show progress.
      compiled: File of `zflora plan --save` with the compiled step; None: compile it here.
      group: The runs of a `sweep` that take their steps in one program; for `sweep` only.

    Raises:
      ConfigError: Settings cannot be used, or `workdir` is in use or holds another config.
      NonFiniteError: The loss is NaN or infinite; the last checkpoint is intact.
      Preempted: SIGTERM or SIGINT came; the state after the current step is saved.
      SaveError: A checkpoint could not be written; the ones before it are intact.
    """
    # First: this records the running commit, not the one checked out at the end.
    started, env, group = time.perf_counter(), environment(), group or Group(1)
    workdir, run, changed = _admit(run, workdir, resume, env)
    setup, changed = _load(run, workdir, model, changed, compiled)
    run = setup.run
    with ExitStack() as stack:
        signals, checkpoints, held = _open(stack, setup, workdir, changed)
        state, clock = _first_state(setup, checkpoints, workdir, held, started)
        if (first := int(state.step)) >= run.steps:
            log.info("%s is finished (%d steps): nothing to train", workdir, run.steps)
            report = finished_report(setup, workdir, clock.before, env, state.adapters)
            return Trained(setup.model, state.adapters, report, run, signals.asked)
        shared = {"processes": jax.process_count(), "together": group.size}
        start = {"changed": changed, "plain_texts": setup.plain}
        start |= shared | _repeated(workdir, first, clock)  # from records that are dropped now
        writer = _open_logs(stack, run, workdir, console, first, env, held)
        distributed.on_main(lambda: record_start(workdir, first, env, **start))
        loss = HeldOutLoss(setup.held_out_loss, len(setup.eval_set), writer, run, clock)
        hooks = [*_traces(stack, run, workdir), *_hooks(setup, loss, checkpoints, signals)]
        clock.add("start", time.perf_counter() - started)
        _evaluate_if_missed(loss, writer, state, checkpoints)
        state = _train_steps(setup, state, hooks, clock, console and writer is not None, group)
        with clock.on("checkpoints"):
            checkpoints.finish()
    if int(state.step) < run.steps:  # the last checkpoint is written by now
        text = f"stopped by a signal after step {state.step} of {run.steps}, which is saved in"
        raise Preempted(f"{text} {workdir}; the same command resumes it.")
    report = new_report(setup, workdir, first, loss.last, env, clock.report() | shared)
    return Trained(setup.model, state.adapters, report, run, signals.asked)


def _admit(
    run: RunConfig, workdir: str | Path | None, resume: bool, env: Report
) -> tuple[Path, RunConfig, Changes]:
    """Makes the quick checks; returns (workdir, the settings to run with, those that change)."""
    default = Path("runs") / f"{run.data.task}-{run.adapter.method}"
    distributed.require_equal({name: env.get(name) for name in ("commit", "dirty", "jax", "flax")})
    require_same_settings(run)
    workdir = default if workdir is None else as_path(workdir, "workdir")
    require_trackers(run.train.report_to)
    require(
        run.train.profile is None or "://" not in str(workdir),
        f"train.profile={run.train.profile} writes a trace to WORKDIR/profile, and {workdir} is in"
        " a bucket: trace a few steps in a local --workdir.",
    )
    require_optimizer(run.optim.optimizer)
    distributed.require_shared(workdir)
    run, changed = adopt(workdir, run)
    require(
        not resume or (workdir / "config.json").is_file(),
        f"{workdir} holds no run to resume. Leave out --resume to start one there.",
    )
    return workdir, one_day(run), changed


def _load(
    run: RunConfig,
    workdir: Path,
    model: Model | None,
    changed: Changes,
    compiled: str | Path | None,
) -> tuple[Setup, Changes]:
    """Loads model, data and compiled steps; train.epochs become steps when rows are counted."""
    setup = prepare(run, make_mesh(run.mesh), model)
    if run.train.steps is None:
        run, changed = adopt(workdir, setup.run)
        setup = replace(setup, run=run)
    return setup if compiled is None else setup.with_steps(compiled), changed


def _open(
    stack: ExitStack, setup: Setup, workdir: Path, changed: Changes
) -> tuple[distributed.StopSignals, Checkpoints, Callable[[], None]]:
    """Locks the workdir until `stack` is closed. The function raises if the lock was lost."""
    train = setup.run.train
    held = distributed.on_main(lambda: stack.enter_context(claimed(workdir, setup.run)))
    held = held or (lambda: None)
    for key, (old, new) in changed.items():
        log.info("%s: %r before, %r from here on", key, old, new)
    stack.enter_context(compile_cache(workdir / "compile_cache"))
    # Left after the checkpoints: until then the newest one may still be being written.
    signals = stack.enter_context(distributed.StopSignals())
    checkpoints = stack.enter_context(
        Checkpoints(workdir, train.max_to_keep, keep_best=train.keep_best, before_commit=held)
    )
    stack.enter_context(jax.set_mesh(setup.mesh))
    return signals, checkpoints, held


def _open_logs(
    stack: ExitStack,
    run: RunConfig,
    workdir: Path,
    console: bool,
    first: int,
    env: Report,
    held: Callable[[], None],
) -> MetricWriter | None:
    """Opens metrics.jsonl and the trackers of train.report_to, in the process that writes."""
    shown, trackers = to_dict(run) | {"environment": env}, run.train.report_to
    every = run.train.log_every
    made = (workdir, run.steps, console, first, trackers, shown, every, held)
    return distributed.on_main(lambda: stack.enter_context(MetricWriter(*made)))


def _first_state(
    setup: Setup, checkpoints: Checkpoints, workdir: Path, held: Callable[[], None], started: float
) -> tuple[TrainState, Clock]:
    """The newest saved state, or a fresh one, and the run's clock. With a state that fits, the
    run's settings become those of `workdir`.
    """
    # From process 0: a network file system can show another host an older list of them.
    newest = distributed.from_process_0(checkpoints.latest)
    if newest is None:
        return setup.fresh_state(), Clock(started)
    state, saved = checkpoints.restore(setup.state_like, newest)
    for name in ("base", "data"):
        require_same(saved, name, setup.fingerprints[f"{name}_fingerprint"], workdir)
    left = (step := int(state.step)) < setup.run.steps
    if left and setup.run.train.keep_best:  # losses of other rows are not comparable
        for one in map(checkpoints.meta_of, saved_steps(workdir)):
            if one.get("loss") is not None and "eval_fingerprint" in one:
                require_same(one, "eval", setup.eval_set.fingerprint(), workdir)
    distributed.on_main(lambda: keep_settings(workdir, setup.run, held))
    if left:
        log.info("%s resumes from step %d of %d", workdir, step, setup.run.steps)
    return state, Clock(started, saved["seconds"], saved.get("spent", {}))


def _evaluate_if_missed(
    loss: HeldOutLoss, writer: MetricWriter | None, state: TrainState, checkpoints: Checkpoints
) -> None:
    """Evaluates a restored state if a signal had prevented its due evaluation."""
    step = int(state.step)
    if step == 0 or not loss.is_due(step, stopping=False):
        return
    if distributed.from_process_0(writer is not None and not writer.restored(step, "eval")):
        loss.on_state(step, state, {"checkpoint": checkpoints.folder / str(step)})


def _train_steps(
    setup: Setup,
    state: TrainState,
    hooks: Sequence[Hook],
    clock: Clock,
    console: bool,
    group: Group,
) -> TrainState:
    """Runs the steps that `state` lacks, and first requires each to be finite."""
    data, rows, mesh = setup.run.data, setup.run.data.batch_size, setup.mesh
    objective = objective_of(setup.run)
    kernel, reason = setup.attention
    if kernel == "blocks" and mesh.devices.flat[0].platform in ("gpu", "tpu"):
        log.warning("attention runs as plain products, not as a flash kernel: %s", reason)

    def place(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        return put_rows(objective.take(batch, data.packing), rows, mesh)

    batches = train_batches(setup.train_set, data, int(state.step), own_rows(rows, mesh))
    step = group.step_of(setup.run, setup.model.config, setup.shardings)
    programs = {length: with_memory(x, x) for length, x in setup.steps.items()}

    def step_fn(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows, length = batch["tokens"].shape
        if length not in programs:
            text = f"compiling the train step for {rows} x {length} tokens, once for each length"
            with clock.on("compile"), announced(text, console):
                programs[length] = step
                if hasattr(step, "lower"):  # not a group's, which waits for the other runs
                    compiled = step.lower(params, state, batch).compile()
                    programs[length] = with_memory(step, compiled)  # step: not compiled again
                return programs[length](params, state, batch)
        return programs[length](params, state, batch)

    def timed() -> Iterator[Mapping[str, Any]]:
        while True:
            with clock.on("data"):
                batch = next(batches)
            yield batch

    params, steps, hooks = setup.model.params, setup.run.steps, (RequireFinite(), *hooks)
    return fit(step_fn, params, state, timed(), steps, hooks, place, group.now)


def _hooks(
    setup: Setup,
    loss: HeldOutLoss,
    checkpoints: Checkpoints,
    signals: distributed.StopSignals,
) -> list[Hook]:
    """The hooks that log, measure the held-out loss, save and stop."""
    run, writer, clock = setup.run, loss.writer, loss.clock
    rows, flops = len(setup.train_set), partial(batch_flops, run, setup.model.config)
    metrics = LogMetrics(writer, run, rows, objective_of(run), flops, clock)
    own = {"data_seed": run.data.seed, "eval_fingerprint": setup.eval_set.fingerprint()}
    save = SaveCheckpoints(checkpoints, run, setup.fingerprints | own, clock, writer)
    # Evaluation cannot be interrupted: save first, unless the loss is saved with the state.
    measured = [loss, save] if run.train.keep_best else [save, loss]
    return [metrics, *measured, StopOnSignal(signals)]


def _traces(stack: ExitStack, run: RunConfig, workdir: Path) -> list[Hook]:
    """The hook of train.profile, if it is set, in the process that writes the run's files."""
    if run.train.profile is None or not distributed.is_main():
        return []
    return [stack.enter_context(closing(Profile.of(run.train.profile, workdir)))]


def _repeated(workdir: Path, first: int, clock: Clock) -> dict[str, float]:
    """Counts the seconds that killed starts worked after their last checkpoint, as far as
    metrics.jsonl shows; this one resumes from step `first`. Returns them for starts.jsonl.
    """
    path = workdir / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    after = [record.get("seconds", 0.0) for record in records if record["step"] > first]
    earlier = [start.get("repeated", 0.0) for start in read_starts(workdir)]
    lost = max(earlier, default=0.0) + max(0.0, max(after, default=0.0) - clock.before)
    if lost:
        clock.spent["repeated"] = lost
    return {"repeated": lost}
