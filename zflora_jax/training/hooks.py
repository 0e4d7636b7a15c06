"""The hooks of a run: stop at NaN, log metrics, measure the held-out loss, save, stop on a signal.

`loop.Hook` says when each method is called.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.run_config import TrainConfig
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
                f"{what} at step {step}; training stopped, the last checkpoint is from an earlier"
                " step and intact. Try a lower learning rate, or float32 instead of bfloat16."
            )


@dataclass
class LogMetrics(Hook):
    """Logs every train.log_every-th step, and shows progress."""

    writer: MetricWriter | None  # None in processes that write nothing
    settings: TrainConfig
    unit: str  # what speed counts, see `Objective.unit`
    started: float  # time.perf_counter() at the start of the run
    first_step_seconds: float | None = None  # from `started` until its metrics were there
    _checksums: dict[int, int] = field(default_factory=dict)  # by step, until its metrics are there

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        # Shows whether two runs have seen the same data.
        self._checksums[step] = zlib.crc32(batch["tokens"].tobytes())

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        if self.first_step_seconds is None:
            self.first_step_seconds = time.perf_counter() - self.started
        checksum, rate = self._checksums.pop(step), metrics[self.unit] / seconds
        if self.writer is None:
            return
        self.writer.progress(step, f"loss {metrics['loss']:.4f}  {rate:,.0f} {self.unit}/s")
        if step % self.settings.log_every == 0 or step in (1, self.settings.steps):
            record = {name: value for name, value in metrics.items() if name != "finite"}
            more = {f"target_{self.unit}_per_s": rate, "batch_crc32": checksum}
            self.writer.write(step, "train", record | more)


@dataclass
class HeldOutLoss(Hook):
    """Measures and logs the held-out loss every train.eval_every steps, and at the end."""

    evaluate: Callable[[Tree], dict[str, float]]  # adapters -> {"loss": ..., ...}
    writer: MetricWriter | None  # None in processes that write nothing
    settings: TrainConfig
    last: dict[str, float] = field(default_factory=dict)  # the result of the last evaluation

    def is_due(self, step: int, stopping: bool) -> bool:
        every, last = self.settings.eval_every, self.settings.steps
        return not stopping and (step == last or (every is not None and step % every == 0))

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        try:
            self.last = self.evaluate(state.adapters)
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
    settings: TrainConfig
    meta: Mapping[str, Any]  # saved with each state
    # time.perf_counter() at the start, minus the seconds that earlier processes of the run trained.
    began: float
    writer: MetricWriter | None = None  # its records must be there before the checkpoint is

    def is_due(self, step: int, stopping: bool) -> bool:
        every, last = self.settings.save_every, self.settings.steps
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
