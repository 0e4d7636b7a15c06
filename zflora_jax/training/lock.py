"""One writer per workdir: a file lock on disk, a numbered object with a heartbeat in a bucket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, create, is_url, objects, put, remove

log = logging.getLogger(__name__)

LOCK = ".lock"  # a file, or in a bucket a folder
BEAT, STALE = 10.0, 60.0  # seconds


class BusyError(ConfigError):
    """Another process trains in this workdir."""


@contextmanager
def locked(workdir: str | Path) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of `workdir` until the block or the process ends.

    The lock of a killed process ends at once on disk, and after STALE seconds in a bucket. On a
    file system without locks this only warns.

    Args:
      workdir: The directory, or URL of a folder in a bucket.

    Yields:
      A function that raises OSError if the lock was lost, which happens only in a bucket. Call it
      before a write that must not come from two processes.

    Raises:
      BusyError: Another process holds the lock.
    """
    folder = as_path(workdir, "workdir")
    if is_url(folder):
        lock = _BucketLock(folder)
        lock.take()
        try:
            yield lock.require_held
        finally:
            lock.release()
    else:
        with _file_locked(folder):
            yield lambda: None


# --- on disk --------------------------------------------------------------------------------------

# Errors of file systems that have no locks, such as some network and FUSE mounts.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def _file_locked(folder: Path) -> Iterator[None]:
    with open(folder / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{folder} is being trained by another process. Wait for it to end, or use another"
                " --workdir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn_unlocked(str(folder), error.strerror)
        try:
            yield
        finally:
            # Unlock explicitly: a forked child may still have the file open. Ignore a failure: the
            # file system has no locks, or closing the file unlocks it.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


@functools.cache  # warn once per workdir
def _warn_unlocked(workdir: str, reason: str) -> None:
    log.warning(
        "The file system of %s has no locks (%s), so no other process can be kept out of it. Make"
        " sure only one process trains there.",
        workdir,
        reason,
    )


# --- in a bucket ----------------------------------------------------------------------------------


class _BucketLock:
    """The lock of a workdir in a bucket: objects .lock/<n>, of which the highest n holds it.

    An object is created only if there is none of its number, so each number has one owner. The
    owner rewrites its object every BEAT seconds, and at the end with "released". A process that
    wants the lock waits until the highest object is released or has not changed for STALE seconds,
    and creates the next number. An owner that was cut off for so long finds the higher number
    (`require_held`); rewriting its own object then changes nothing.

    Args:
      workdir: URL as `storage.as_path` returns it.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir, self._folder = workdir, workdir / LOCK
        self._number, self._beats = 0, 0
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Takes the lock, waiting up to STALE seconds for one that may be of a killed process.

        Raises:
          BusyError: A live process holds it.
        """
        if latest := self._latest():
            self._wait_out(latest)
        self._number = latest + 1
        mine = create(self._object(self._number), self._content())
        if not mine or self._latest() != self._number:
            raise BusyError(
                f"{self._workdir} was taken by another process at the same moment. Use another"
                " --workdir."
            )
        for name in objects(self._folder):
            if name != self._object(self._number).name:
                remove(self._folder / name)
        self._thread.start()

    def require_held(self) -> None:
        """Checks that no other process has taken over.

        Raises:
          OSError: Another process has.
        """
        if self._latest() != self._number:
            raise OSError(
                f"{self._workdir} was taken over by another process: this one gave no sign of life"
                f" for {STALE:g} s. It has saved nothing since then."
            )

    def release(self) -> None:
        """Gives the lock up."""
        self._stop.set()
        self._thread.join()
        try:
            put(self._object(self._number), self._content(released=True))
        except Exception as error:  # each store has its own
            log.warning(
                "%s: the lock could not be released (%s); it counts for %g s more",
                *(self._workdir, error, STALE),
            )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self._beats += 1
            try:
                put(self._object(self._number), self._content())
            except Exception as error:  # the next beat may come through
                log.warning("%s: the lock could not be renewed: %s", self._workdir, error)

    def _wait_out(self, number: int) -> None:
        """Waits until a lock is released or stale.

        Raises:
          BusyError: Its owner lives.
        """
        seen: dict[str, Any] | None = None
        deadline = 0.0
        while True:
            try:
                found = json.loads(self._object(number).read_text(encoding="utf-8"))
            except FileNotFoundError:  # others have taken and released it; `take` finds out
                return
            who = f"process {found['pid']} on {found['host']}, since {found['since']}"
            if found["released"] or (found == seen and time.monotonic() > deadline):
                return
            if seen is None:
                seen, deadline = found, time.monotonic() + STALE
                log.info(
                    "%s is locked by %s. Waiting up to %g s for a sign of life.",
                    *(self._workdir, who, STALE),
                )
            elif found != seen:
                raise BusyError(
                    f"{self._workdir} is being trained by another process: {who}. Wait for it to"
                    " end, or use another --workdir."
                )
            time.sleep(min(1.0, BEAT))

    def _latest(self) -> int:
        """The highest number of a lock object; 0 without any."""
        return max((int(name) for name in objects(self._folder) if name.isdigit()), default=0)

    def _object(self, number: int) -> Path:
        return self._folder / f"{number:08d}"

    def _content(self, released: bool = False) -> bytes:
        return json.dumps(self._owner | {"beats": self._beats, "released": released}).encode()
