"""Runs that train together: one program makes the steps of all over one frozen base.

Each run keeps its loop, hooks and files, in a thread of its own. The threads take turns: one works
until it asks for its next step, and when all have asked, one call makes the steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

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


class Group:
    """Runs whose steps are made together, as long as they are of one program: settings may differ
    in seeds, learning rate and rows. A run that ends, for whatever reason, leaves the others.
    """

    def __init__(self, size: int):
        self.size = size  # number of runs
        self._left = size
        self._asks: list[_Ask] = []
        self._turn = threading.Condition()  # held by the thread that works

    def each(self, runs: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Calls `size` functions, which train with this group; returns their results or errors."""
        found: list[Any] = [None] * len(runs)

        def call(number: int) -> None:
            with self._turn:
                try:
                    found[number] = runs[number]()
                except Exception as error:
                    found[number] = error
                self._left -= 1
                self._make_if_all_ask()

        if self.size == 1:
            call(0)
            return found
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(runs))]
        with StopSignals():  # the threads get none
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return found

    def step_of(self, run: RunConfig, config: LlamaConfig, state_sharding: Any = None) -> StepFn:
        """As `trainer.step_of`, a step that is made together with those of the other runs."""
        if self.size == 1:
            return step_of(run, config, state_sharding)
        own = TrainStep.of(run, config)

        def step(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            ask = _Ask(own, state_sharding, params, state, batch)
            self._asks.append(ask)
            self._make_if_all_ask()
            self._turn.wait_for(ask.made.done)
            return ask.made.result()

        return step

    def _make_if_all_ask(self) -> None:
        if len(self._asks) < self._left:
            return
        asks, self._asks = self._asks, []
        same: dict[Any, list[_Ask]] = {}
        for ask in asks:
            shapes = tuple((name, x.shape) for name, x in sorted(ask.batch.items()))
            leaves = tuple(map(id, jax.tree.leaves(ask.params)))
            same.setdefault((ask.step.divided()[0], shapes, leaves), []).append(ask)
        for part in same.values():
            steps, states, batches = zip(*((x.step, x.state, x.batch) for x in part), strict=True)
            try:
                where, base = part[0].state_sharding, part[0].params
                made = make_steps(steps, where, base, states, batches)
            except Exception as error:
                for ask in part:
                    ask.made.set_exception(error)
            else:
                for ask, one in zip(part, made, strict=True):
                    ask.made.set_result(one)
        self._turn.notify_all()
