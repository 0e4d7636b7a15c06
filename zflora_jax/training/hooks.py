"""The hooks of a run: stop at NaN, log metrics, measure the held-out loss, save, stop on a signal.

See `loop.Hook` for when each method is called.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.run_config import TrainConfig
from zflora_jax.core.trees import Tree
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.metrics import MetricWriter
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.loop import Hook, Timing
from zflora_jax.training.trainer import TrainState, non_finite


def is_due(step: int, period: int | None, steps: int) -> bool:
    """Whether `step` is a multiple of `period`, or the last of `steps`. With a period of None only
    the last step is due.
    """
    return step == steps or (period is not None and step % period == 0)


class RequireFinite(Hook):
    """End the run when the loss, the gradient or the adapters are NaN or infinite. Put this hook
    first, so that nothing of such a step is logged or saved.

    Raises:
      NonFiniteError: with the number of the step.
    """

    def on_metrics(self, step: int, metrics: Mapping[str, float], timing: Timing) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise non_finite(f"{name} is {metrics[name]} at step {step}")
        if not metrics["finite"]:
            raise non_finite(f"the adapters are NaN or infinite after the update of step {step}")


class LogMetrics(Hook):
    """Log every train.log_every-th step, show progress, and measure where the run spends its time.

    Args:
      writer: None in processes that write nothing.
      settings: of the run.
      started: time.perf_counter() at the start of the run.

    Attributes:
      timings: "first_step_seconds", the time from `started` until the metrics of the first step
        were there; "data_wait_share", the share of the time after the first step in which the
        device waited for batches. A value is None until it can be measured.
    """

    def __init__(self, writer: MetricWriter | None, settings: TrainConfig, started: float) -> None:
        self._writer, self._settings, self._started = writer, settings, started
        # By step, of batches whose metrics are not there yet.
        self._checksums: dict[int, int] = {}
        self._waited = self._trained = 0.0
        self.timings: dict[str, float | None] = {
            "first_step_seconds": None,
            "data_wait_share": None,
        }

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        # Shows whether two runs have seen the same data.
        self._checksums[step] = zlib.crc32(batch["tokens"].tobytes())

    def on_metrics(self, step: int, metrics: Mapping[str, float], timing: Timing) -> None:
        if self.timings["first_step_seconds"] is None:
            self.timings["first_step_seconds"] = time.perf_counter() - self._started
        else:
            self._waited += timing.waited
            self._trained += timing.seconds
            self.timings["data_wait_share"] = self._waited / self._trained
        checksum, rate = self._checksums.pop(step), metrics["tokens"] / timing.seconds
        if self._writer is None:
            return
        self._writer.progress(step, loss=metrics["loss"], tokens_per_s=rate)
        if step % self._settings.log_every == 0 or step in (1, self._settings.steps):
            numbers = {name: value for name, value in metrics.items() if name != "finite"}
            speed = {
                "target_tokens_per_s": rate,
                "data_wait_share": timing.waited / timing.seconds,
            }
            self._writer.write(step, "train", numbers | speed | {"batch_crc32": checksum})


class HeldOutLoss(Hook):
    """Measure and log the held-out loss every train.eval_every steps, and at the end.

    Args:
      evaluate: adapters -> {"loss": ..., "tokens": ..., "rows": ...}.
      writer: None in processes that write nothing.
      settings: of the run.

    Attributes:
      last: the result of the last evaluation.

    Raises:
      NonFiniteError: the loss is NaN or infinite; the message says whether the state is saved.
    """

    def __init__(
        self,
        evaluate: Callable[[Tree], dict[str, float]],
        writer: MetricWriter | None,
        settings: TrainConfig,
    ) -> None:
        self._evaluate, self._writer, self._settings = evaluate, writer, settings
        self.last: dict[str, float] = {}

    def is_due(self, step: int) -> bool:
        return is_due(step, self._settings.eval_every, self._settings.steps)

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        try:
            self.last = self._evaluate(state.adapters)
        except NonFiniteError as error:
            saved = (
                f"; the checkpoint of step {step} is saved: remove {results['checkpoint']} to go on"
                " from an earlier one"
                if "checkpoint" in results
                else ""
            )
            raise NonFiniteError(f"after step {step} {error}{saved}") from error
        results["loss"] = self.last["loss"]
        if self._writer is not None:
            self._writer.write(step, "eval", self.last)


class SaveCheckpoints(Hook):
    """Save the state every train.save_every steps, at the end, and before the run stops early.

    It saves the held-out loss with the state if an earlier hook put "loss" into the results of the
    step, and puts the folder there as "checkpoint".

    Args:
      checkpoints: where to save.
      settings: of the run.
      meta: saved beside each state.
      began: time.perf_counter() at the start of this process, minus the seconds that earlier
        processes of the run trained.
      writer: whose records of the steps so far have to be there before the checkpoint is.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: TrainConfig,
        meta: Mapping[str, Any],
        began: float,
        writer: MetricWriter | None = None,
    ) -> None:
        self._checkpoints, self._settings = checkpoints, settings
        self._meta, self._began, self._writer = meta, began, writer

    def is_due(self, step: int) -> bool:
        return is_due(step, self._settings.save_every, self._settings.steps)

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        self._save(step, state, results.get("loss"))
        results["checkpoint"] = self._checkpoints.folder / str(step)

    def on_stop(self, step: int, state: TrainState) -> None:
        self._save(step, state, None)

    def _save(self, step: int, state: TrainState, loss: float | None) -> None:
        if self._writer is not None:
            self._writer.sync()
        position = {"next_step": step, "seconds": time.perf_counter() - self._began}
        self._checkpoints.save(step, state, {**self._meta, **position}, loss)


class StopOnSignal(Hook):
    """End the run after the step during which a process of the run received SIGTERM or SIGINT."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def should_stop(self, step: int) -> bool:
        return self._signals.requested(step)
