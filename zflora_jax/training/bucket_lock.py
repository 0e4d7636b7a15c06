"""A lock in a bucket, which has none: an object per process that wants it, kept fresh by its owner.

Every process writes an object of its own under <workdir>/.lock/, then lists them. It holds the lock
if no other live one is there; else it takes its own back. Stores list what has been written at once
(S3, GCS), so of two processes the one that lists later sees the other: both can fail, never
both succeed. No conditional write is needed, which not every S3-compatible store has.

The owner writes its object anew every BEAT seconds. An object is dead if its process has ended on
this machine, or if it is older than STALE by the store's own clock. A process that was cut off for
so long finds at its next save that its object was taken away (`require_held`). Whoever took it away
names it in an object of its own, which outlives its release: a write that was on its way, and comes
however late, renews nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from zflora_jax.core.storage import is_store_error, modified, objects, put, remove

log = logging.getLogger(__name__)

LOCKS = ".lock"  # the folder of lock objects
BEAT, STALE = 10.0, 60.0  # seconds
TRIES = 8  # processes that ask at the same moment try again, each after a random pause


class Held(Exception):
    """Another process holds the lock; the message says which, how old its last sign of life is, and
    how to take over.
    """


class BucketLock:
    """The lock of one process on a workdir in a bucket.

    Args:
      workdir: a URL, as `storage.as_path` gives it.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._name = secrets.token_hex(8)
        self._object = workdir / LOCKS / self._name
        self._took_over: list[str] = []
        self._lost = False
        self._facts: dict[str, Any] = {"owner": self._name, **_this_process()}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock, waiting up to STALE seconds for one that may be of a killed process.

        Raises:
          Held: a live process holds it.
        """
        for _ in range(TRIES):
            self._write("asks")
            try:
                rival = self._rival()
            except BaseException:
                self._withdraw()
                raise
            if rival is None:
                self._write("holds")
                self._thread = threading.Thread(target=self._beat, daemon=True)
                self._thread.start()
                return
            self._withdraw()
            self._wait_out(*rival)
            time.sleep(random.uniform(0.0, 1.0))
        raise Held(f"{self._workdir} is asked for by several processes at once; try again.")

    def require_held(self) -> None:
        """Check that no other process has taken over.

        Raises:
          OSError: one has.
        """
        if self._is_lost():
            raise OSError(
                f"{self._workdir} was taken over by another process: this one gave no sign of life"
                f" for {STALE:g} s. It has saved nothing since then."
            )

    def release(self) -> None:
        """Give the lock up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._withdraw()

    def _is_lost(self) -> bool:
        """Whether another process has taken over, be it gone by now."""
        if not self._lost:
            others = objects(self._workdir / LOCKS)
            self._lost = others.pop(self._name, None) is None or any(
                self._name in self._read(other).get("took_over", ()) for other in others
            )
        return self._lost

    def _write(self, state: str) -> None:
        content = self._facts | {"state": state, "took_over": self._took_over}
        put(self._object, json.dumps(content).encode())

    def _withdraw(self) -> None:
        try:
            if self._took_over:
                self._write("released")
            else:
                remove(self._object)
        except Exception as error:
            if not isinstance(error, OSError) and not is_store_error(error):
                raise
            log.warning(
                "the lock %s could not be released (%s); it counts for %g s more",
                self._object,
                error,
                STALE,
            )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                if not self._is_lost():
                    self._write("holds")
                if self._is_lost():  # or by one who came in between; require_held says so
                    self._withdraw()
                    return
            except Exception as error:  # the next beat may come through
                log.warning("%s: the lock could not be renewed: %s", self._workdir, error)

    def _rival(self) -> tuple[str, float] | None:
        """Name and age of another live object; the others are removed, and what they took over is
        kept here. Call it when the own object has just been written.
        """
        now = modified(self._object)
        for name in sorted(objects(self._workdir / LOCKS)):
            if name == self._name:
                continue
            other = self._workdir / LOCKS / name
            try:
                age = now - modified(other)
            except FileNotFoundError:
                continue  # given up meanwhile
            facts = self._read(name)
            released = facts.get("state") == "released"
            ended = released or _has_ended(facts)
            if age <= STALE and not ended:
                return name, age
            if not released:
                log.info("%s: taking over from a process that has ended: %s", other, _who(facts))
            self._took_over += [*facts.get("took_over", ()), *([] if ended else [name])]
            self._write("asks")  # before the removal: the other one has to find out
            remove(other)
        return None

    def _wait_out(self, name: str, age: float) -> None:
        """Wait until another lock is gone or dead.

        Raises:
          Held: its owner lives.
        """
        other, started = self._workdir / LOCKS / name, time.monotonic()
        try:
            seen = modified(other)
        except FileNotFoundError:
            return
        facts, told = self._read(name), False
        if facts.get("state") == "asks":
            return
        while (silent := age + time.monotonic() - started) <= STALE:
            try:
                fresh = modified(other) != seen
            except FileNotFoundError:
                return
            if fresh or _is_here(facts):
                raise Held(
                    f"{self._workdir} is being trained by another process: {_who(facts)}, last sign"
                    f" of life {0 if fresh else max(silent, 0):.0f} s ago. Wait for it to end, or"
                    f" use another --workdir. A killed run's lock ends {STALE:g} s after its last"
                    f" sign of life; if you know that it is dead, delete {other}."
                )
            if _has_ended(facts):
                return
            if not told:
                log.info(
                    "%s is locked by %s. Waiting up to %g s for a sign of life.",
                    self._workdir,
                    _who(facts),
                    STALE,
                )
                told = True
            time.sleep(1.0)

    def _read(self, name: str) -> dict[str, Any]:
        """What a lock object says of its owner; nothing if it is gone or damaged."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads((self._workdir / LOCKS / name).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}


def _this_process() -> dict[str, Any]:
    """What tells this process from all others: machine, start of the machine, namespace of process
    numbers (containers have their own), number, start of the process.
    """
    namespace = None
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": namespace,
        "pid": pid,
        "started": _birth(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _text(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return None


def _birth(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if it does not run."""
    stat = _text(f"/proc/{pid}/stat")
    if stat is None:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _on_this_machine(facts: dict[str, Any]) -> bool:
    here = _this_process()
    return all(
        here[key] is not None and facts.get(key) == here[key]
        for key in ("host", "boot", "namespace")
    )


def _has_ended(facts: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and is gone."""
    return _on_this_machine(facts) and _birth(int(facts["pid"])) != facts.get("started")


def _is_here(facts: dict[str, Any]) -> bool:
    """Whether the owner runs on this machine."""
    return _on_this_machine(facts) and not _has_ended(facts)


def _who(facts: dict[str, Any]) -> str:
    return (
        f"process {facts.get('pid', '?')} on {facts.get('host', 'an unknown machine')}, since"
        f" {facts.get('since', 'an unknown time')}"
    )
