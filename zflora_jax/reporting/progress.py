"""Progress on the terminal: a bar, or lines where there is none."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


@contextmanager
def progress_bar(total: int, description: str, console: bool) -> Any:
    """A progress bar of `total` steps on stderr, if `console` is set and that is a terminal. Yields
    advance(n), which moves it on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    screen = Console(stderr=True)
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not (console and screen.is_terminal)
    with Progress(*columns, console=screen, disable=hidden, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


class TrainingProgress:
    """Steps, a text and the remaining time of a run of `total` steps, of which `start` are done: a
    live bar on a terminal; elsewhere a line at most every 10 seconds, and one for the last step.
    """

    EVERY = 10.0

    def __init__(self, total: int, start: int) -> None:
        self._total, self._printed = total, -self.EVERY
        self._first: tuple[int, float] | None = None
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich import progress as rich

            done, left = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
            steps = "step", rich.MofNCompleteColumn(), rich.BarColumn()
            self._bar = rich.Progress(*steps, "{task.fields[text]}", done, "ETA", left)
            self._task = self._bar.add_task("", total=total, completed=start, text="")
            self._bar.start()

    def update(self, step: int, text: str) -> None:
        """Shows that `step` steps are complete."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        # Speed is measured from the first update on: the steps before it include compilation.
        first, began = self._first = self._first or (step, now)
        if step < self._total and now - self._printed < self.EVERY:
            return
        self._printed = now
        parts = [f"step {step}/{self._total}", text]
        if step > first:
            left = (now - began) / (step - first) * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()
