"""The training loop, and the protocol of the hooks that it calls.

The loop knows nothing of files: saving, evaluation and logging are hooks, see `hooks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from zflora_jax.core.trees import Tree
from zflora_jax.training.objective import Batch
from zflora_jax.training.trainer import Metrics, StepFn, TrainState


class Timing(NamedTuple):
    """Where the time of a step went, in seconds of wall time.

    Attributes:
      seconds: since the metrics of the step before, without the time of `Hook.on_state`.
      waited: the part of it in which the device had nothing to do until a batch was there.
    """

    seconds: float
    waited: float


class Hook:
    """A thing that a run does beside its steps. A subclass overrides the methods that it needs.

    The loop calls the hooks in their order. For step n:

        on_batch(n, batch)            before the step
        on_metrics(n, ...)            when its numbers are there, while step n + 1 runs
        on_state(n, state, results)   after the step and on_metrics(n), if the hook is_due(n)
        on_stop(n, state)             instead of on_state, if any hook should_stop(n)
    """

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        """See the `batch` of `step` before it: numpy arrays [B, T], the rows of this process."""

    def on_metrics(self, step: int, metrics: Mapping[str, float], timing: Timing) -> None:
        """See the `metrics` of `step` (`trainer.make_train_step`). Called once for every step."""

    def is_due(self, step: int) -> bool:
        """Whether this hook wants the state after `step`."""
        return False

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        """Use the state after `step`. The next step overwrites its buffers: nothing may keep them.

        results: what the hooks before this one found out about the state, by name; a hook adds its
        own.
        """

    def should_stop(self, step: int) -> bool:
        """Whether training ends after `step`. Called once for every step."""
        return False

    def on_stop(self, step: int, state: TrainState) -> None:
        """Prepare for training to end early, after `step`."""


def fit(
    step_fn: StepFn,
    params: Tree,
    state: TrainState,
    batches: Iterator[Mapping[str, Any]],
    steps: int,
    hooks: Sequence[Hook] = (),
    place: Callable[[Mapping[str, Any]], Batch] = lambda batch: batch,
) -> TrainState:
    """Train from `state` until `steps` steps are finished, or a hook stops.

    A step is started before the metrics of the step before it are fetched, so that the device does
    not wait for the host.

    Args:
      step_fn: (params, state, batch) -> (state, metrics), as of `trainer.make_train_step`.
      params: the frozen base.
      state: where to begin; its buffers are given away.
      batches: of the steps after state.step, on the host.
      steps: number of finished steps to reach, those before `state` included.
      hooks: what is called beside the steps, in this order.
      place: puts a batch on the devices.

    Returns:
      The state after the last step; state.step is below `steps` if a hook stopped.
    """
    pending, clock, waited = None, time.perf_counter(), 0.0
    for step in range(int(state.step) + 1, steps + 1):
        asked = time.perf_counter()
        host_batch = next(batches)
        for hook in hooks:
            hook.on_batch(step, host_batch)
        batch = place(host_batch)
        # Count the wait only if the device had finished the previous step.
        if pending is None or pending[1]["loss"].is_ready():  # type: ignore[attr-defined]
            waited += time.perf_counter() - asked
        state, metrics = step_fn(params, state, batch)
        if pending is not None:
            clock, waited = _report(hooks, *pending, clock, waited), 0.0
        pending = step, metrics
        # Not any(generator): with several processes every hook asks the others at every step.
        stopping = any([hook.should_stop(step) for hook in hooks]) and step < steps
        due = [hook for hook in hooks if hook.is_due(step)]
        if stopping or due:
            clock, waited = _report(hooks, *pending, clock, waited), 0.0
            pending = None
        if stopping:  # before anything that takes time: who asked may not wait long
            for hook in hooks:
                hook.on_stop(step, state)
            break
        if due:
            results: dict[str, Any] = {}
            for hook in due:
                hook.on_state(step, state, results)
            clock = time.perf_counter()
    if pending is not None:
        _report(hooks, *pending, clock, waited)
    return state


def _report(
    hooks: Sequence[Hook], step: int, arrays: Metrics, clock: float, waited: float
) -> float:
    """Give the metrics of `step` to the hooks. Returns the time at which they were there: `clock`
    for the next step.
    """
    metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
    now = time.perf_counter()
    timing = Timing(max(now - clock, 1e-9), waited)
    for hook in hooks:
        hook.on_metrics(step, metrics, timing)
    return now
