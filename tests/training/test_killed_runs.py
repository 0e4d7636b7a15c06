"""Runs that are killed or broken, on disk and in a bucket, go on as if they had not been. The store
is an S3 server on loopback.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.grids import always
from support.hosts import config_file
from support.killed import killed_run
from support.runs import quiet_train, saved_state, small_run

from zflora_jax.cli.main import main
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.experiments.run_report import read_report
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import group, lock
from zflora_jax.training.trainer import step_of
from zflora_jax.training.workdir import read_starts, saved_steps


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
    timed = "_per_s", "seconds", "goodput", "memory_bytes"
    return [{k: v for k, v in r.items() if not k.endswith(timed)} for r in found]


def same_outcome(run: RunConfig, workdir: Any, whole: Path) -> None:
    """Parameters, optimizer state, records and results are those of the run on disk."""
    assert_trees_equal(saved_state(run, workdir), saved_state(run, whole))
    assert records(workdir) == records(whole)
    assert saved_steps(workdir) == saved_steps(whole)
    reports = []
    for report in map(read_report, (workdir, whole)):
        assert report is not None
        timed = {"environment", "resumed_from", "goodput"}
        reports.append({k: v for k, v in report.items() if k not in timed and "seconds" not in k})
    assert reports[0] == reports[1]


# Store, file, how many of it, and when: a state that does not count yet, one whose predecessors are
# not removed yet, records of a state that is not saved, and files at the start and the end.
POINTS = [
    *(("disk", "4/meta.json", 1, "before"), ("s3", "4/meta.json", 1, "before")),
    *(("disk", "6/state", 1, "before"), ("s3", "6/meta.json", 1, "after")),
    *(("s3", "metrics.jsonl", 3, "after"), ("s3", "config.json", 1, "after")),
    ("disk", "report.json", 1, "before"),
]


@pytest.mark.parametrize(
    "point",
    always(map(list, POINTS), lambda point: point == [*POINTS[0]]),
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
        assert there == files | {"checkpoints"} | ({".lock"} if store == "disk" else set())
        before = read_report(workdir)
        assert quiet_train(run, workdir).report == before  # finished: nothing is trained again


# --- faults ---------------------------------------------------------------------------------------


def signals(patch: pytest.MonkeyPatch) -> None:
    """SIGTERM in step 5, and again before it has saved."""
    requested = StopSignals.requested

    def signalled(self: StopSignals, step: int) -> bool:
        for _ in range(2 if step == 5 else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return requested(self, step)

    patch.setattr(StopSignals, "requested", signalled)


def full_disk(patch: pytest.MonkeyPatch) -> None:
    """It has room for two checkpoints."""
    patch.setattr(os, "posix_fallocate", Mock(side_effect=[None, None, OSError(28, "full")]))


def not_finite(patch: pytest.MonkeyPatch) -> None:
    """Step 7 has a finite loss, and an update that spoils the adapters."""

    def made(*args: Any) -> Any:
        step = step_of(*args)

        def one(params: Any, state: Any, batch: Any) -> Any:
            factor = np.float32("nan" if int(state.step) == 6 else 1)
            state, metrics = step(params, state, batch)
            state = state.replace(adapters=jax.tree.map(lambda x: x * factor, state.adapters))
            return state, metrics | {"grad_norm": metrics["grad_norm"] * factor}

        return one

    patch.setattr(group, "step_of", made)


@pytest.mark.parametrize(
    ("fault", "code", "said", "step"),
    [
        (signals, 75, "stopped by a signal after step 5", 5),
        (full_disk, 2, "a checkpoint could not be written", 4),
        (not_finite, 3, "grad_norm is nan at step 7", 6),
    ],
)
def test_a_fault_ends_a_run_that_then_goes_on(
    run, whole, tmp_path, monkeypatch, capsys, fault, code, said, step
):
    """The exit code and the message are those that are documented."""
    handler = signal.getsignal(signal.SIGTERM)  # a stopped command ignores what comes after
    config, workdir = config_file(run, tmp_path / "config.py"), tmp_path / "run"
    with monkeypatch.context() as patch:
        fault(patch)
        assert main(["train", "--config", config, "--workdir", str(workdir)]) == code
    signal.signal(signal.SIGTERM, handler)
    assert said in capsys.readouterr().err
    assert quiet_train(run, workdir).report["resumed_from"] == step
    same_outcome(run, workdir, whole)
