"""What makes a run in a bucket safe: checkpoints that count from their marker on, locks by
heartbeat, files that are uploaded whole. The stores are servers on loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.bucket import names
from support.paths import ROOT
from support.runs import quiet_train

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, objects, put, remove
from zflora_jax.reporting import growing
from zflora_jax.reporting.files import atomic_write, plain
from zflora_jax.reporting.metrics import MetricWriter, read_metrics
from zflora_jax.training import bucket_lock
from zflora_jax.training.checkpoint import Checkpoints, SaveError
from zflora_jax.training.lock import BusyError, locked
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import saved_steps


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/runs/a"


@pytest.fixture
def each(each_bucket: str) -> str:
    return f"{each_bucket}/runs/a"


# --- objects --------------------------------------------------------------------------------------


def test_what_is_removed_and_listed_ends_at_a_folder(each):
    for name in ("2/a", "2/b/c", "20/a", "2.json"):
        put(as_path(each) / name, name.encode())
    assert sorted(objects(as_path(each) / "2")) == ["a", "b/c"]
    remove(as_path(each) / "2")
    remove(as_path(each) / "2")  # there is nothing any more
    assert sorted(objects(as_path(each))) == ["2.json", "20/a"]
    remove(as_path(each) / "2.json")
    assert sorted(objects(as_path(each))) == ["20/a"]


def test_paths_of_objects_are_those_of_files(each):
    atomic_write(f"{each}/folder/file.txt", "ä".encode())
    file = as_path(Path(each)) / "folder" / "file.txt"  # a Path makes one slash of two
    assert str(file) == str(file.resolve()) == str(file.absolute()) == f"{each}/folder/file.txt"
    assert file.read_text(encoding="utf-8") == "ä" and file.read_bytes() == "ä".encode()
    assert file.is_file() and file.parent.is_dir() and not (file.parent / "other").exists()
    assert [path.name for path in file.parent.glob("*.txt")] == ["file.txt"]
    assert plain({"where": file}) == {"where": str(file)}
    with pytest.raises(FileNotFoundError):
        (file.parent / "other").read_text()
    file.unlink()
    assert not file.exists() and not file.parent.is_dir()


# --- checkpoints ----------------------------------------------------------------------------------


def state_of(step: int) -> TrainState:
    adapters = {"a": jnp.full((3, 2), step, jnp.float32), "b": jnp.arange(4, dtype=jnp.bfloat16)}
    return TrainState(jnp.int32(step), adapters, (jnp.float32(0.1 * step),))


def same_leaves(got: TrainState, want: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_newest_and_the_best_checkpoints_are_kept(each):
    for saved in (((1, 3.0), (2, 1.0), (3, 2.0)), ((4, 5.0),)):
        with Checkpoints(each, max_to_keep=1, keep_best=True) as checkpoints:
            for step, loss in saved:
                checkpoints.save(step, state_of(step), {"next_step": step}, loss)
        assert saved_steps(each) == [2, saved[-1][0]]
    assert not any(f"checkpoints/{step}/" in name for name in names(each) for step in (1, 3))
    with Checkpoints(each, create=False) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (4, 2)
        state, meta = checkpoints.restore(state_of(0), 2)
        assert meta["next_step"] == 2
        same_leaves(state, state_of(2))
        other = state_of(0).replace(opt_state=(jnp.zeros(2),))
        with pytest.raises(ConfigError, match=r"4 cannot be read .*Remove that folder to go on"):
            checkpoints.restore(other)


def test_a_checkpoint_that_lacks_an_object_is_refused(each):
    with Checkpoints(each, max_to_keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {})
    [lost] = (as_path(each) / "checkpoints/2/state/1/adapters/a").glob("0*")
    lost.unlink()
    with Checkpoints(each) as checkpoints:
        with pytest.raises(ConfigError, match="its numbers are not those that were saved"):
            checkpoints.restore(state_of(0))
        same_leaves(checkpoints.restore(state_of(0), 1)[0], state_of(1))


# --- one writer at a time -------------------------------------------------------------------------

HOLD = """
import sys, zflora_jax.training.lock as lock
with lock.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(url: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def of_another_machine(url: str, **facts: Any) -> Path:
    """A lock object as another machine writes it."""
    lock = as_path(url) / bucket_lock.LOCKS / "other"
    put(lock, json.dumps({"owner": "other", "state": "holds", **facts}).encode())
    return lock


def test_two_runs_of_one_workdir(run, url):
    process = holder(url)
    try:
        said = (
            r"trained by another process: process \d+ on .*, since .*, last sign of life \d+ s ago"
        )
        with pytest.raises(BusyError, match=said):
            quiet_train(run, url)
    finally:
        process.kill()
        process.communicate()
    # Of a process of this machine that was killed: at once.
    with locked(url), pytest.raises(BusyError), locked(url):
        pass
    with locked(url):
        pass


def test_a_lock_of_another_machine_is_waited_for_until_it_shows_life(each, monkeypatch):
    lock = of_another_machine(each, host="elsewhere", pid=7)
    beats = []

    def sleep(_: float) -> None:
        beats.append(lock)
        if len(beats) == 3:
            monkeypatch.setattr(bucket_lock, "modified", lambda path: time.time() + 5)

    monkeypatch.setattr(bucket_lock.time, "sleep", sleep)
    with (
        pytest.raises(BusyError, match=r"process 7 on elsewhere.*you know that it is dead, delete"),
        locked(each),
    ):
        pass
    assert len(beats) == 3 and lock.exists()


def test_a_silent_lock_is_taken_over_and_its_owner_finds_out(each, monkeypatch):
    monkeypatch.setattr(bucket_lock, "STALE", 1.5)
    monkeypatch.setattr(bucket_lock, "BEAT", 60.0)
    monkeypatch.setattr(bucket_lock, "_has_ended", lambda facts: False)
    monkeypatch.setattr(bucket_lock, "_is_here", lambda facts: False)
    with locked(each) as held:
        held()
        with locked(each) as taken:
            taken()
            with pytest.raises(OSError, match="was taken over by another process"):
                held()
        taken_back = pytest.raises(OSError, match="was taken over")
        with taken_back:
            held()


def test_a_beat_that_comes_late_renews_no_lock_that_was_taken(each, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT", 60.0)
    monkeypatch.setattr(bucket_lock, "_has_ended", lambda facts: False)
    monkeypatch.setattr(bucket_lock, "_is_here", lambda facts: False)
    first, second, third = (bucket_lock.BucketLock(as_path(each)) for _ in range(3))
    real, silent = bucket_lock.modified, 2 * bucket_lock.STALE
    monkeypatch.setattr(  # as if the first had been silent for long
        bucket_lock, "modified", lambda path: real(path) - silent * (path.name == first._name)
    )

    def there() -> set[str]:
        return set(objects(as_path(each) / bucket_lock.LOCKS))

    def late(path: Path, data: bytes) -> None:
        monkeypatch.setattr(bucket_lock, "put", put)
        second.take()
        put(path, data)

    first.take()
    with monkeypatch.context() as patch:
        patch.setattr(bucket_lock, "BEAT", 0.0)
        monkeypatch.setattr(bucket_lock, "put", late)
        first._beat()
    assert there() == {second._name}
    second.require_held()
    second.release()
    first._lost = False  # it has not asked yet
    put(first._object, b"{}")
    with pytest.raises(OSError, match="was taken over"):  # though nobody holds it by now
        first.require_held()
    remove(first._object)
    third.take()
    assert there() == {third._name} and third._took_over == [first._name]
    third.release()


def test_what_lost_the_lock_saves_nothing(url):
    def lost() -> None:
        raise OSError("taken over")

    said = r"could not be written to s3://.*taken over.*see to the store"
    with pytest.raises(SaveError, match=said), Checkpoints(url, before_commit=lost) as checkpoints:
        checkpoints.save(1, state_of(1), {})
    assert saved_steps(url) == []


def test_the_lock_is_renewed(each, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.05)
    with locked(each) as held:
        [lock] = as_path(each, "workdir").glob(".lock/*")
        seen, deadline = lock.stat(), time.monotonic() + 30
        lock_writes = []
        monkeypatch.setattr(
            bucket_lock, "put", lambda path, data: lock_writes.append((path, put(path, data)))
        )
        while len(lock_writes) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        held()
        assert len(lock_writes) >= 3 and seen.length > 0
    assert not list(as_path(each).glob(".lock/*"))


# --- files that grow ------------------------------------------------------------------------------


def test_metrics_are_uploaded_from_time_to_time_and_at_the_end(each, monkeypatch):
    path = as_path(each) / "metrics.jsonl"
    with MetricWriter(each, 9, console=False, report_to=()) as writer:
        writer.write(1, "train", {"loss": 1.0})
        assert read_metrics(path) == []
        writer.sync()
        writer.write(2, "train", {"loss": 2.0})
        assert [r["step"] for r in read_metrics(path)] == [1]
        monkeypatch.setattr(growing, "UPLOAD_EVERY", 0.0)
        writer.write(3, "train", {"loss": 3.0})
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
        monkeypatch.setattr(growing, "UPLOAD_EVERY", 60.0)
        writer.write(4, "train", {"loss": 4.0})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    with MetricWriter(each, 9, console=False, start_step=2, report_to=()):
        pass
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_an_upload_that_fails_is_a_warning_between_saves_and_an_error_at_one(
    url, monkeypatch, caplog
):
    def refuse(*_: object) -> None:
        raise OSError("store is full")

    writer = MetricWriter(url, 9, console=False, report_to=())
    with monkeypatch.context() as patch:
        patch.setattr(growing, "put", refuse)
        patch.setattr(growing, "UPLOAD_EVERY", 0.0)
        writer.write(1, "train", {"loss": 1.0})
        with pytest.raises(OSError, match="store is full"):
            writer.sync()
    writer.close()
    assert "metrics could not be uploaded: store is full" in caplog.text
    assert [r["step"] for r in read_metrics(as_path(url) / "metrics.jsonl")] == [1]
