"""Runs whose workdir is in a bucket: the numbers and files of a run on disk, kills at the worst
places, one writer at a time. The store is an S3 server on loopback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
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
from support.checks import assert_trees_equal
from support.runs import quiet_train, saved_state

from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path, put
from zflora_jax.experiments.run_report import read_report
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.reporting import growing
from zflora_jax.reporting.metrics import MetricWriter, read_metrics
from zflora_jax.training import bucket_lock
from zflora_jax.training.checkpoint import Checkpoints, SaveError
from zflora_jax.training.lock import BusyError, locked
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import read_starts, saved_steps

TIMES = ("target_tokens_per_s", "data_wait_share")  # of a record
PATIENCE = 240  # seconds that any one process may take


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/runs/a"


@pytest.fixture(scope="module")
def whole(base_dir, tmp_path_factory) -> Path:
    """The run on disk, never stopped."""
    from support.runs import small_run

    workdir = tmp_path_factory.mktemp("whole") / "a"
    quiet_train(small_run(base_dir), workdir)
    return workdir


def records(workdir: Any) -> list[dict[str, Any]]:
    found = read_metrics(as_path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def same_outcome(run: RunConfig, workdir: Any, whole: Path) -> None:
    """Parameters, optimizer state, records and results are those of the run on disk."""
    assert_trees_equal(saved_state(run, workdir), saved_state(run, whole))
    assert records(workdir) == records(whole)
    reports = []
    for report in map(read_report, (workdir, whole)):
        assert report is not None
        timed = {"environment", "resumed_from", "data_wait_share"}
        reports.append({k: v for k, v in report.items() if k not in timed and "seconds" not in k})
    assert reports[0] == reports[1]


def start(run: RunConfig, url: str, point: dict[str, Any]) -> subprocess.Popen[str]:
    """`run` in a process of its own, with the programs that this one has compiled."""
    tests = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    words = [json.dumps(dataclasses.asdict(run)), url, json.dumps(point)]
    return subprocess.Popen(
        [sys.executable, str(tests / "support" / "kill_at.py"), *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_at(run: RunConfig, url: str, point: dict[str, Any]) -> None:
    process = start(run, url, point)
    try:
        output = process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, output[-2000:]


# --- the numbers and files of a run on disk -------------------------------------------------------


def test_a_run_in_a_bucket_is_the_run_on_disk(run, url, bucket, whole):
    quiet_train(run, url)
    same_outcome(run, url, whole)
    assert saved_steps(url) == saved_steps(whole)
    there = {name.partition("/")[2].partition("/")[2] for name in names(bucket)}
    files = {"config.json", "metrics.jsonl", "starts.jsonl", "report.json"}
    assert files <= there and any(name.startswith("tensorboard/events") for name in there)
    assert not any(".lock" in name for name in there)
    before = read_report(url)
    assert quiet_train(run, url).report == before  # finished: nothing is trained again


def state_of(step: int) -> TrainState:
    adapters = {"a": jnp.full((3, 2), step, jnp.float32), "b": jnp.arange(4, dtype=jnp.bfloat16)}
    return TrainState(jnp.int32(step), adapters, (jnp.float32(0.1 * step),))


def same_leaves(got: TrainState, want: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_newest_and_the_best_checkpoints_are_kept(url, bucket):
    for saved in (((1, 3.0), (2, 1.0), (3, 2.0)), ((4, 5.0),)):
        with Checkpoints(url, max_to_keep=1, keep_best=True) as checkpoints:
            for step, loss in saved:
                checkpoints.save(step, state_of(step), {"next_step": step}, loss)
        assert saved_steps(url) == [2, saved[-1][0]]
    assert not any(f"checkpoints/{step}/" in name for name in names(bucket) for step in (1, 3))
    with Checkpoints(url, create=False) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (4, 2)
        state, meta = checkpoints.restore(state_of(0), 2)
        assert meta["next_step"] == 2
        same_leaves(state, state_of(2))
        other = state_of(0).replace(opt_state=(jnp.zeros(2),))
        with pytest.raises(ConfigError, match=r"4 cannot be read .*Remove that folder to go on"):
            checkpoints.restore(other)


def test_a_checkpoint_that_lacks_an_object_is_refused(url):
    with Checkpoints(url, max_to_keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {})
    [lost] = (as_path(url) / "checkpoints/2/state/1/adapters/a").glob("0*")
    lost.unlink()
    with Checkpoints(url) as checkpoints:
        with pytest.raises(ConfigError, match="its numbers are not those that were saved"):
            checkpoints.restore(state_of(0))
        same_leaves(checkpoints.restore(state_of(0), 1)[0], state_of(1))


def test_programs_are_kept_in_the_bucket(own_programs, url, bucket):
    for _ in range(2):
        with compile_cache(f"{url}/compile_cache"):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.clear_caches()
            assert jax.jit(lambda x: x * 3 + 1)(2) == 7
        kept = [name for name in names(bucket) if name.endswith("-cache")]
        assert kept
    assert len(kept) == len(set(kept))


# --- kills ----------------------------------------------------------------------------------------

POINTS = [
    {"object": "4/commit.json", "nth": 1, "when": "before"},  # data without its marker
    {"object": "4/commit.json", "nth": 1, "when": "after"},  # before older ones are removed
    {"object": "metrics.jsonl", "nth": 3, "when": "before"},
    {"object": "metrics.jsonl", "nth": 3, "when": "after"},  # records of a state not saved
    {"object": "config.json", "nth": 1, "when": "after"},
    {"object": "report.json", "nth": 1, "when": "before"},
]


def test_a_kill_between_data_and_marker(run, url, bucket, whole):
    killed_at(run, url, POINTS[0])
    assert saved_steps(url) == [2]
    assert any("checkpoints/4/state" in name for name in names(bucket))
    assert max(r["step"] for r in records(url)) >= 4  # uploaded before the state
    quiet_train(run, url)
    assert [line["step"] for line in read_starts(url)] == [0, 2]
    same_outcome(run, url, whole)


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p['when']} {p['object']}")
def test_kills_at_the_worst_places(run, url, whole, point):
    killed_at(run, url, point)
    quiet_train(run, url)
    same_outcome(run, url, whole)


@pytest.mark.soak
def test_twenty_random_kills_of_one_run(run, url, tmp_path):
    """Some while the process starts, the others within seconds after it has begun to train."""
    run = override(run, {"train.steps": 300, "train.save_every": 3, "train.max_to_keep": 2})
    draw, starts = random.Random(18), []
    for number in range(20):
        process, began = start(run, url, {}), len(read_starts(url))
        try:
            if number % 4:
                deadline = time.monotonic() + PATIENCE
                while len(read_starts(url)) == began and process.poll() is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                time.sleep(draw.uniform(0.0, 1.5))
            else:
                time.sleep(draw.uniform(1.0, 8.0))
            ended = process.poll()
        finally:
            process.kill()
            output = process.communicate()[0]
        assert ended is None, output[-2000:]
        starts.append(max(saved_steps(url), default=0))
    quiet_train(run, url)
    quiet_train(run, tmp_path / "whole")
    print("saved after each kill:", starts)
    assert len(set(starts)) > 5  # it came on between the kills
    same_outcome(run, url, tmp_path / "whole")


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
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
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


def test_a_lock_of_another_machine_is_waited_for_until_it_shows_life(url, monkeypatch):
    lock = of_another_machine(url, host="elsewhere", pid=7)
    beats = []

    def sleep(_: float) -> None:
        beats.append(lock)
        if len(beats) == 3:
            monkeypatch.setattr(bucket_lock, "modified", lambda path: time.time() + 5)

    monkeypatch.setattr(bucket_lock.time, "sleep", sleep)
    with (
        pytest.raises(BusyError, match=r"process 7 on elsewhere.*you know that it is dead, delete"),
        locked(url),
    ):
        pass
    assert len(beats) == 3 and lock.exists()


def test_a_silent_lock_is_taken_over_and_its_owner_finds_out(url, monkeypatch):
    monkeypatch.setattr(bucket_lock, "STALE", 1.5)
    monkeypatch.setattr(bucket_lock, "BEAT", 60.0)
    monkeypatch.setattr(bucket_lock, "_has_ended", lambda facts: False)
    monkeypatch.setattr(bucket_lock, "_is_here", lambda facts: False)
    with locked(url) as held:
        held()
        with locked(url) as taken:
            taken()
            with pytest.raises(OSError, match="was taken over by another process"):
                held()
        taken_back = pytest.raises(OSError, match="was taken over")
        with taken_back:
            held()


def test_what_lost_the_lock_saves_nothing(url):
    def lost() -> None:
        raise OSError("taken over")

    said = r"could not be written to s3://.*taken over.*see to the store"
    with pytest.raises(SaveError, match=said), Checkpoints(url, before_commit=lost) as checkpoints:
        checkpoints.save(1, state_of(1), {})
    assert saved_steps(url) == []


def test_the_lock_is_renewed(url, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.05)
    with locked(url) as held:
        [lock] = as_path(url, "workdir").glob(".lock/*")
        seen, deadline = lock.stat(), time.monotonic() + 30
        lock_writes = []
        monkeypatch.setattr(
            bucket_lock, "put", lambda path, data: lock_writes.append((path, put(path, data)))
        )
        while len(lock_writes) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        held()
        assert len(lock_writes) >= 3 and seen.length > 0
    assert not list(as_path(url).glob(".lock/*"))


# --- files that grow ------------------------------------------------------------------------------


def test_metrics_are_uploaded_from_time_to_time_and_at_the_end(url, monkeypatch):
    path = as_path(url) / "metrics.jsonl"
    with MetricWriter(url, 9, console=False, report_to=()) as writer:
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
    with MetricWriter(url, 9, console=False, start_step=2, report_to=()):
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
