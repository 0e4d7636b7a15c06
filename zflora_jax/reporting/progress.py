"""Progress on the terminal: a bar, or lines without a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

EVERY = 10.0  # seconds between lines, where there is no terminal to show a bar
LONG = 3.0  # seconds after which `announced` prints


@contextmanager
def progress_bar(total: int, description: str, console: bool) -> Iterator[Callable[[int], None]]:
    """Shows progress of `total` steps on stderr, if `console` is set: a bar on a terminal, else a
    line at most every 10 seconds. Yields advance(n), which adds n steps.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    screen = Console(stderr=True)
    if not (console and screen.is_terminal):
        yield _lines(total, description, _out()) if console else lambda n: None
        return
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def _out() -> TextIO:
    """stderr, separate from results; but in a notebook stdout, as stderr looks like an error."""
    from rich.console import Console

    return sys.stdout if Console().is_jupyter else sys.stderr


def _lines(total: int, description: str, out: TextIO) -> Callable[[int], None]:
    done, shown = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, shown
        done += n
        if (now := time.monotonic()) - shown >= EVERY:
            shown = now
            print(f"{description} {done}/{total}", file=out, flush=True)

    return advance


@contextmanager
def announced(text: str, console: bool = True) -> Iterator[None]:
    """Prints `text` on stderr, if `console` is set, as soon as the block has taken 3 seconds."""
    timer = threading.Timer(LONG, lambda: print(text, file=_out(), flush=True))
    timer.daemon = True
    if console:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TrainingProgress:
    """Shows steps, a text and the remaining time of a run of `total` steps, of which `start` are
    done: a bar on a terminal; elsewhere lines for the first, every `every`-th and the last step.
    """

    def __init__(self, total: int, start: int, every: int = 1) -> None:
        self._total, self._every = total, every
        self._first: tuple[int, float] | None = None
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich import progress as rich

            steps = "{task.description}", rich.MofNCompleteColumn(), rich.BarColumn()
            times = rich.TimeElapsedColumn(), "ETA", rich.TimeRemainingColumn()
            self._bar, self._text = rich.Progress(*steps, *times), ""
            # The text has a separate line: next to the bar it does not fit in 80 columns.
            rows = self._bar.get_renderables
            self._bar.get_renderables = lambda: [*rows(), self._text]
            self._task = self._bar.add_task("step", total=total, completed=start)
            self._bar.start()

    def update(self, step: int, text: str) -> None:
        """Shows that `step` steps are complete."""
        if self._bar is not None:
            self._text = text
            self._bar.update(self._task, completed=step)
            return
        now = time.monotonic()
        # Speed is measured from the first update on: the steps before it include compilation.
        first, began = self._first = self._first or (step, now)
        if step not in (first, self._total) and step % self._every:
            return
        parts = [f"step {step}/{self._total}", text]
        if step > first:
            left = (now - began) / (step - first) * (self._total - step)
            parts.append(f"ETA {timedelta(seconds=round(left))}")
        print("  ".join(parts), flush=True)

    @contextmanager
    def part(self, total: int, description: str) -> Iterator[Callable[[int], None]]:
        """`progress_bar` of `total` steps of other work between two steps of training."""
        if self._bar is None:
            yield _lines(total, description, sys.stdout)
            return
        task = self._bar.add_task(description, total=total)
        yield lambda n: self._bar.advance(task, n)
        self._bar.remove_task(task)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()
