"""The hooks of a run: stop at NaN, log metrics, measure the held-out loss, save, stop on a signal.

`loop.Hook` says when each method is called.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.metrics import MetricWriter
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.loop import Hook
from zflora_jax.training.trainer import TrainState


class RequireFinite(Hook):
    """NonFiniteError when the loss, the gradient or the adapters are NaN or infinite. Put this hook
    first, so that nothing of such a step is logged or saved.
    """

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        if wrong or not metrics["finite"]:
            what = (
                f"{wrong[0]} is {metrics[wrong[0]]}" if wrong else "an adapter is NaN or infinite"
            )
            raise NonFiniteError(
                f"{what} at step {step}; training stopped, and nothing of this step is saved. Try a"
                " lower learning rate, or float32 instead of bfloat16."
            )


@dataclass
class LogMetrics(Hook):
    """Logs every train.log_every-th step, and shows progress."""

    writer: MetricWriter | None  # None in processes that write nothing
    run: RunConfig
    rows: int  # of an epoch
    unit: str  # what the loss is a mean over, see `Objective.unit`
    started: float  # time.perf_counter() at the start of the run
    first_step_seconds: float | None = None  # from `started` until its metrics were there
    _batches: dict[int, tuple[int, float]] = field(default_factory=dict)  # see `on_batch`

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        # The checksum shows whether two runs have seen the same data. Of several processes, the
        # rows of this one stand for all in the number of tokens.
        rows = batch["tokens"]
        tokens = np.count_nonzero(batch["segments"]) * self.run.data.batch_size / len(rows)
        self._batches[step] = zlib.crc32(rows.tobytes()), tokens

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        if self.first_step_seconds is None:
            self.first_step_seconds = time.perf_counter() - self.started
        checksum, tokens = self._batches.pop(step)
        if self.writer is None:
            return
        epoch = step * self.run.data.batch_size / self.rows
        speed, learned = tokens / seconds, metrics[self.unit] / seconds
        self.writer.progress(
            step,
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.1e}"
            f"  grad norm {metrics['grad_norm']:.2f}  epoch {epoch:.2f}"
            f"  {speed:,.0f} tokens/s ({learned:,.0f} target {self.unit})",
        )
        if step % self.run.train.log_every == 0 or step in (1, self.run.steps):
            record = {name: value for name, value in metrics.items() if name != "finite"}
            record |= {"epoch": epoch, "tokens_per_s": speed, f"target_{self.unit}_per_s": learned}
            self.writer.write(step, "train", record | {"batch_crc32": checksum})


@dataclass
class HeldOutLoss(Hook):
    """Measures and logs the held-out loss every train.eval_every steps, and at the end."""

    # (adapters, advance, which is told the rows of each batch, or None) -> {"loss": ..., ...}
    evaluate: Callable[[Tree, Callable[[int], None] | None], dict[str, float]]
    rows: int  # that are evaluated
    writer: MetricWriter | None  # None in processes that write nothing
    run: RunConfig
    last: dict[str, float] = field(default_factory=dict)  # the result of the last evaluation

    def is_due(self, step: int, stopping: bool) -> bool:
        every, last = self.run.train.eval_every, self.run.steps
        return not stopping and (step == last or (every is not None and step % every == 0))

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        try:
            part = self.writer and self.writer.part(self.rows, "held-out loss")
            with part or nullcontext() as advance:
                self.last = self.evaluate(state.adapters, advance)
        except NonFiniteError as error:
            saved, text = results.get("checkpoint"), f"after step {step} {error}"
            if saved:
                text += f" The checkpoint of step {step} is saved: remove {saved} to go on earlier."
            raise NonFiniteError(text) from error
        results["loss"] = self.last["loss"]
        if self.writer is not None:
            self.writer.write(step, "eval", self.last)


@dataclass
class SaveCheckpoints(Hook):
    """Saves the state every train.save_every steps, at the end, and before the run stops early;
    with its held-out loss, if an earlier hook has measured that.
    """

    checkpoints: Checkpoints
    run: RunConfig
    meta: Mapping[str, Any]  # saved with each state
    # time.perf_counter() at the start, minus the seconds that earlier processes of the run trained.
    began: float
    writer: MetricWriter | None = None  # its records must be there before the checkpoint is

    def is_due(self, step: int, stopping: bool) -> bool:
        every, last = self.run.train.save_every, self.run.steps
        return stopping or step == last or (every is not None and step % every == 0)

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.sync()
        position = {"next_step": step, "seconds": time.perf_counter() - self.began}
        self.checkpoints.save(step, state, {**self.meta, **position}, results.get("loss"))
        results["checkpoint"] = self.checkpoints.folder / str(step)


@dataclass
class StopOnSignal(Hook):
    """Ends the run after the step during which a process of the run received SIGTERM or SIGINT."""

    signals: StopSignals

    def should_stop(self, step: int) -> bool:
        return self.signals.requested(step)
