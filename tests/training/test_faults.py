"""Faults that a training run must survive: the exit code and message are the documented ones, and
the run that goes on ends with the state, losses and batches of an uninterrupted one, bit for bit.
Real kills are in test_killed_runs.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.hosts import config_file
from support.runs import quiet_train, saved_state, small_run

from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.core.fields import override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data import pipeline
from zflora_jax.experiments import train as whole_run
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.workdir import saved_steps

STEPS = 12


def run_of(base_dir: str) -> RunConfig:
    changes = {"train.steps": STEPS, "train.max_to_keep": 3, "data.bucket_lengths": [256]}
    return override(small_run(base_dir), changes)


@pytest.fixture
def run(base_dir: str) -> RunConfig:
    return run_of(base_dir)


@pytest.fixture(scope="module")
def whole(base_dir, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    quiet_train(run_of(base_dir), workdir)
    return workdir


@pytest.fixture
def cli(capsys, tmp_path) -> Iterator[Callable[[RunConfig, Path], tuple[int, str]]]:
    """`zflora train` -> exit code, and what it printed."""
    handler = signal.getsignal(signal.SIGTERM)  # a stopped command ignores what comes after

    def command(run: RunConfig, workdir: Path) -> tuple[int, str]:
        config = config_file(run, tmp_path / "config.py")
        try:
            code = main(["train", "--config", config, "--workdir", str(workdir)])
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, "".join(capsys.readouterr())

    yield command


def logged(workdir: Path) -> list[tuple[Any, ...]]:
    rows = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]
    return [(r["step"], r["loss"], r["grad_norm"], r["batch_crc32"]) for r in rows]


def goes_on(run: RunConfig, workdir: Path, whole: Path, step: int) -> None:
    """The run resumes from `step`, and ends as the uninterrupted one."""
    assert quiet_train(run, workdir).report["resumed_from"] == step
    assert_trees_equal(saved_state(run, workdir), saved_state(run, whole))
    assert logged(workdir) == logged(whole) and len(logged(whole)) == STEPS


def stopped_at(patch: pytest.MonkeyPatch, step: int) -> None:
    patch.setattr(StopSignals, "requested", lambda self, now: now == step)


def test_signals_stop_after_the_step_and_save_it(run, whole, cli, tmp_path, monkeypatch):
    """SIGTERM in a step, and again before it has saved."""
    requested = StopSignals.requested

    def signalled(self: StopSignals, step: int) -> bool:
        if step == 5:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return requested(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "requested", signalled)
        code, output = cli(run, tmp_path / "run")
    assert code == 75 and saved_steps(tmp_path / "run")[-1] == 5
    assert "stopped by a signal after step 5" in output
    goes_on(run, tmp_path / "run", whole, 5)


def test_a_full_disk_keeps_the_checkpoints_before(run, whole, cli, tmp_path, monkeypatch):
    """No file can grow beyond a few kilobytes (RLIMIT_FSIZE) from some step on."""
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        assert cli(run, tmp_path / "run")[0] == 75
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        code, output = cli(run, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "a checkpoint could not be written" in output, output[-700:]
    goes_on(run, tmp_path / "run", whole, 4)


def test_a_workdir_that_cannot_be_made(run, cli, tmp_path):
    (tmp_path / "file").write_text("kept")
    code, output = cli(run, tmp_path / "file" / "run")
    assert code == 2 and "cannot" in output and (tmp_path / "file").read_text() == "kept"


def test_a_damaged_checkpoint_is_refused_until_it_is_removed(run, whole, cli, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    (newest / "state" / "manifest.ocdbt").write_bytes(b"")
    code, output = cli(run, tmp_path / "run")
    assert code == 2 and f"Remove that folder to go on from step {STEPS - 2}." in output
    shutil.rmtree(newest)
    goes_on(run, tmp_path / "run", whole, STEPS - 2)


def poisoned(make: Callable[..., Any], what: str, at: int) -> Callable[..., Any]:
    """`step_of` whose step `at` has something that is not a number."""

    def made(*args: Any, **settings: Any) -> Any:
        step = make(*args, **settings)

        def one(params: Any, state: Any, batch: Any) -> Any:
            if int(state.step) + 1 != at:
                return step(params, state, batch)
            if what == "loss":
                nan = lambda name, x: x * np.float32("nan") if name == "final_norm/scale" else x  # noqa: E731
                params = trees.map_with_names(nan, params)
            elif what == "data":  # a token that no embedding has reads as NaN
                batch = batch | {"tokens": batch["tokens"] + np.int32(100000)}
            state, metrics = step(params, state, batch)
            if what == "gradient":  # the loss is finite, and the update has spoilt the adapters
                state = state.replace(
                    adapters=jax.tree.map(lambda x: x * np.float32("nan"), state.adapters)
                )
                metrics = metrics | {"grad_norm": metrics["grad_norm"] * np.float32("inf")}
            return state, metrics

        return one

    return made


@pytest.mark.parametrize(
    "what", ["gradient", *(pytest.param(w, marks=pytest.mark.soak) for w in ("loss", "data"))]
)
def test_nothing_of_a_step_that_is_not_finite_is_saved(
    run, whole, cli, tmp_path, monkeypatch, what
):
    with monkeypatch.context() as patch:
        patch.setattr(whole_run, "step_of", poisoned(whole_run.step_of, what, at=7))
        code, output = cli(run, tmp_path / "run")
    assert code == 3 and "at step 7" in output.splitlines()[-1], output[-700:]
    goes_on(run, tmp_path / "run", whole, 6)


def test_a_crash_of_the_data_pipeline_ends_the_run(run, whole, tmp_path, monkeypatch):
    pad, made = pipeline.pad, []

    def crashing(*args: Any, **settings: Any) -> Any:
        made.append(args)
        if len(made) == 9:
            raise RuntimeError("the data pipeline broke")
        return pad(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "pad", crashing)
        with pytest.raises(RuntimeError, match="the data pipeline broke"):
            quiet_train(run, tmp_path / "run")
    saved = saved_steps(tmp_path / "run")
    goes_on(run, tmp_path / "run", whole, saved[-1])
    assert 0 < saved[-1] <= 8


@pytest.mark.parametrize(
    "row", [{"instruction": "Say."}, {"instruction": 3, "output": "x"}, "text", None]
)
def test_a_malformed_row_is_named_before_anything_is_trained(run, cli, tmp_path, row):
    rows: list[Any] = [{"instruction": f"Say {i}.", "input": "", "output": "1"} for i in range(20)]
    rows[13] = row
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    changes = {"data.task": "rows", "data.data_dir": str(tmp_path / "data")}
    code, output = cli(override(run, changes | {"data.train_limit": None}), tmp_path / "run")
    assert code == 2 and "train.json, row 14" in output and not (tmp_path / "run").exists()
