"""How a command that writes no checkpoints ends on SIGTERM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt, once the program
    that runs has ended: what is half done is cleared away. Not outside the main thread, where
    Python has no signals, nor among processes that JAX connects, which takes SIGTERM itself.
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
