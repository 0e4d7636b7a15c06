"""The hooks of a run: stop at NaN, log metrics, trace, measure the held-out loss, save, stop on a
signal.

`loop.Hook` says when each method is called.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.parallel.targets import peak_flops
from zflora_jax.reporting.metrics import MetricWriter
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.clock import Clock
from zflora_jax.training.loop import Hook
from zflora_jax.training.objective import Objective
from zflora_jax.training.trainer import TrainState

log = logging.getLogger(__name__)


class RequireFinite(Hook):
    """Raises NonFiniteError if the loss, the gradient or the adapters are NaN or infinite. Put this
    hook first, so that nothing of such a step is logged or saved.
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
    objective: Objective
    flops: Callable[[Mapping[str, Any]], float]  # operations of the step of a batch
    clock: Clock
    _batches: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # see `on_batch`

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        # The checksum shows whether runs saw the same data. Tokens of other processes are
        # extrapolated from the rows of this one.
        rows = batch["tokens"]
        tokens = np.count_nonzero(batch["segments"]) * self.run.data.batch_size / len(rows)
        self._batches[step] = zlib.crc32(rows.tobytes()), tokens, self.flops(batch)

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        if self.clock.first_step_seconds is None:
            self.clock.first_step_seconds = self.clock.total() - self.clock.before
        checksum, tokens, flops = self._batches.pop(step)
        if self.writer is None:
            return
        epoch = step * self.run.data.batch_size / self.rows
        unit = self.objective.unit
        speed, learned = tokens / seconds, metrics[unit] / seconds
        means = "".join(f"  {x} {metrics[x]:.3f}" for x in self.objective.metrics)
        self.writer.progress(
            step,
            f"loss {metrics['loss']:.4f}{means}  lr {metrics['learning_rate']:.1e}"
            f"  grad norm {metrics['grad_norm']:.2f}  epoch {epoch:.2f}"
            f"  {speed:,.0f} tokens/s ({learned:,.0f} target {unit})",
        )
        if step % self.run.train.log_every == 0 or step in (1, self.run.steps):
            record = {name: value for name, value in metrics.items() if name != "finite"}
            record |= {"epoch": epoch, "tokens_per_s": speed, f"target_{unit}_per_s": learned}
            record |= self._of_devices(speed, flops / seconds)
            record |= {"seconds": self.clock.total(), "goodput": self.clock.goodput()}
            self.writer.write(step, "train", record | {"batch_crc32": checksum})

    def _of_devices(self, tokens: float, flops: float) -> dict[str, float]:
        """Rates of one device, as a share of its published peak too (MFU), and its peak memory."""
        device, count = jax.local_devices()[0], self.run.mesh.devices
        found = {"device_tokens_per_s": tokens / count, "device_flops_per_s": flops / count}
        if peak := peak_flops(device.device_kind):
            found["mfu"] = flops / count / peak
        memory = device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["peak_memory_bytes"] = memory["peak_bytes_in_use"]
        return found


@dataclass
class Profile(Hook):
    """Writes a trace of the steps in train.profile, for XProf and Perfetto."""

    steps: range
    folder: Path
    _traced: int = 0  # steps in the trace
    _running: bool = False

    @classmethod
    def of(cls, steps: str, workdir: Path) -> Profile:
        """The hook of train.profile."""
        start, count = map(int, steps.split(":"))
        return cls(range(start, start + count), workdir / "profile")

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        if step in self.steps and not self._running:
            self._running = True
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would fill a file's million events
            self._try(lambda: jax.profiler.start_trace(str(self.folder), profiler_options=options))

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        self._traced += step in self.steps
        if step == self.steps.stop - 1:
            self._stop()

    def close(self) -> None:
        """Ends a trace; warns if none of its steps was trained."""
        self._stop()
        if not self._traced:
            log.warning("train.profile: none of its steps was trained here, so nothing was traced")

    def _stop(self) -> None:
        if self._running:
            self._running = False
            self._try(jax.profiler.stop_trace)
            log.info("a trace of %d steps is in %s", self._traced, self.folder)

    def _try(self, action: Callable[[], None]) -> None:
        """Logs errors: a full disk must not end the training."""
        try:
            action()
        except Exception as error:
            log.warning("train.profile failed: %s", error)


@dataclass
class HeldOutLoss(Hook):
    """Measures and logs the held-out loss every train.eval_every steps, and at the end."""

    # (adapters, advance or None) -> {"loss": ..., ...}; calls advance(rows) for each batch
    evaluate: Callable[[Tree, Callable[[int], None] | None], dict[str, float]]
    rows: int  # number of rows that are evaluated
    writer: MetricWriter | None  # None in processes that write nothing
    run: RunConfig
    clock: Clock
    last: dict[str, float] = field(default_factory=dict)  # the result of the last evaluation

    def is_due(self, step: int, stopping: bool) -> bool:
        every, last = self.run.train.eval_every, self.run.steps
        return not stopping and (step == last or (every is not None and step % every == 0))

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        try:
            part = self.writer and self.writer.part(self.rows, "held-out loss")
            with self.clock.on("evaluation"), part or nullcontext() as advance:
                self.last = self.evaluate(state.adapters, advance)
        except NonFiniteError as error:
            saved, text = results.get("checkpoint"), f"after step {step} {error}"
            if saved:
                text += f" The checkpoint of step {step} is saved: remove {saved} to go back."
            raise NonFiniteError(text) from error
        results["loss"] = self.last["loss"]
        if self.writer is not None:
            self.writer.write(step, "eval", self.last)


@dataclass
class SaveCheckpoints(Hook):
    """Saves the state every train.save_every steps, at the end, and before the run stops early. The
    held-out loss is saved with it if an earlier hook has measured it.
    """

    checkpoints: Checkpoints
    run: RunConfig
    meta: Mapping[str, Any]  # saved with each state
    clock: Clock
    writer: MetricWriter | None = None  # its records are written before the state

    def is_due(self, step: int, stopping: bool) -> bool:
        every, last = self.run.train.save_every, self.run.steps
        return stopping or step == last or (every is not None and step % every == 0)

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        with self.clock.on("checkpoints"):
            if self.writer is not None:
                self.writer.sync()
            position = {"next_step": step, "seconds": self.clock.total()}
            meta = {**self.meta, **position, "spent": dict(self.clock.spent)}
            self.checkpoints.save(step, state, meta, results.get("loss"))
        results["checkpoint"] = self.checkpoints.folder / str(step)


@dataclass
class StopOnSignal(Hook):
    """Ends the run after the step in which one of its processes received SIGTERM or SIGINT."""

    signals: StopSignals

    def should_stop(self, step: int) -> bool:
        return self.signals.requested(step)
