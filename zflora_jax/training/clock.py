"""The time of a run over all its starts, and its uses other than steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """Seconds of a run, over all its starts."""

    started: float  # time.perf_counter() at this start
    before: float = 0.0  # seconds of earlier starts, until the checkpoint that this one continues
    # Seconds by use: "start" (until the first step), "compile", "evaluation", "checkpoints", and
    # "repeated", the work of killed starts after their last checkpoint. "data" is the wait for
    # batches, during which a device may still run the step before.
    spent: dict[str, float] = field(default_factory=dict)
    first_step_seconds: float | None = None  # from this start until a step's metrics were there

    def total(self) -> float:
        """Seconds of the run, without those that were "repeated"."""
        return self.before + time.perf_counter() - self.started

    def goodput(self) -> float:
        """The share of the run's seconds, "repeated" ones included, that its steps took."""
        total = self.total() + self.spent.get("repeated", 0.0)
        return 1 - (sum(self.spent.values()) - self.spent.get("data", 0.0)) / total

    def report(self) -> dict[str, Any]:
        """All of these values, under their names in the report."""
        share, total = self.goodput(), self.total()
        found = {"seconds": total, "spent_seconds": dict(self.spent), "goodput": share}
        return found | {"first_step_seconds": self.first_step_seconds}

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds that no step took."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Counts the time of a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)
