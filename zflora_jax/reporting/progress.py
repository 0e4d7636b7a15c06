"""Progress on the terminal: a bar, or lines where there is none."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, description: str, console: bool) -> Any:
    """A progress bar on stderr.

    Args:
      total: number of steps.
      description: its text.
      console: whether it is drawn; never without a terminal.

    Yields:
      advance(n), which moves it on.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    screen = Console(stderr=True)
    with Progress(
        *columns, console=screen, disable=not (console and screen.is_terminal), transient=True
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def training_progress(total: int, start: int) -> _Bar | _Lines:
    """Progress of training, of which `start` of `total` steps are done: a bar on a terminal, lines
    elsewhere.
    """
    return _Bar(total, start) if sys.stdout.isatty() else _Lines(total, start)


def _describe(loss: float | None, tokens_per_s: float | None) -> str:
    parts = ([] if loss is None else [f"loss {loss:.4f}"]) + (
        [] if tokens_per_s is None else [f"{tokens_per_s:,.0f} tokens/s"]
    )
    return "  ".join(parts)


class _Bar:
    """A live bar: steps, loss, tokens/s, elapsed and remaining time."""

    def __init__(self, total: int, start: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
        )
        self._rich = Progress(*columns, TimeRemainingColumn())
        self._task = self._rich.add_task("", total=total, completed=start, info="")
        self._rich.start()

    def update(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        self._rich.update(self._task, completed=step, info=_describe(loss, tokens_per_s))

    def close(self) -> None:
        self._rich.stop()


class _Lines:
    """The same for logs and pipes: a line at most every `every` seconds, and one for the last
    step.
    """

    def __init__(self, total: int, start: int, every: float = 10.0) -> None:
        self._total, self._every = total, every
        self._printed = -every
        self._first: tuple[int, float] | None = None

    def update(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        now = time.monotonic()
        if self._first is None:
            # Speed is measured from here on: the steps before it include compilation.
            self._first = step, now
        if step < self._total and now - self._printed < self._every:
            return
        self._printed = now
        done, seconds = step - self._first[0], now - self._first[1]
        left = f"ETA {_clock(seconds / done * (self._total - step))}" if done > 0 else ""
        parts = (f"step {step}/{self._total}", _describe(loss, tokens_per_s), left)
        print("  ".join(p for p in parts if p), flush=True)

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
