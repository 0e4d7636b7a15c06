"""Lets requests of one task at a time into an engine, and changes the task when none runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

log = logging.getLogger("vllm.zflora")  # vLLM shows only its loggers


class SwitchError(RuntimeError):
    """A task could not be written; the one before it is still active."""


class BrokenError(RuntimeError):
    """The active weights are unknown: the engine must not be used."""


@dataclass
class Waiter:
    """A waiting request."""

    task: str
    since: float
    admitted: asyncio.Future[None] = field(repr=False)


class Gate:
    """Requests of the current task pass. A request of another task waits until running requests
    have ended. Once it has waited `patience` seconds, no request of the current task overtakes it.
    So it waits at most for its patience and for the requests and switches before it.

    Args:
      switch: Writes a task; raises SwitchError if the old one is still active, and any other error
        if the weights are unknown. At first the task "" is active.
      patience: Seconds for which requests of the current task may overtake one of another.
    """

    def __init__(self, switch: Callable[[str], Awaitable[None]], patience: float = 0.25) -> None:
        self.task, self.patience, self.running, self.switches = "", patience, 0, 0
        self.broken = ""
        self._switch, self._waiting = switch, deque[Waiter]()
        self._change: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def using(self, task: str) -> AsyncIterator[None]:
        """Context of a request of a task, see `enter`."""
        await self.enter(task)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Ends a request that `enter` let in."""
        self.running -= 1
        self._advance()

    async def enter(self, task: str) -> None:
        """Waits until a request of a task may run; it may run until `leave`. If this call is
        cancelled, the request leaves the queue.

        Raises:
          SwitchError: The task could not be written.
          BrokenError: The weights are unknown.
        """
        if self.broken:
            raise BrokenError(self.broken)
        if task == self.task and self._change is None and not self._oldest_is_impatient():
            self.running += 1
            return
        loop = asyncio.get_running_loop()
        waiter = Waiter(task, time.monotonic(), loop.create_future())
        self._waiting.append(waiter)
        self._advance()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
                self.running -= 1  # it was let in, and left at once
            self._advance()
            raise

    def _oldest_is_impatient(self) -> bool:
        others = (w for w in self._waiting if w.task != self.task)
        first = next(others, None)
        return first is not None and time.monotonic() - first.since >= self.patience

    def _advance(self) -> None:
        """Lets in requests of the current task; if none runs, begins the next change."""
        if self._change is not None or self.broken:
            return
        if not self._oldest_is_impatient():
            self._admit()
        if self.running == 0 and self._waiting:
            self._change = asyncio.ensure_future(self._changed(self._waiting[0].task))

    def _admit(self) -> None:
        """Lets in all requests of the current task."""
        for waiter in [w for w in self._waiting if w.task == self.task]:
            self._waiting.remove(waiter)
            if not waiter.admitted.done():
                self.running += 1
                waiter.admitted.set_result(None)

    async def _changed(self, task: str) -> None:
        """Writes a task and lets its requests in. No client owns this call, so none can end it."""
        try:
            if task != self.task:
                await self._switch(task)
                self.task, self.switches = task, self.switches + 1
            self._admit()
        except SwitchError as error:
            self._refuse(error, lambda w: w.task == task)
        except BaseException as error:
            half = f"task {task!r} may be half written ({error!r}): restart the server."
            self.broken = str(error) if isinstance(error, BrokenError) else half
            log.error(self.broken)
            self._refuse(BrokenError(self.broken), lambda w: True)
            if not isinstance(error, Exception):
                raise
        finally:
            self._change = None
            self._advance()

    def _refuse(self, error: Exception, which: Callable[[Waiter], bool]) -> None:
        for waiter in [w for w in self._waiting if which(w)]:
            self._waiting.remove(waiter)
            if not waiter.admitted.done():
                waiter.admitted.set_exception(error)
