"""Runs from start to end: train (or resume), load what a run has trained, export it."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import count_params
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import ConfigError, nearest, require, to_dict
from zflora_jax.core.model import Model, fingerprint, require_fit
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.data.dates import today
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import Encoded, pack_sequences, tokenize_examples, train_batches
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.evaluation.gap_prompts import gap_prompts
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.experiments.base import as_base, given_base
from zflora_jax.experiments.run_report import REPORT_FILE, finished_report, loss_fields
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import save_peft
from zflora_jax.hf.save import save_hf
from zflora_jax.parallel import distributed
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.parallel.sharding import make_mesh, own_rows, put_rows, shard, state_shardings
from zflora_jax.reporting.files import local_path, write_json
from zflora_jax.reporting.metrics import MetricWriter
from zflora_jax.reporting.provenance import environment
from zflora_jax.reporting.trackers import require_installed
from zflora_jax.training.checkpoint import (
    Checkpoints,
    adopt,
    change_notes,
    claim,
    locked,
    read_config,
    require_own,
)
from zflora_jax.training.starts import record_start
from zflora_jax.training.trainer import (
    Batch,
    NonFiniteError,
    TrainState,
    fit,
    init_state,
    make_train_step,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run has made: the base model, the adapters beside it, the report (also in
    <workdir>/report.json), and the day that a chat template was told in training (data.date).
    """

    model: Model
    adapters: Tree
    report: dict[str, Any]
    date: str | None


def load_base(run: RunConfig, mesh: Any = None) -> Model:
    """The run's base model in its dtype, divided over `mesh` if one is given, as `as_base` says."""
    return as_base(run, load_model(run.model, dtype=run.train.dtype, mesh=mesh))


def _fresh_state(run: RunConfig, model: Model) -> TrainState:
    return init_state(
        init_adapters(jax.random.key(run.train.seed), model, run.adapter),
        run.optim,
        run.train.steps,
    )


def load_run(
    workdir: str | Path, step: int | str | None = None, *, mesh: Mesh | None = None
) -> tuple[RunConfig, Model, Tree, int]:
    """A checkpoint of a run.

    Args:
      workdir: of the run.
      step: number of the checkpoint, "best" (train.keep_best), or None for the newest.
      mesh: what base and adapters are divided over (`sharding.make_mesh`). None: the mesh of the
        run where its devices are there, else one device.

    Returns:
      (config, base model, adapters, finished steps).

    Raises:
      ConfigError: there is no such checkpoint, or it was trained on another base.
    """
    run = read_config(workdir)
    require(
        (Path(workdir) / "checkpoints").is_dir(),
        f"{workdir} has no checkpoint yet; train it first.",
    )
    mesh = mesh_if_there(run.mesh) if mesh is None else mesh
    model = load_base(run, mesh)
    with Checkpoints(workdir, create=False) as checkpoints:
        require(
            checkpoints.latest is not None,
            f"{workdir} has no complete checkpoint yet; train it first.",
        )
        if step == "best":
            require(
                run.train.keep_best,
                f"{workdir} has no best checkpoint: train with train.keep_best=True, or name a"
                " step.",
            )
            step = checkpoints.best
            require(
                step is not None,
                f"{workdir} has no checkpoint that was saved with its loss yet; name a step, or"
                " train on.",
            )
        require(
            step is None or str(step).isdigit(),
            f"checkpoint {step!r}: expected a number of steps, or 'best'.",
        )
        like = jax.eval_shape(lambda: _fresh_state(run, model))
        if mesh is not None:
            like = jax.tree.map(
                lambda x, where: x.update(sharding=where), like, state_shardings(like, mesh)
            )
        state, meta = checkpoints.restore(like, None if step is None else int(step))
    _check_same(meta, "base", fingerprint(model), workdir)
    return run, model, state.adapters, int(state.step)


def _check_same(meta: dict[str, Any], name: str, fingerprint: str, workdir: str | Path) -> None:
    if meta[f"{name}_fingerprint"] != fingerprint:
        there, here = meta[f"{name}_fingerprint"][:12], fingerprint[:12]
        raise ConfigError(
            f"{workdir} was trained on another {name}: fingerprint {there} there, {here} here."
            " Restore it, or use another --workdir."
        )


def held_out(
    run: RunConfig, model: Model, split: str | None = None
) -> tuple[Sequence[Example], Encoded]:
    """The evaluation examples of a run (at most eval.limit, in their order) and their tokens."""
    require_fit(run, model)
    examples = load_mixture(run.data, split or run.eval.split, run.eval.limit)
    return examples, tokenize_examples(examples, model.tokenizer, run.data, model.config.vocab_size)


def train(
    run: RunConfig,
    workdir: str | Path | None = None,
    *,
    model: Model | None = None,
    devices: Sequence[jax.Device] | None = None,
    resume: bool = False,
    console: bool = True,
) -> Trained:
    """Train `run` in `workdir`, or go on with the run that is there; a finished run is loaded, with
    the report that is there.

    workdir: None means runs/<task>-<method>. model: the run's base if it is loaded already;
    `base.given_base` says what it must be. devices: what the mesh is made of, None for all. resume:
    refuse a workdir without a run. Every process of a run of several calls this (after
    `hosts.start`), with a workdir that they share. Writes config.json, checkpoints/, metrics.jsonl,
    starts.jsonl (the environment of every start), report.json, what train.report_to names and,
    unless one is in use already, compile_cache/ (see `cache.compile_cache`).

    Raises:
      ConfigError: settings that cannot be used, a `workdir` of another config, or one that another
        process is training.
      NonFiniteError: the loss stopped being a number; the last checkpoint is intact.
      Preempted: SIGTERM or SIGINT came; the state after the step that ran then is saved.
      SaveError: a checkpoint could not be written; the ones before it are intact.
    """
    # The commit that runs, not the one checked out when it ends.
    started, env = (
        time.perf_counter(),
        environment(),
    )
    workdir = (
        Path("runs") / f"{run.data.task}-{run.adapter.method}"
        if workdir is None
        else local_path(workdir, "workdir")
    )
    require_installed(run.train.report_to)
    distributed.require_shared(workdir)
    # Before anything slow; it is claimed once model, data and settings are known to be usable.
    run, changed = adopt(workdir, run)
    run = _same_day(run)
    require(
        not resume or (workdir / "config.json").is_file(),
        f"{workdir} holds no run to resume. Leave out --resume to start one there.",
    )
    mesh = make_mesh(run.mesh, devices)
    model = load_base(run, mesh) if model is None else given_base(run, model)
    loaded = time.perf_counter()
    train_set = tokenize_examples(
        load_mixture(run.data, "train"), model.tokenizer, run.data, model.config.vocab_size
    )
    examples = len(train_set)
    if run.data.packing:
        train_set = pack_sequences(train_set, run.data.bucket_lengths[-1])
    _, eval_set = held_out(run, model)
    meta = {"base_fingerprint": fingerprint(model), "data_fingerprint": train_set.fingerprint()}
    model = dataclasses.replace(model, params=shard(model.params, mesh))
    where = state_shardings(jax.eval_shape(lambda: _fresh_state(run, model)), mesh)
    distributed.on_main(lambda: claim(workdir, run))
    steps, every = run.train.steps, run.train
    step_fn = make_train_step(
        model.config,
        run.adapter,
        run.optim,
        steps,
        run.data.grad_accum_steps,
        run.train.loss_chunk,
        where,
        every.seed,
    )
    for note in change_notes(changed, run):
        log.info("%s", note)
    facts = {
        "method": run.adapter.method,
        "params_base": count_base(model.config),
        "params_trainable": count_params(model.config, run.adapter),
        "train_rows": examples,
        "train_rows_dropped": train_set.dropped,
        "train_documents_cut": train_set.truncated,
        "train_rows_packed": len(train_set) if run.data.packing else None,
        "train_on_prompt": run.data.train_on_prompt,
        **meta,
        "config": to_dict(run),
    }
    # Seconds of earlier processes; the loss after the last step.
    spent, final = (
        0.0,
        dict[str, float](),
    )
    phases: dict[str, float | None] = {
        "load_seconds": loaded - started,
        "data_seconds": time.perf_counter() - loaded,
        "first_step_seconds": None,
    }
    # Seconds of the steps after the first one: of waiting for batches, and all.
    waited, trained_for = (
        0.0,
        0.0,
    )

    def evaluate_loss(adapters: Tree) -> dict[str, float]:
        return held_out_loss(
            model,
            eval_set,
            run.data,
            adapter=run.adapter,
            adapters=adapters,
            batch_size=_micro_batch(run),
            chunk=run.train.loss_chunk,
        )

    with ExitStack() as stack:
        stack.enter_context(compile_cache(workdir / "compile_cache"))
        # Left last: until then the newest checkpoint may still be being written.
        signals = stack.enter_context(distributed.StopSignals())
        distributed.on_main(lambda: stack.enter_context(locked(workdir)))
        distributed.on_main(lambda: require_own(workdir, run))
        checkpoints = stack.enter_context(
            Checkpoints(workdir, every.max_to_keep, keep_best=every.keep_best)
        )
        stack.enter_context(jax.set_mesh(mesh))
        state = _sharded_state(run, model, where)
        if checkpoints.latest is not None:
            state, saved = checkpoints.restore(state)
            for name in ("base", "data"):
                _check_same(saved, name, meta[f"{name}_fingerprint"], workdir)
            spent = saved["seconds"]
            if int(state.step) >= steps:
                log.info("%s is finished (%d steps): nothing to train", workdir, steps)
                report = finished_report(
                    run, workdir, facts, spent, env, lambda: evaluate_loss(state.adapters)
                )
                return Trained(model, state.adapters, report, run.data.date)
            log.info("%s resumes from step %d of %d", workdir, int(state.step), steps)
        first = int(state.step)
        shown = to_dict(run) | {"environment": env}
        writer = distributed.on_main(
            lambda: stack.enter_context(
                MetricWriter(workdir, steps, console, first, run.train.report_to, shown)
            )
        )
        distributed.on_main(
            lambda: record_start(
                workdir, first, env, processes=jax.process_count(), changed=changed
            )
        )
        clock = time.perf_counter()

        def on_metrics(step: int, metrics: dict[str, float]) -> None:
            nonlocal clock, waited, trained_for
            now = time.perf_counter()
            seconds, wait = max(now - clock, 1e-9), metrics.pop("wait_seconds")
            rate, clock = metrics["tokens"] / seconds, now
            if step == first + 1:
                # The metrics come once the next step is on its way.
                phases["first_step_seconds"] = now - started
            else:
                waited, trained_for = waited + wait, trained_for + seconds
            if writer is not None:
                writer.progress(step, loss=metrics["loss"], tokens_per_s=rate)
                if step % every.log_every == 0 or step in (1, steps):
                    speed = {"target_tokens_per_s": rate, "data_wait_share": wait / seconds}
                    writer.write(step, "train", metrics | speed | {"batch_crc32": order[step]})
            del order[step]

        def due(step: int, period: int | None) -> bool:
            return step == steps or (period is not None and step % period == 0)

        def save(step: int, state: TrainState, loss: float | None = None) -> None:
            position = {
                "next_step": step,
                "data_seed": run.data.seed,
                "seconds": spent + time.perf_counter() - started,
            }
            checkpoints.save(step, state, meta | position, loss)

        def on_due(step: int, state: TrainState) -> None:
            nonlocal clock, final
            loss = None
            if (
                due(step, every.save_every) and not every.keep_best
            ):  # first: evaluation takes time, and cannot be interrupted
                save(step, state)
            if due(step, every.eval_every):
                try:
                    final = evaluate_loss(state.adapters)
                except NonFiniteError as error:
                    saved = (
                        f"; the checkpoint of step {step} is saved: remove"
                        f" {workdir / 'checkpoints' / str(step)} to go on from an earlier one"
                    )
                    raise NonFiniteError(
                        f"after step {step} {error}{saved if checkpoints.latest == step else ''}"
                    ) from error
                loss = final["loss"]
                if writer is not None:
                    writer.write(step, "eval", final)
            if due(step, every.save_every) and every.keep_best:
                save(step, state, loss)
            clock = time.perf_counter()

        def on_stop(step: int, state: TrainState) -> None:
            save(step, state)
            stack.close()  # what is being written is written before anyone is told that it is
            raise distributed.Preempted(
                f"stopped by a signal after step {step} of {steps}, which is saved in {workdir};"
                " the same command goes on from there."
            )

        order: dict[
            int, int
        ] = {}  # step -> what its batch was, for whoever compares the data of two runs

        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(
                train_batches(train_set, run.data, first, own_rows(run.data.batch_size, mesh)),
                first + 1,
            ):
                order[step] = zlib.crc32(batch["tokens"].tobytes())
                yield put_rows(batch, run.data.batch_size, mesh)

        state = fit(
            step_fn,
            model.params,
            state,
            batches(),
            steps,
            on_metrics=on_metrics,
            is_due=lambda step: due(step, every.save_every) or due(step, every.eval_every),
            on_due=on_due,
            should_stop=signals.requested,
            on_stop=on_stop,
        )
    report = {
        **facts,
        "steps": int(state.step),
        "resumed_from": first,
        **loss_fields(run, final),
        "seconds": spent + time.perf_counter() - started,
        **phases,
        "data_wait_share": waited / trained_for if trained_for else None,
        "processes": jax.process_count(),
        "environment": env,
    }
    if distributed.is_main():
        write_json(workdir / REPORT_FILE, report)
    return Trained(model, state.adapters, report, run.data.date)


def _sharded_state(run: RunConfig, model: Model, where: Any) -> TrainState:
    """The state before the first step, each device making its own part."""
    fresh = jax.jit(
        lambda params: _fresh_state(run, dataclasses.replace(model, params=params)),
        out_shardings=where,
    )
    return fresh(model.params)


def _same_day(run: RunConfig) -> RunConfig:
    """`run` with the date of process 0, which all processes tell their chat template."""
    day = distributed.from_main(date.fromisoformat(run.data.date or today()).toordinal())
    return dataclasses.replace(
        run, data=dataclasses.replace(run.data, date=date.fromordinal(day).isoformat())
    )


def _micro_batch(run: RunConfig) -> int:
    return run.data.batch_size // run.data.grad_accum_steps


def load_fused(
    workdir: str | Path, step: int | str | None = None, *, mesh: Mesh | None = None
) -> tuple[Model, str]:
    """What `workdir` has trained (see `load_run`), fused, and a label for result files
    ("step120").
    """
    run, model, adapters, step = load_run(workdir, step, mesh=mesh)
    return fuse(model, run.adapter, adapters), f"step{step}"


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    checkpoint: int | str | None = None,
    eps_z: float | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Export what `workdir` has trained to `out`: format "hf", a fused Hugging Face directory, or
    "peft", LoRA adapters. Returns what was written. dtype, eps_z: of "hf", as `save_hf` takes them.

    For "hf" the report says how far the export's logits are from the fused model's in float32: max
    and mean |dlogit|, and top-1 agreement, on the prompts of held-out rows or, where the data is
    gone, on built-in texts ("gap_prompts" says which). mesh: as in `load_run`.
    """
    local_path(out, "out")
    require(format in ("hf", "peft"), f"format={format!r}: {nearest(format, ('hf', 'peft'))}.")
    count = jax.process_count()
    require(
        count == 1,
        f"{count} processes cannot export a run together: start one, with the devices that the"
        " model needs.",
    )
    run, model, adapters, step = load_run(workdir, checkpoint, mesh=mesh)
    if format == "peft":
        return save_peft(out, model, run.adapter, adapters)
    fused = fuse(model, run.adapter, adapters)
    card = {
        "task": run.data.task,
        "steps": step,
        "trainable parameters": count_params(model.config, run.adapter),
    }
    trained = (
        json.loads(path.read_text(encoding="utf-8"))
        if (path := Path(workdir) / REPORT_FILE).is_file()
        else {}
    )
    if trained.get("steps") == step and (loss := trained.get(f"{run.eval.split}_loss")) is not None:
        card[f"{run.eval.split} loss"] = loss
    prompts, origin = gap_prompts(run, model)  # before anything is written
    report = save_hf(
        out, fused, dtype=dtype, base_fingerprint=fingerprint(model), card=card, eps_z=eps_z
    )
    return report | {"gap_prompts": origin} | export_gap(fused, out, prompts)
