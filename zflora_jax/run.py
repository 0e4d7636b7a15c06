"""Runs from start to end: train (or resume), load what a run has trained, export it."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from zflora_jax import hosts, trees
from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import count_base, count_params, plan
from zflora_jax.cache import compile_cache
from zflora_jax.checkpoint import Checkpoints, check_workdir, claim, locked, read_config
from zflora_jax.config import METHODS, RunConfig
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import Encoded, encode_prompts, fit_documents, pack, tokenize_examples, train_batches
from zflora_jax.data.tasks import Example
from zflora_jax.evals import held_out_loss
from zflora_jax.fields import ConfigError, nearest, require, to_dict
from zflora_jax.hf.gap import export_gap
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import save_peft
from zflora_jax.hf.save import save_hf
from zflora_jax.metrics import MetricWriter
from zflora_jax.model import Model
from zflora_jax.report import atomic_write, environment, plain, write_json
from zflora_jax.sharding import make_mesh, own_rows, put_rows, shard, state_shardings
from zflora_jax.text import stop_as_trained
from zflora_jax.trackers import require_installed
from zflora_jax.trainer import Batch, TrainState, fit, init_state, make_train_step
from zflora_jax.trees import Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run has made: the base model, the adapters beside it, and the report (also in <workdir>/report.json)."""

    model: Model
    adapters: Tree
    report: dict[str, Any]


def load_base(run: RunConfig, mesh: Any = None) -> Model:
    """The run's base model in its dtype, divided over `mesh` if one is given, as `as_base` says."""
    return as_base(run, load_model(run.model, dtype=run.train.dtype, mesh=mesh))


def as_base(run: RunConfig, model: Model) -> Model:
    """What was loaded as the base of `run`: with its remat setting, and stopping where it trains answers to end. ConfigError where the run's settings
    do not fit it."""
    if model.adapter is not None:
        require(
            METHODS[model.adapter.method].in_place != "none",
            f"model {run.model!r} is an export with {model.adapter.method} fused in; an adapter on top of it could not be fused. Train on its base.",
        )
    # An adapter merged by addition left an ordinary base.
    model = Model(model.config.replace(remat=run.train.remat), model.params, model.tokenizer, model.source)
    plan(model.config, run.adapter)  # targets that match nothing are refused here, before anything slow
    require_fit(run, model)
    return stop_as_trained(model, run.data.prompt_style)


def require_fit(run: RunConfig, model: Model) -> None:
    """ConfigError for a model without a tokenizer, or with less context than the longest of data.lengths."""
    require(
        model.tokenizer is not None,
        f"model {run.model!r} comes without a tokenizer, so text cannot be trained on; add its tokenizer files to the directory.",
    )
    longest, limit = max(run.data.lengths), model.config.max_position_embeddings
    require(longest <= limit, f"data.lengths goes up to {longest}, beyond the model's context of {limit}; leave out lengths above it.")


def _fresh_state(run: RunConfig, model: Model) -> TrainState:
    return init_state(init_adapters(jax.random.key(run.train.seed), model, run.adapter), run.optim, run.train.steps)


def load_run(workdir: str | Path, step: int | str | None = None) -> tuple[RunConfig, Model, Tree, int]:
    """(config, base model, adapters, finished steps) of a checkpoint of a run: the newest, that of `step`, or the "best" (train.keep_best).
    ConfigError if there is none, or it was trained on another base."""
    run = read_config(workdir)
    require((Path(workdir) / "checkpoints").is_dir(), f"{workdir} has no checkpoint yet; train it first.")
    model = load_base(run)
    with Checkpoints(workdir, create=False) as checkpoints:
        require(checkpoints.latest is not None, f"{workdir} has no complete checkpoint yet; train it first.")
        if step == "best":
            require(run.train.keep_best, f"{workdir} has no best checkpoint: train with train.keep_best=True, or name a step.")
            step = checkpoints.best
            require(step is not None, f"{workdir} has no checkpoint that was saved with its loss yet; name a step, or train on.")
        require(step is None or str(step).isdigit(), f"checkpoint {step!r}: expected a number of steps, or 'best'.")
        state, meta = checkpoints.restore(jax.eval_shape(lambda: _fresh_state(run, model)), None if step is None else int(step))
    _check_same(meta, "base", trees.fingerprint(model.params), workdir)
    return run, model, state.adapters, int(state.step)


def _check_same(meta: dict[str, Any], name: str, fingerprint: str, workdir: str | Path) -> None:
    if meta[f"{name}_fingerprint"] != fingerprint:
        there, here = meta[f"{name}_fingerprint"][:12], fingerprint[:12]
        raise ConfigError(f"{workdir} was trained on another {name}: fingerprint {there} there, {here} here. Restore it, or use another --workdir.")


def held_out(run: RunConfig, model: Model, split: str | None = None) -> tuple[Sequence[Example], Encoded]:
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
    """Train `run` in `workdir`, or go on with the run that is there; a finished run is loaded and said to be finished.

    workdir: None means runs/<task>-<method>. model: the run's base if it is loaded already (`load_base`). devices: what the mesh is
    made of, None for all. resume: refuse a workdir without a run.
    Every process of a run of several calls this (after `hosts.start`), with a workdir that they share. Writes config.json, checkpoints/,
    metrics.jsonl, starts.jsonl (the environment of every start), report.json, what train.report_to names and, unless one is in use already,
    compile_cache/ (see `cache.compile_cache`).

    Raises:
      ConfigError: settings that cannot be used, a `workdir` of another config, or one that another process is training.
      NonFiniteError: the loss stopped being a number; the last checkpoint is intact.
      Stopped: SIGTERM or SIGINT came; the state after the step that ran then is saved.
      SaveError: a checkpoint could not be written; the ones before it are intact.
    """
    started, env = time.perf_counter(), environment()  # the commit that runs, not the one checked out when it ends
    workdir = Path("runs") / f"{run.data.task}-{run.adapter.method}" if workdir is None else Path(workdir)
    require_installed(run.train.report_to)
    check_workdir(workdir, run)  # before anything slow; it is claimed once model, data and settings are known to be usable
    require(not resume or (workdir / "config.json").is_file(), f"{workdir} holds no run to resume. Leave out --resume to start one there.")
    mesh = make_mesh(run.mesh, devices)
    model = stop_as_trained(model or load_base(run, mesh), run.data.prompt_style)
    loaded = time.perf_counter()
    train_set = tokenize_examples(load_mixture(run.data, "train"), model.tokenizer, run.data, model.config.vocab_size)
    examples = len(train_set)
    if run.data.packing:
        train_set = pack(train_set, run.data.lengths[-1])
    _, eval_set = held_out(run, model)
    meta = {"base_fingerprint": trees.fingerprint(model.params), "data_fingerprint": train_set.fingerprint()}
    model = dataclasses.replace(model, params=shard(model.params, mesh))
    where = state_shardings(jax.eval_shape(lambda: _fresh_state(run, model)), mesh)
    hosts.on_main(lambda: claim(workdir, run))
    steps, every = run.train.steps, run.train
    step_fn = make_train_step(model.config, run.adapter, run.optim, steps, run.data.accumulate, run.train.loss_chunk, where)
    spent, final = 0.0, None  # seconds of earlier processes; the loss after the last step
    phases: dict[str, float | None] = {"load_seconds": loaded - started, "data_seconds": time.perf_counter() - loaded, "first_step_seconds": None}
    waited, trained_for = 0.0, 0.0  # seconds of the steps after the first one: of waiting for batches, and all

    def evaluate_loss(adapters: Tree) -> dict[str, float]:
        return held_out_loss(
            model, eval_set, run.data, adapter=run.adapter, adapters=adapters, batch_size=_micro_batch(run), chunk=run.train.loss_chunk
        )

    with ExitStack() as stack:
        stack.enter_context(compile_cache(workdir / "compile_cache"))
        signals = stack.enter_context(hosts.StopSignals())  # left last: until then the newest checkpoint may still be being written
        hosts.on_main(lambda: stack.enter_context(locked(workdir)))
        checkpoints = stack.enter_context(Checkpoints(workdir, every.keep, keep_best=every.keep_best))
        stack.enter_context(jax.set_mesh(mesh))
        state = _sharded_state(run, model, where)
        if checkpoints.latest is not None:
            state, saved = checkpoints.restore(state)
            for name in ("base", "data"):
                _check_same(saved, name, meta[f"{name}_fingerprint"], workdir)
            spent = saved["seconds"]
            finished = int(state.step) >= steps
            log.info(
                "%s %s", workdir, f"is finished ({steps} steps): nothing to train" if finished else f"resumes from step {int(state.step)} of {steps}"
            )
        first = int(state.step)
        shown, report_to = to_dict(run) | {"environment": env}, run.train.report_to if first < steps else ()
        writer = hosts.on_main(lambda: stack.enter_context(MetricWriter(workdir, steps, console, first, report_to, shown)))
        hosts.on_main(lambda: _record_start(workdir, first, env))
        clock = time.perf_counter()

        def on_metrics(step: int, metrics: dict[str, float]) -> None:
            nonlocal clock, waited, trained_for
            now = time.perf_counter()
            seconds, wait = max(now - clock, 1e-9), metrics.pop("wait_seconds")
            rate, clock = metrics["tokens"] / seconds, now
            if step == first + 1:
                phases["first_step_seconds"] = now - started  # the metrics come once the next step is on its way
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
            position = {"next_step": step, "data_seed": run.data.seed, "seconds": spent + time.perf_counter() - started}
            checkpoints.save(step, state, meta | position, loss)

        def on_due(step: int, state: TrainState) -> None:
            nonlocal clock, final
            loss = None
            if due(step, every.save_every) and not every.keep_best:  # first: evaluation takes time, and cannot be interrupted
                save(step, state)
            if due(step, every.eval_every):
                final = evaluate_loss(state.adapters)
                loss = final["loss"]
                if writer is not None:
                    writer.write(step, "eval", final)
            if due(step, every.save_every) and every.keep_best:
                save(step, state, loss)
            clock = time.perf_counter()

        def on_stop(step: int, state: TrainState) -> None:
            save(step, state)
            stack.close()  # what is being written is written before anyone is told that it is
            raise hosts.Stopped(
                f"stopped by a signal after step {step} of {steps}, which is saved in {workdir}; the same command goes on from there."
            )

        order: dict[int, int] = {}  # step -> what its batch was, for whoever compares the data of two runs

        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(train_batches(train_set, run.data, first, own_rows(run.data.batch_size, mesh)), first + 1):
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
        if final is None:  # a finished run was loaded
            final = evaluate_loss(state.adapters)
    report = {
        "method": run.adapter.method,
        "params_base": count_base(model.config),
        "params_trainable": count_params(model.config, run.adapter),
        "steps": int(state.step),
        "resumed_from": first,
        "train_rows": examples,
        "train_rows_dropped": train_set.dropped,
        "train_documents_cut": train_set.truncated,
        "train_rows_packed": len(train_set) if run.data.packing else None,
        "train_on_prompt": run.data.train_on_prompt,
        f"{run.eval.split}_loss": final["loss"],
        f"{run.eval.split}_rows": int(final["rows"]),
        "seconds": spent + (time.perf_counter() - started if first < steps else 0.0),
        **phases,
        "data_wait_share": waited / trained_for if trained_for else None,
        "processes": jax.process_count(),
        **meta,
        "config": to_dict(run),
        "environment": env,
    }
    if hosts.is_main():
        write_json(workdir / "report.json", report)
    return Trained(model, state.adapters, report)


def _sharded_state(run: RunConfig, model: Model, where: Any) -> TrainState:
    """The state before the first step, each device making its own part."""
    fresh = jax.jit(lambda params: _fresh_state(run, dataclasses.replace(model, params=params)), out_shardings=where)
    return fresh(model.params)


def _record_start(workdir: Path, step: int, env: dict[str, Any]) -> None:
    """Append a line to <workdir>/starts.jsonl: a run that is resumed may go on with other code, software or devices."""
    path = workdir / "starts.jsonl"
    earlier = path.read_bytes() if path.is_file() else b""
    atomic_write(path, earlier + json.dumps({"step": step} | plain(env)).encode() + b"\n")


def _micro_batch(run: RunConfig) -> int:
    return run.data.batch_size // run.data.accumulate


def load_fused(workdir: str | Path, step: int | str | None = None) -> tuple[Model, str]:
    """What `workdir` has trained (see `load_run`), fused, and a label for result files ("step120")."""
    run, model, adapters, step = load_run(workdir, step)
    return fuse(model, run.adapter, adapters), f"step{step}"


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    checkpoint: int | str | None = None,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """Export what `workdir` has trained to `out`: format "hf", a fused Hugging Face directory, or "peft", LoRA adapters. Returns what was written.
    dtype, eps_z: of "hf", as `save_hf` takes them.

    For "hf" the report says how far the export's logits are from the fused model's in float32, on held-out prompts: max and mean |dlogit|, and
    top-1 agreement.
    """
    run, model, adapters, step = load_run(workdir, checkpoint)
    if format == "peft":
        return save_peft(out, model, run.adapter, adapters)
    require(format == "hf", f"format={format!r}: {nearest(format, ('hf', 'peft'))}.")
    fused = fuse(model, run.adapter, adapters)
    card = {"task": run.data.task, "steps": step, "trainable parameters": count_params(model.config, run.adapter)}
    trained = json.loads(path.read_text(encoding="utf-8")) if (path := Path(workdir) / "report.json").is_file() else {}
    if trained.get("steps") == step and (loss := trained.get(f"{run.eval.split}_loss")) is not None:
        card[f"{run.eval.split} loss"] = loss
    report = save_hf(out, fused, dtype=dtype, base_fingerprint=trees.fingerprint(model.params), card=card, eps_z=eps_z)
    examples = fit_documents(load_mixture(run.data, run.eval.split, 8), model.tokenizer, run.data.prompt_style, run.data.lengths[-1])
    prompts = encode_prompts(examples, model.tokenizer, run.data.prompt_style)
    return report | export_gap(fused, out, prompts)


@contextmanager
def progress_bar(total: int, description: str, console: bool) -> Any:
    """A rich bar on stderr; yields advance(n). Without a terminal, or with console=False, nothing is drawn."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=not (console and screen.is_terminal), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)
