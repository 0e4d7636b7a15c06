"""One writer per workdir: file locks, and in buckets numbered objects with a heartbeat. The stores
are servers on loopback.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from support.paths import ROOT
from support.runs import quiet_train

from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.storage import as_path, objects, put
from zflora_jax.training import lock as locks, workdir as workdirs
from zflora_jax.training.lock import BusyError, locked


def refuse(monkeypatch, code: int) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))


# --- on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, code):
    refuse(monkeypatch, code)
    with locked(tmp_path), locked(tmp_path):
        pass
    [record] = caplog.records
    assert record.levelno == logging.WARNING and str(tmp_path) in record.message
    assert "no other process can be kept out of it" in record.message


def test_a_run_without_locks_is_trained(run, tmp_path, monkeypatch, caplog):
    refuse(monkeypatch, errno.ENOSYS)
    assert quiet_train(override(run, {"train.steps": 3}), tmp_path).report["steps"] == 3
    assert len([r for r in caplog.records if "kept out" in r.message]) == 1


def test_other_failures_of_a_lock_keep_their_message(run, tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"cannot write to workdir .*Input/output error"):
        workdirs.claim(tmp_path, run)


def test_a_lock_ends_although_a_child_has_its_file_open(tmp_path):
    """As a child that another thread is starting has, between fork and exec."""
    code = """
import os, sys, time
from zflora_jax.training.lock import locked
with locked(sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
try:
    with locked(sys.argv[1]):
        print("free")
finally:
    os.kill(child, 9)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "free\n", done.stderr


# --- in a bucket ----------------------------------------------------------------------------------

HOLD = """
import sys, zflora_jax.training.lock as lock
lock.BEAT = 0.1
with lock.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def url(each_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workdir whose locks are stale after a second."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "STALE", 1.0)
    return f"{each_bucket}/run"


def numbers(url: str) -> list[int]:
    return sorted(int(name) for name in objects(as_path(url) / locks.LOCK))


def test_a_live_process_keeps_others_out_and_a_killed_one_does_not(url, caplog):
    caplog.set_level("INFO", logger="zflora_jax")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, url],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = rf"is being trained by another process: process {holder.pid} on .*, since .* UTC"
        with pytest.raises(BusyError, match=said), locked(url):
            pass
        holder.send_signal(signal.SIGKILL)
    finally:
        holder.kill()
        holder.communicate()
    started = time.monotonic()
    with locked(url) as held:  # the killed one's ends after a second
        held()
        assert time.monotonic() - started >= locks.STALE
    assert "Waiting up to 1 s for a sign of life" in caplog.text
    with locked(url):  # a released one's at once
        pass
    assert numbers(url) == [3]


def test_an_owner_that_was_cut_off_finds_out(url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(locks, "BEAT", 60.0)
        first = locks._BucketLock(as_path(url))
        first.take()
        first.require_held()
        with locked(url) as held:
            for _ in range(2):
                held()
                with pytest.raises(OSError, match="was taken over by another process"):
                    first.require_held()
                put(first._object(1), first._content())  # a beat that comes late
            assert numbers(url) == [1, 2]
        with pytest.raises(OSError, match="was taken over"):  # though nobody holds it by now
            first.require_held()
        first.release()
    with locked(url) as held:
        held()
        assert numbers(url) == [3]


def test_only_one_of_many_gets_a_lock(bucket, monkeypatch):
    """Of processes that all find it free at the same moment. (The emulator of GCS, unlike GCS, has
    no create-only writes.)
    """
    folder = as_path(f"{bucket}/run")
    several = [locks._BucketLock(folder) for _ in range(6)]

    def take(lock: locks._BucketLock) -> bool:
        try:
            lock.take()
        except BusyError as error:
            assert "taken by another process at the same moment" in str(error)
            return False
        return True

    with monkeypatch.context() as patch:
        create, together = locks.create, threading.Barrier(len(several))
        patch.setattr(locks, "create", lambda *of: (together.wait(60), create(*of))[1])
        with ThreadPoolExecutor(len(several)) as pool:
            taken = list(pool.map(take, several))
    assert taken.count(True) == 1
    several[taken.index(True)].require_held()
    several[taken.index(True)].release()


def test_a_number_below_the_newest_holds_nothing(url, monkeypatch):
    """As of a process that listed the objects before two others took the lock."""
    put(as_path(url) / locks.LOCK / "00000007", b"{}")
    listed, real = iter([4]), locks._BucketLock._latest
    monkeypatch.setattr(locks._BucketLock, "_latest", lambda self: next(listed, None) or real(self))
    monkeypatch.setattr(locks._BucketLock, "_wait_out", lambda *_: None)
    with pytest.raises(BusyError, match="at the same moment"), locked(url):
        pass


def test_a_lock_that_cannot_be_renewed_or_released_is_warned_of(bucket, monkeypatch, caplog):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with locked(f"{bucket}/run"):
        monkeypatch.setattr(locks, "put", Mock(side_effect=OSError("no route")))
        while "could not be renewed: no route" not in caplog.text:
            time.sleep(0.01)
    assert "could not be released (no route); it counts for 60 s more" in caplog.text
