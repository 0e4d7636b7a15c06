"""Who may write in a workdir: an advisory lock of the file system, or lock objects in a bucket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, is_url
from zflora_jax.training.bucket_lock import BucketLock, Held

log = logging.getLogger(__name__)


class BusyError(ConfigError):
    """Another process trains in this workdir."""


# Errors of file systems that have no locks, such as some network and FUSE mounts.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@functools.cache  # warn once per workdir
def _warn_unlocked(workdir: str, reason: str) -> None:
    log.warning(
        "The file system of %s has no locks (%s), so no other process can be kept out of it: see to"
        " it that only one trains there.",
        workdir,
        reason,
    )


@contextmanager
def locked(workdir: str | Path) -> Iterator[Callable[[], None]]:
    """Keep other processes out of `workdir`, by a lock that ends with the process.

    A file system ends it by itself; on one without locks this only warns. For a bucket see
    `bucket_lock`.

    Yields:
      A function that raises OSError if the lock was lost, which happens only in a bucket. Call it
      before a write that must not come from two processes.

    Raises:
      BusyError: another process holds it.
    """
    folder = as_path(workdir, "workdir")
    if is_url(folder):
        lock = BucketLock(folder)
        try:
            lock.take()
        except Held as error:
            raise BusyError(str(error)) from None
        try:
            yield lock.require_held
        finally:
            lock.release()
        return
    with open(folder / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{workdir} is being trained by another process. Wait for it to end, or use another"
                " --workdir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn_unlocked(str(workdir), error.strerror)
        try:
            yield lambda: None
        finally:
            # Unlock explicitly: a forked child may still have the file open. Ignore a failure: the
            # file system has no locks, or closing the file unlocks it.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
