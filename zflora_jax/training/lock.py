"""One writer per workdir: a file lock on disk, an object with a heartbeat in a bucket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, create, is_url, put, remove

log = logging.getLogger(__name__)

LOCK = ".lock"
BEAT, STALE = 10.0, 60.0  # seconds


class BusyError(ConfigError):
    """Another process trains in this workdir."""


@contextmanager
def locked(workdir: str | Path) -> Iterator[Callable[[], None]]:
    """Keeps other processes out of `workdir` until the block or the process ends.

    The lock of a killed process ends at once on disk, and after STALE seconds in a bucket. On a
    file system without locks this only warns.

    Args:
      workdir: The directory, or URL of a folder in a bucket. BusyError if it is locked already.

    Yields:
      A function that raises OSError if the lock was lost, which happens only in a bucket. Call it
      before a write that must not come from two processes.
    """
    folder = as_path(workdir, "workdir")
    with _object_locked(folder) if is_url(folder) else _file_locked(folder) as held:
        yield held


# --- on disk --------------------------------------------------------------------------------------

# Some network and FUSE mounts have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def _file_locked(folder: Path) -> Iterator[Callable[[], None]]:
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
            log.warning(
                "The file system of %s has no locks (%s), so no other process can be kept out of"
                " it. Make sure only one process trains there.",
                *(folder, error.strerror),
            )
        try:
            yield lambda: None
        finally:
            with contextlib.suppress(OSError):  # closing would not unlock it in a forked child
                fcntl.flock(file, fcntl.LOCK_UN)


# --- in a bucket ----------------------------------------------------------------------------------


@contextmanager
def _object_locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """`locked` in a bucket: an object that is created only if there is none, rewritten every BEAT
    seconds and removed at the end. One that has not changed for STALE seconds is taken over. If
    several processes take over, the one whose object is in the bucket may write.
    """
    place, ended, own = workdir / LOCK, threading.Event(), secrets.token_hex(8)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    who = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
    content = (json.dumps({"id": own, "who": who, "beat": n}).encode() for n in itertools.count())

    def is_mine() -> bool:
        return (_read(place) or {}).get("id") == own

    def require_held() -> None:
        if not is_mine():
            raise OSError(
                f"{workdir} was taken over by another process: this one gave no sign of life for"
                f" {STALE:g} s. It has saved nothing since then."
            )

    def beat() -> None:
        while not ended.wait(BEAT):
            try:
                if is_mine():
                    put(place, next(content))
            except Exception as error:  # the next beat may come through
                log.warning("%s: the lock could not be renewed: %s", workdir, error)

    if found := _read(place):
        _wait_out(workdir, found)
        if _read(place) == found:
            remove(place)
    if not create(place, next(content)) or not is_mine():
        raise BusyError(
            f"{workdir} was taken by another process at the same moment. Use another --workdir."
        )
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield require_held
    finally:
        ended.set()
        thread.join()
        try:
            if is_mine():
                remove(place)
        except Exception as error:  # each store has its own
            text = "%s: the lock could not be released (%s); it counts for %g s more"
            log.warning(text, workdir, error, STALE)


def _wait_out(workdir: Path, found: dict[str, Any]) -> None:
    """Waits until a lock is released or stale; BusyError if its owner lives."""
    deadline = time.monotonic() + STALE
    text = "%s is locked by %s. Waiting up to %g s for a sign of life."
    log.info(text, workdir, found["who"], STALE)
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT))
        now = _read(workdir / LOCK)
        if now is None:
            return
        if now != found:
            raise BusyError(
                f"{workdir} is being trained by another process: {now['who']}. Wait for it to end,"
                " or use another --workdir."
            )


def _read(place: Path) -> dict[str, Any] | None:
    """The content of a lock; None without one."""
    try:
        found: dict[str, Any] = json.loads(place.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return found
