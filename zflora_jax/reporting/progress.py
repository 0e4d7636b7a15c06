"""A progress bar on the terminal."""

from __future__ import annotations

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
