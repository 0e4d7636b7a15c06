"""Runs that train together: one program makes the steps of all over one frozen base. Each run has a
thread with its loop, hooks and files. One thread works at a time, until it asks for a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

from zflora_jax.core.errors import Preempted
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.training.objective import Batch
from zflora_jax.training.trainer import Metrics, StepFn, TrainState, TrainStep, make_steps, step_of

T = TypeVar("T")


@dataclass
class _Ask:
    """A step that a run waits for."""

    step: TrainStep
    state_sharding: Any
    params: Tree
    state: TrainState
    batch: Batch
    made: Future[tuple[TrainState, Metrics]] = field(default_factory=Future)

    @property
    def program(self) -> Any:
        """Returns a key, equal for steps that one call can make."""
        shapes = tuple((name, x.shape) for name, x in sorted(self.batch.items()))
        return self.step.divided()[0], shapes, *map(id, jax.tree.leaves(self.params))


class Group:
    """Runs of one program with different seeds, learning rates and rows. A run may end early."""

    def __init__(self, size: int):
        self.size = self._left = size  # number of runs, and of those that have not ended
        self._asks: list[_Ask] = []
        self._seen: dict[int, list[float]] = {}  # id of metrics -> when runs saw those of a call
        self._turn = threading.Condition()  # held by the thread that works

    def each(self, runs: Sequence[Callable[[], T]]) -> list[T | BaseException]:
        """Calls the runs, which train with this group; returns their results or errors."""
        found: list[Any] = [None] * self.size

        def call(number: int) -> None:
            with self._turn:
                try:
                    found[number] = runs[number]()
                except BaseException as error:
                    found[number] = error
                self._left -= 1
                self._turn.notify_all()

        if self.size == 1:
            call(0)
            return found
        threads = [threading.Thread(target=call, args=(i,)) for i in range(self.size)]
        with StopSignals() as signals:  # the threads get none
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # signals to other threads do not wake it
        if signals.asked and not any(isinstance(x, Preempted) for x in found):
            raise Preempted("stopped by a signal; the same command resumes it.")
        return found

    def step_of(self, run: RunConfig, config: LlamaConfig, state_sharding: Any = None) -> StepFn:
        """The step of `trainer.step_of`, made together with those of the other runs."""
        if self.size == 1:
            return step_of(run, config, state_sharding)
        own = TrainStep.of(run, config)

        def step(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            ask = _Ask(own, state_sharding, params, state, batch)
            self._asks.append(ask)
            while not ask.made.done():
                if len(self._asks) < self._left:
                    self._turn.wait()
                else:  # in a thread whose run trains: it has the runs' mesh
                    self._make()
            return ask.made.result()

        return step

    def now(self, metrics: Metrics) -> float:
        """The time when the first run saw metrics of this call; others wait for their turn."""
        (times := self._seen.pop(id(metrics), [])).append(time.perf_counter())
        return times[0]

    def _make(self) -> None:
        """Makes the steps waited for."""
        asks, self._asks, times = self._asks, [], list[float]()
        try:
            same: dict[Any, list[_Ask]] = {}
            for ask in asks:
                same.setdefault(ask.program, []).append(ask)
            for part in same.values():
                first, names = part[0], ("step", "state", "batch")
                steps, states, batches = ([getattr(x, name) for x in part] for name in names)
                made = make_steps(steps, first.state_sharding, first.params, states, batches)
                for ask, one in zip(part, made, strict=True):
                    self._seen[id(one[1])] = times
                    ask.made.set_result(one)
        except BaseException as error:
            for ask in asks:
                if not ask.made.done():
                    ask.made.set_exception(error)
        self._turn.notify_all()
