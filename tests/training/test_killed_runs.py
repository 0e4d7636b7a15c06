"""Runs that are killed, on disk and in a bucket, go on as if they had not been; several processes
in a bucket. The store is an S3 server on loopback.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.bucket import names
from support.checks import assert_trees_equal
from support.hosts import config_file, finish, spawn
from support.killed import killed_run
from support.runs import quiet_train, saved_state, small_run

from zflora_jax.core.fields import override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.experiments import export, restore
from zflora_jax.experiments.run_report import read_report
from zflora_jax.parallel import distributed
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import lock
from zflora_jax.training.workdir import read_starts, saved_steps

TIMES = ("target_tokens_per_s",)  # of a record


@pytest.fixture
def url(bucket: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lock, "STALE", 1.0)  # after which a killed run's lock is taken
    return f"{bucket}/runs/a"


@pytest.fixture(scope="module")
def whole(base_dir, tmp_path_factory) -> Path:
    """The run on disk, never stopped."""
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
    assert saved_steps(workdir) == saved_steps(whole)
    reports = []
    for report in map(read_report, (workdir, whole)):
        assert report is not None
        timed = {"environment", "resumed_from"}
        reports.append({k: v for k, v in report.items() if k not in timed and "seconds" not in k})
    assert reports[0] == reports[1]


# Store, file, how many of it, and when: a state that does not count yet, one whose predecessors are
# not removed yet, records of a state that is not saved, and files at the start and the end.
POINTS = [
    ("disk", "4/meta.json", 1, "before"),
    ("s3", "4/meta.json", 1, "before"),
    ("disk", "6/state", 1, "before"),
    ("disk", "6/meta.json", 1, "after"),
    ("s3", "6/meta.json", 1, "after"),
    ("s3", "metrics.jsonl", 3, "after"),
    ("s3", "config.json", 1, "after"),
    ("disk", "report.json", 1, "before"),
    ("s3", "report.json", 1, "before"),
]


@pytest.mark.parametrize(
    "point",
    [*POINTS[:2], *(pytest.param(p, marks=pytest.mark.soak) for p in POINTS[2:])],
    ids=lambda point: f"{point[0]} {point[3]} {point[1]}",
)
def test_a_killed_run_goes_on_bit_for_bit(run, url, whole, tmp_path, point):
    """kill -9; then to the end, in another process. Parameters, optimizer state, every record and
    the report are those of one run on disk.
    """
    store, name, nth, when = point
    workdir = as_path(url if store == "s3" else tmp_path / "a")
    killed_run(run, workdir, name, nth, when)
    at_four = name == "4/meta.json"
    if at_four:
        assert saved_steps(workdir) == [2]
        assert (workdir / "checkpoints/4/state/manifest.ocdbt").exists()
        assert max(r["step"] for r in records(workdir)) >= 4  # there before the state
    quiet_train(run, workdir)
    same_outcome(run, workdir, whole)
    if at_four:
        starts = read_starts(workdir)
        assert [line["step"] for line in starts] == [0, 2]
        assert starts[1]["jax"] == jax.__version__
        there = {path.name for path in workdir.iterdir()} - {"compile_cache"}
        files = {"config.json", "metrics.jsonl", "starts.jsonl", "report.json", "tensorboard"}
        assert there == files | {"checkpoints", ".lock"}
        before = read_report(workdir)
        assert quiet_train(run, workdir).report == before  # finished: nothing is trained again


# --- several processes ----------------------------------------------------------------------------


def test_processes_find_each_other_in_a_bucket(bucket, tmp_path, monkeypatch):
    """Also at its top, where the directory of an export is shared."""
    file = as_path(f"{bucket}/.shared-1")
    assert not distributed._appears(file, 0.0)
    distributed._write_nonce(file)
    assert distributed._appears(file, 0.0)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "from_process_0", lambda value: value)
    gathered = lambda own: np.stack([own] * 2)  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gathered)
    monkeypatch.setattr(restore, "load_run", lambda *_, **__: 1 / 0)  # the checks are passed
    for out in (f"{bucket}/export", tmp_path / "export"):
        with pytest.raises(ZeroDivisionError):
            export.export_run("run", out)
    assert names(bucket) == [".shared-1"] and list(tmp_path.iterdir()) == []


@pytest.mark.soak  # twin: test_checkpoint's two processes
def test_two_processes_train_in_a_bucket(run, url, tmp_path):
    """The values of one process on disk; then one process goes on with what two have saved."""
    four = override(run, {"mesh.data": 2, "mesh.fsdp": 2, "data.grad_accum_steps": 1})
    quiet_train(four, tmp_path / "one")
    config = config_file(four, tmp_path / "two.py")
    argv = ["-m", "zflora_jax.cli", "train", "--config", config, "--workdir", url]
    processes: list[subprocess.Popen[str]] = spawn(argv, 2, 2, flags=True)
    finish(processes)
    report = read_report(url)
    assert report is not None and report["processes"] == 2
    values = [
        [(r["loss"], r["tokens"]) for r in records(workdir)] for workdir in (url, tmp_path / "one")
    ]
    np.testing.assert_allclose(*values, rtol=2e-5)
    states = [saved_state(four, workdir) for workdir in (url, tmp_path / "one")]
    for name, leaf in states[1].items():
        np.testing.assert_allclose(states[0][name], leaf, atol=2e-4, err_msg=name)
    quiet_train(override(four, {"train.steps": 10}), url)
    assert saved_steps(url)[-1] == 10
