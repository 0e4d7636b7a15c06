"""The training loop, and the protocol of the hooks that it calls.

The loop knows nothing of files: saving, evaluation and logging are hooks, see `hooks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from zflora_jax.core.trees import Tree
from zflora_jax.training.objective import Batch
from zflora_jax.training.trainer import Metrics, StepFn, TrainState


class Hook:
    """A run's work next to its steps. A subclass overrides the methods that it needs.

    The loop calls the hooks in their order. For step n:

        on_batch(n, batch)            before the step
        on_metrics(n, ...)            when its metrics are there, while step n + 1 runs
        on_state(n, state, results)   after the step and on_metrics(n), if the hook is_due(n, ...)
    """

    def on_batch(self, step: int, batch: Mapping[str, Any]) -> None:
        """Sees the `batch` of `step` before it: numpy arrays, the rows of this process."""

    def on_metrics(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Sees the metrics of `step` (`trainer.TrainStep`). Called once for every step. seconds:
        Wall time since the metrics of the step before, without the time of `on_state`.
        """

    def should_stop(self, step: int) -> bool:
        """Returns whether training ends after `step`. Called once for every step."""
        return False

    def is_due(self, step: int, stopping: bool) -> bool:
        """True if this hook wants the state after `step`; `stopping`: training ends early there."""
        return False

    def on_state(self, step: int, state: TrainState, results: dict[str, Any]) -> None:
        """Uses the state after `step`. The next step overwrites its buffers: nothing may keep them.
        results: Results of the hooks before this one, by name; a hook adds its own.
        """


def fit(
    step_fn: StepFn,
    params: Tree,
    state: TrainState,
    batches: Iterator[Mapping[str, Any]],
    steps: int,
    hooks: Sequence[Hook] = (),
    place: Callable[[Mapping[str, Any]], Batch] = lambda batch: batch,
    now: Callable[[Metrics], float] = lambda metrics: time.perf_counter(),
) -> TrainState:
    """Trains from `state` until `steps` steps are finished, or a hook stops.

    A step is started before the metrics of the step before it are fetched, so that the device does
    not wait for the host.

    Args:
      step_fn: Function (params, state, batch) -> (state, metrics), see `trainer.TrainStep.jitted`.
      params: The frozen base.
      state: The first state; its buffers are donated.
      batches: The batches of the steps after state.step, on the host.
      steps: Number of finished steps to reach, including those before `state`.
      hooks: Hooks, called in this order.
      place: Function that puts a batch on the devices.
      now: Function called when metrics arrive; returns the time of their arrival.

    Returns:
      The state after the last step; state.step is below `steps` if a hook stopped.
    """
    pending, clock, report = None, time.perf_counter(), partial(_report, hooks, now)
    for step in range(int(state.step) + 1, steps + 1):
        batch = next(batches)
        for hook in hooks:
            hook.on_batch(step, batch)
        state, metrics = step_fn(params, state, place(batch))
        if pending is not None:
            clock = report(*pending, clock)
        pending = step, metrics
        # Not any(generator): with several processes every hook asks the others at every step.
        stopping = any([hook.should_stop(step) for hook in hooks]) and step < steps
        due = [hook for hook in hooks if hook.is_due(step, stopping)]
        if due or stopping:
            clock, pending = report(*pending, clock), None
        results: dict[str, Any] = {}
        for hook in due:
            hook.on_state(step, state, results)
        if stopping:
            return state
        clock = time.perf_counter() if due else clock
    if pending is not None:
        report(*pending, clock)
    return state


def _report(hooks: Any, now: Any, step: int, arrays: Metrics, clock: float) -> float:
    """Gives the metrics of `step` to the hooks. Returns their time of arrival, the next `clock`."""
    metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
    there = now(arrays)
    for hook in hooks:
        hook.on_metrics(step, metrics, max(there - clock, 1e-9))
    return there
