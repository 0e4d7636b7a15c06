"""One writer per workdir: file locks, and in buckets objects with a heartbeat. The stores
are servers on loopback.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from unittest.mock import Mock

import pytest
from support.paths import ROOT
from support.runs import claim

from zflora_jax import BusyError, ConfigError, locked
from zflora_jax.core.storage import as_path
from zflora_jax.training import lock as locks


def refuse(monkeypatch, code: int) -> None:
    monkeypatch.setattr(locks.fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))


# --- on disk --------------------------------------------------------------------------------------


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    refuse(monkeypatch, errno.ENOTSUP)
    with locked(tmp_path):
        pass
    [record] = caplog.records
    assert "no other process can be kept out" in record.message and str(tmp_path) in record.message


def test_other_failures_of_a_lock_keep_their_message(run, tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"cannot write to workdir .*Input/output error"):
        claim(tmp_path, run)


def test_a_lock_ends_although_a_child_has_its_file_open(tmp_path, monkeypatch):
    """As a child that another thread is starting has, between fork and exec."""
    children, flock = [], locks.fcntl.flock

    def forked(file, operation):
        children.append(os.dup(file.fileno()))
        flock(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", forked)
    with locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    for child in children:
        os.close(child)


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
    assert not (as_path(url) / locks.LOCK).exists()


def test_an_owner_that_was_cut_off_finds_out(url, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 60.0)
    with ExitStack() as first:
        lost = first.enter_context(locked(url))
        lost()
        monkeypatch.setattr(locks, "BEAT", 0.1)
        with locked(url) as held:
            held()
            with pytest.raises(OSError, match="was taken over by another process"):
                lost()
            first.close()  # removes nothing
            held()
        with pytest.raises(OSError, match="was taken over"):  # though nobody holds it by now
            lost()


def test_only_one_of_many_gets_a_lock(bucket, monkeypatch):
    """Of processes that all find it free at the same moment. (The emulator of GCS, unlike GCS, has
    no create-only writes.)
    """
    create, together, tried = locks.create, threading.Barrier(6), threading.Barrier(6)
    monkeypatch.setattr(locks, "create", lambda *of: (together.wait(60), create(*of))[1])

    def take(_: int) -> bool:
        try:
            with locked(f"{bucket}/run") as held:
                tried.wait(60)
                held()
                return True
        except BusyError as error:
            assert "taken by another process at the same moment" in str(error)
            tried.wait(60)
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(take, range(6))) == 1


def test_a_lock_that_cannot_be_renewed_or_released_is_warned_of(bucket, monkeypatch, caplog):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with locked(f"{bucket}/run"):
        for name in ("put", "remove"):
            monkeypatch.setattr(locks, name, Mock(side_effect=OSError("no route")))
        while "could not be renewed: no route" not in caplog.text:
            time.sleep(0.01)
    assert "could not be released (no route); it counts for 60 s more" in caplog.text
