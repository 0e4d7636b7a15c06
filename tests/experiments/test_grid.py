"""Sweeps over a grid: a row per run, failures too; not run again; side by side on several devices
with the numbers of one; `zflora sweep`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pandas
import pytest
from support.fake_train import FakeTrain, loss_of
from support.runs import mark_saved

from zflora_jax.cli.main import main
from zflora_jax.core.errors import NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments import grid
from zflora_jax.experiments.grid import combinations, run_grid, sweep
from zflora_jax.parallel import distributed
from zflora_jax.training.lock import locked

GRID = {"adapter.method": ["lora", "zflora-minimal"], "adapter.rank": [2, 4]}


@pytest.fixture
def base(run: RunConfig) -> RunConfig:
    small = {"train.steps": 2, "train.save_every": None, "data.train_limit": 12}
    return override(run, small | {"optim.warmup_steps": 1})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    """Runs are not trained, and their base is not loaded."""
    fake = FakeTrain()
    monkeypatch.setattr(grid, "train", fake)
    monkeypatch.setattr(grid._Bases, "of", lambda *_: None)
    return fake


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["run"], row["status"], row["params_trainable"], row["test_loss"]) for row in rows]


def test_runs_side_by_side_are_stopped_and_go_on_to_the_numbers_of_one_after_the_other(
    base, tmp_path, monkeypatch
):
    """Real training. SIGTERM to a sweep of two threads: each run is saved after its step, and the
    sweep goes on from there; a frame, a page and curves at the end, and nothing is run again.
    """
    base, two = override(base, {"train.steps": 8, "train.log_every": 1}), {"train.seed": [0, 1]}
    original, begun, stdout = distributed.StopSignals.requested, [], sys.stdout

    def slowly(self, step):
        begun.append(step)
        if step >= 3:
            time.sleep(0.5)  # else the runs might be over before the signal comes
        return original(self, step)

    def signal_later():
        while not [step for step in begun if step >= 3]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(distributed.StopSignals, "requested", slowly)
    threading.Thread(target=signal_later, daemon=True).start()
    with pytest.raises(Preempted, match="saved"):
        run_grid(base, two, tmp_path / "s", parallel=2, console=False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and sys.stdout is stdout
    assert list((tmp_path / "s").glob("*/checkpoints/*"))
    assert not list((tmp_path / "s").glob("*/report.json"))
    monkeypatch.setattr(distributed.StopSignals, "requested", original)
    frame = sweep(base, two, tmp_path / "s", parallel=2)
    assert isinstance(frame, pandas.DataFrame) and list(frame["train.seed"]) == [0, 1]
    assert set(frame["status"]) == {"finished"} and frame["test_loss"].nunique() == 2
    assert (frame["seconds"] > 0).all() and sys.stdout is stdout
    assert (tmp_path / "s" / "curves.png").is_file() and (tmp_path / "s" / "curves.svg").is_file()
    monkeypatch.setattr(grid, "training_curves", lambda *_: None)
    rows = frame.to_dict("records")
    alone = run_grid(base, two, tmp_path / "alone", parallel=1, console=False)
    assert numbers(rows) == numbers(alone)
    monkeypatch.setattr(grid, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run_grid(base, two, tmp_path / "s", parallel=1, console=False) == rows


def test_every_combination_is_a_row_and_is_not_run_again(base, tmp_path, fake):
    frame = sweep(base, GRID, tmp_path / "s", parallel=1)
    assert list(frame["adapter.method"]) == ["lora"] * 2 + ["zflora-minimal"] * 2
    assert list(frame["adapter.rank"]) == [2, 4, 2, 4] and set(frame["status"]) == {"finished"}
    assert list(frame["test_loss"]) == [loss_of(run) for run in fake.runs]
    assert frame["test_loss"].nunique() == 4 and set(frame["commit"]) == {"c0ffee"}
    rows = frame.to_dict("records")
    assert json.loads((tmp_path / "s" / "rows.json").read_text())["rows"] == rows
    page = (tmp_path / "s" / "rows.md").read_text()
    assert "| adapter.method | adapter.rank |" in page and "4 of 4 runs" in page
    # The day of a finished run does not matter, nor what changes no number.
    for same in ({}, {"train.log_every": 7}):
        assert run_grid(override(base, same), GRID, tmp_path / "s", console=False) == rows
    assert len(fake.runs) == 4
    # Other settings that decide the numbers, rows of the loss among them.
    for other in ({"train.steps": 9}, {"eval.limit": 3}):
        run_grid(override(base, other), GRID, tmp_path / "s", console=False)
    assert [run.train.steps for run in fake.runs[4:]] == [9] * 4 + [2] * 4
    # Where steps are saved, the rate of a longer run would jump.
    for name, _ in combinations(base, GRID):
        mark_saved(tmp_path / "s" / name, 2)
    longer = run_grid(override(base, {"train.steps": 20}), GRID, tmp_path / "s", console=False)
    message = "2 steps, of which 2 are done, and this one has train.steps=20"
    assert len(fake.runs) == 12 and all(message in row["status"] for row in longer)


def test_failures_are_rows(base, tmp_path, fake, caplog):
    """Settings that cannot be used, a loss that is not finite, too little memory, a model that is
    not there; the others run. The log says how each run ended, and failures are tried again.
    """
    caplog.set_level(logging.INFO, "zflora_jax")

    def loss(run):
        if run.optim.learning_rate == 1e30:
            raise NonFiniteError("the loss is nan")
        if run.adapter.rank == 5:
            raise MemoryError
        return 1.0

    fake.loss = loss
    settings = [
        {"optim.warmup_steps": 99},
        {"optim.learning_rate": 1e30},
        {"adapter.rank": np.int64(3), "optim.learning_rate": np.float64(1e-3)},
        {"adapter.rank": 5},
    ]
    rows = run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    said = ("warmup_steps=99", "the loss is nan", "finished", "failed: MemoryError")
    for row, why in zip(rows, said, strict=True):
        assert why in row["status"] and f"{row['run']}: {row['status']}" in caplog.messages
        assert row["status"].startswith("failed: ") == (why != "finished")
    assert type(rows[2]["adapter.rank"]) is int  # numpy's numbers are numbers
    assert "failed" in (tmp_path / "s" / "rows.md").read_text()
    fake.runs.clear()
    run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    assert [(run.adapter.rank, run.optim.learning_rate) for run in fake.runs] == [
        (base.adapter.rank, 1e30),
        (5, base.optim.learning_rate),
    ]


def test_models_and_targets_that_cannot_be_used_are_rows(base, tmp_path):
    settings = [{"model": str(tmp_path / "none")}, {"adapter.targets": "nothing"}]
    rows = run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    assert [row["status"].partition(":")[0] for row in rows] == ["failed", "failed"]
    assert "matches no kernel" in rows[1]["status"]


@pytest.mark.soak  # twins: test_failures_are_rows, and test_run's non-finite loss of a real run
def test_a_loss_that_is_not_finite_is_a_row_of_a_real_run(base, tmp_path):
    [row] = run_grid(base, [{"optim.learning_rate": 1e30}], tmp_path / "s", console=False)
    assert "failed" in row["status"] and "nan" in row["status"].lower()


def test_a_stopped_sweep_goes_on(base, tmp_path, monkeypatch, fake):
    def stopped(run, *args, **settings):
        if len(fake.runs) == 1:
            raise Preempted("stopped by a signal")
        return fake(run, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(grid, "train", stopped)
        with pytest.raises(Preempted):
            run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert len(json.loads((tmp_path / "s" / "rows.json").read_text())["rows"]) == 1
    rows = run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert len(fake.runs) == 4  # the first one was not run again
    # A signal after the last step of a run stops the others, too.
    late = lambda *a, **k: dataclasses.replace(fake(*a, **k), signalled=True)  # noqa: E731
    monkeypatch.setattr(grid, "train", late)
    with pytest.raises(Preempted, match="is saved, the same command goes on there"):
        run_grid(base, {"train.seed": [5, 6]}, tmp_path / "s", parallel=1, console=False)
    assert len(fake.runs) == 5


def test_each_run_at_one_time_has_its_own_devices(base, tmp_path, monkeypatch, fake):
    together = threading.Barrier(4, timeout=60)

    def waits(*args, **settings):
        together.wait()  # four are in here at one time
        return fake(*args, **settings)

    monkeypatch.setattr(grid, "train", waits)
    rows = run_grid(base, GRID, tmp_path / "a", parallel=4, console=False)
    assert len({devices[0] for devices in fake.devices}) == 4
    monkeypatch.setattr(grid, "train", fake)
    assert numbers(rows) == numbers(run_grid(base, GRID, tmp_path / "b", parallel=1, console=False))


def test_an_error_that_is_a_fault_of_ours_is_not_a_row(base, tmp_path, monkeypatch, fake):
    monkeypatch.setattr(grid, "train", lambda *_, **__: 1 // 0)
    for parallel in (1, 2):
        with pytest.raises(ZeroDivisionError):
            run_grid(base, GRID, tmp_path / "s", parallel=parallel, console=False)


def test_a_run_that_another_process_trains_is_left_to_it(base, tmp_path, monkeypatch, fake):
    """The others run meanwhile; then its report is read, or it is run."""
    names = [name for name, _ in combinations(base, GRID)]
    folder = tmp_path / "s" / names[0]
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))

        def sleep(seconds):
            assert len(fake.runs) == 3, "waits where there is work"
            stack.close()  # the other process ends

        monkeypatch.setattr(grid, "time", SimpleNamespace(sleep=sleep))
        rows = run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert [row["run"] for row in rows] == names and len(fake.runs) == 4
    assert fake.runs[-1].adapter.rank == rows[0]["adapter.rank"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "the grid is empty"),
        ({"adapter.rank": []}, "give a list of at least one value"),
        ({"adapter.rank": 4}, "give a list of at least one value"),
        ({"adapter.method": "lora"}, "give a list of at least one value"),
        ({"adapter.rnak": [4]}, "unknown key 'rnak'"),
        ({"adapter": [4]}, "is a group of settings"),
        ([{"adapter.rank": 4}, {"adapter.rank": 4}], "twice"),
    ],
    ids=str,
)
def test_wrong_grids(settings, message, base):
    with pytest.raises(ConfigError, match=message):
        combinations(base, settings)


def test_names_are_directories(base):
    assert combinations(base, {}) == [("base", {})]  # the product of nothing
    names = [name for name, _ in combinations(base, {"model": ["a/b", "a_b", "x" * 300]})]
    assert len(set(names)) == 3 and all("/" not in name and len(name) <= 120 for name in names)


@pytest.mark.parametrize(("mesh", "parallel", "most"), [({}, 9, 8), ({"mesh.fsdp": 4}, 3, 2)])
def test_more_at_one_time_than_devices_is_refused(mesh, parallel, most, base, tmp_path):
    base = override(base, mesh | {"data.batch_size": 8})
    with pytest.raises(ConfigError, match=rf"must be within 1\.\.{most}"):
        run_grid(base, GRID, tmp_path, parallel=parallel)


def test_a_base_is_loaded_once_for_each_device(base: RunConfig) -> None:
    bases, [first, second] = grid._Bases(), jax.devices()[:2]
    model = bases.of(base, [first])
    assert model is bases.of(override(base, {"train.seed": 1}), [first])
    assert bases.of(base, [second]) is not model
    assert bases.of(base, [first, second]) is None  # each run loads its slices


# --- the command ----------------------------------------------------------------------------------

CONFIG = """
import json
import zflora_jax as zf
from zflora_jax.core.fields import from_dict

def get_sweep():
    return zf.Grid(from_dict(zf.RunConfig, json.loads({base!r})), {{"adapter.rank": [2, 3]}})
"""


@pytest.fixture
def command(base, tmp_path):
    (tmp_path / "s.py").write_text(CONFIG.format(base=json.dumps(to_dict(base))))
    return ["sweep", "--config", str(tmp_path / "s.py"), "--workdir", str(tmp_path / "w")]


def test_the_command_runs_a_grid_with_changed_settings(command, tmp_path, capsys, fake):
    assert main([*command, "--set", "train.steps=3"]) == 0
    rows = json.loads((tmp_path / "w" / "rows.json").read_text())["rows"]
    assert [(row["adapter.rank"], row["steps"]) for row in rows] == [(2, 3), (3, 3)]
    assert "adapter.rank=3" in capsys.readouterr().out
    assert main([*command, "--set", "adapter.rank=9"]) == 2
    assert "--set adapter.rank: the grid gives it to each of its runs" in capsys.readouterr().err


def test_a_command_without_a_finished_run_fails(command, tmp_path, capsys, fake):
    assert main([*command, "--set", "optim.warmup_steps=99"]) == 2 and not fake.runs
    assert "optim.warmup_steps=99" in capsys.readouterr().err
