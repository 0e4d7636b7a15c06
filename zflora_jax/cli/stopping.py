"""Clean exit on SIGTERM of commands that write no checkpoints."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """Lets SIGTERM raise SystemExit, so that half-written files are removed. Outside the main
    thread Python has no signals, and JAX handles those of processes that it connects.
    """
    from jax.distributed import is_initialized

    def leave(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # another one must not cut a line
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread() or is_initialized():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
