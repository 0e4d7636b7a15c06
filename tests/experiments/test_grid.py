"""Sweeps over a grid: a row per run, failures too; not run again; side by side on several devices
with the numbers of one.
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
from zflora_jax.experiments import grid, jobs
from zflora_jax.experiments.grid import RECORD, combinations, run_grid, sweep
from zflora_jax.experiments.store import EXTRA, model_digest
from zflora_jax.parallel import distributed
from zflora_jax.training.lock import locked


@pytest.fixture
def base(run: RunConfig) -> RunConfig:
    train = dataclasses.replace(run.train, steps=2, save_every=None)
    return dataclasses.replace(
        run,
        train=train,
        data=dataclasses.replace(run.data, train_limit=12),
        optim=dataclasses.replace(run.optim, warmup_steps=1),
    )


GRID = {"adapter.method": ["lora", "zflora-minimal"], "adapter.rank": [2, 4]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    """Runs are not trained, and their base is not loaded."""
    fake = FakeTrain()
    monkeypatch.setattr(jobs, "train", fake)
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
    changed = {"train.steps": 8, "train.log_every": 1}
    base, two = override(base, changed), {"train.seed": [0, 1]}
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
    assert not list((tmp_path / "s").glob(f"*/{RECORD}"))
    monkeypatch.setattr(distributed.StopSignals, "requested", original)

    def extra(run, trained):
        leaves = map(np.asarray, jax.tree.leaves(trained.adapters))
        return {"norm": float(sum(np.abs(leaf).sum() for leaf in leaves))}

    frame = sweep(base, two, tmp_path / "s", extra=extra, parallel=2)
    assert isinstance(frame, pandas.DataFrame) and frame["run"].is_unique
    assert list(frame["train.seed"]) == [0, 1]
    assert set(frame["status"]) == {"finished"} and frame["test_loss"].nunique() == 2
    assert (frame["norm"] > 0).all() and (frame["seconds"] > 0).all()
    assert (tmp_path / "s" / "curves.png").is_file() and (tmp_path / "s" / "curves.svg").is_file()
    assert sys.stdout is stdout
    monkeypatch.setattr(grid, "training_curves", lambda *_: None)
    rows = frame.to_dict("records")
    alone = run_grid(base, two, tmp_path / "alone", parallel=1, console=False)
    assert numbers(rows) == numbers(alone)
    monkeypatch.setattr(jobs, "train", lambda *_, **__: pytest.fail("trained again"))
    again = run_grid(base, two, tmp_path / "s", parallel=1, console=False)
    assert again == rows


def test_every_combination_is_a_row_and_is_not_run_again(base, tmp_path, fake):
    more = {"failed": 1, "cpu_count": 64, "day": "2026-11-26"}  # two names of a record's own
    frame = sweep(
        base, GRID, tmp_path / "s", extra=lambda run, _: more | {"day": run.data.date}, parallel=1
    )
    assert list(frame["adapter.method"]) == ["lora"] * 2 + ["zflora-minimal"] * 2
    assert list(frame["adapter.rank"]) == [2, 4, 2, 4] and set(frame["status"]) == {"finished"}
    assert EXTRA not in frame.columns
    assert {name: set(frame[name]) for name in more} == {n: {v} for n, v in more.items()}
    assert list(frame["test_loss"]) == [loss_of(run) for run in fake.runs]
    assert frame["test_loss"].nunique() == 4 and frame["device"].notna().all()
    whole = json.loads((tmp_path / "s" / "rows.json").read_text())
    assert whole["rows"] == frame.to_dict("records")
    page = (tmp_path / "s" / "rows.md").read_text()
    assert "| adapter.method | adapter.rank |" in page and "4 of 4 runs" in page
    assert "Runs made at commit c0ffee, device cpu, jax 0.10.2 (4)." in page
    again = run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert again == frame.to_dict("records") and len(fake.runs) == 4
    # Other settings that decide the numbers: another run.
    run_grid(override(base, {"train.log_every": 7}), GRID, tmp_path / "s", console=False)
    assert len(fake.runs) == 4
    run_grid(override(base, {"train.steps": 9}), GRID, tmp_path / "s", console=False)
    assert len(fake.runs) == 8
    # Where steps are saved, the rate of a longer run would jump.
    for run, (name, _) in zip(fake.runs[4:], combinations(base, GRID), strict=True):
        mark_saved(tmp_path / "s" / name, 9)
        (tmp_path / "s" / name / "config.json").write_text(json.dumps(to_dict(run)))
    rows = run_grid(override(base, {"train.steps": 20}), GRID, tmp_path / "s", console=False)
    assert len(fake.runs) == 8
    assert all(
        "9 steps, of which 9 are done, and this one has train.steps=20" in row["status"]
        for row in rows
    )


def test_failures_are_rows(base, tmp_path, monkeypatch, caplog):
    """Settings that cannot be used, and a loss that is no number, which is not tried again; the
    others run. The log says how each run ended.
    """
    caplog.set_level(logging.INFO, "zflora_jax")

    def loss(run):
        if run.optim.learning_rate == 1e30:
            raise NonFiniteError("the loss is nan")
        if run.adapter.rank == 5:
            raise MemoryError
        return 1.0

    fake = FakeTrain(loss)
    monkeypatch.setattr(jobs, "train", fake)
    settings = [
        {"adapter.targets": "nothing"},
        {"optim.learning_rate": 1e30},
        {"adapter.rank": 3},
        {"adapter.rank": 5},
        {"optim.warmup_steps": 99},
    ]
    rows = run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    names = [row["run"] for row in rows]
    assert [row["status"].partition(":")[0] for row in rows] == [
        "failed",
        "failed",
        "finished",
        "failed",
        "failed",
    ]
    for row, why in zip(
        rows,
        ("matches no kernel", "the loss is nan", "finished", "MemoryError", "warmup_steps=99"),
        strict=True,
    ):
        assert why in row["status"]
        assert f"{row['run']}: {row['status']}" in caplog.messages
    recorded = [(tmp_path / "s" / name / RECORD).is_file() for name in names]
    assert recorded == [False, True, True, False, False]
    assert "failed" in (tmp_path / "s" / "rows.md").read_text()
    tried = len(fake.runs)
    run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    assert [run.adapter.rank for run in fake.runs[tried:]] == [5]  # memory may suffice now


@pytest.mark.soak  # twins: test_failures_are_rows, and test_run's non-finite loss of a real run
def test_a_loss_that_is_no_number_is_a_row_of_a_real_run(base, tmp_path):
    [row] = run_grid(base, [{"optim.learning_rate": 1e30}], tmp_path / "s", console=False)
    assert "failed" in row["status"] and "nan" in row["status"].lower()


def test_a_stopped_sweep_goes_on(base, tmp_path, monkeypatch, fake):
    def stopped(run, *args, **settings):
        if len(fake.runs) == 1:
            raise Preempted("stopped by a signal")
        return fake(run, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train", stopped)
        with pytest.raises(Preempted):
            run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert len(json.loads((tmp_path / "s" / "rows.json").read_text())["rows"]) == 1
    rows = run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert len(fake.runs) == 4  # the first one was not run again


def test_each_run_at_one_time_has_its_own_devices(base, tmp_path, monkeypatch, fake):
    together = threading.Barrier(4, timeout=60)

    def waits(*args, **settings):
        together.wait()  # four are in here at one time
        return fake(*args, **settings)

    monkeypatch.setattr(jobs, "train", waits)
    rows = run_grid(base, GRID, tmp_path / "a", parallel=4, console=False)
    assert len({devices[0] for devices in fake.devices}) == 4
    monkeypatch.setattr(jobs, "train", fake)
    assert numbers(rows) == numbers(run_grid(base, GRID, tmp_path / "b", parallel=1, console=False))


def test_an_error_that_is_a_fault_of_ours_is_not_a_row(base, tmp_path, monkeypatch, fake):
    monkeypatch.setattr(jobs, "train", lambda *_, **__: 1 // 0)
    for parallel in (1, 2):
        with pytest.raises(ZeroDivisionError):
            run_grid(base, GRID, tmp_path / "s", parallel=parallel, console=False)


def test_a_run_that_another_process_trains_is_left_to_it(base, tmp_path, monkeypatch, fake):
    """The others run meanwhile; its record is then read, or it is run."""
    names = [name for name, _ in combinations(base, GRID)]
    folder = tmp_path / "s" / names[0]
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))

        def sleep(seconds):
            assert len(fake.runs) == 3, "waits where there is work"
            stack.close()  # the other process ends

        monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=sleep))
        rows = run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert [row["run"] for row in rows] == names and len(fake.runs) == 4
    assert fake.runs[-1].adapter.rank == rows[0]["adapter.rank"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the grid is empty|twice"),
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
    if settings == {}:
        # The product of nothing: the base alone.
        assert combinations(base, settings) == [("base", {})]
        return
    with pytest.raises(ConfigError, match=message):
        combinations(base, settings)


def test_names_are_directories(base):
    names = [name for name, _ in combinations(base, {"model": ["a/b", "a_b", "x" * 300]})]
    assert len(set(names)) == 3 and all("/" not in name and len(name) <= 120 for name in names)


def test_more_at_one_time_than_devices_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match=r"must be within 1\.\.8"):
        run_grid(base, GRID, tmp_path, parallel=9)
    with pytest.raises(ConfigError, match=r"must be within 1\.\.2"):
        run_grid(
            dataclasses.replace(
                base,
                mesh=dataclasses.replace(base.mesh, fsdp=4),
                data=dataclasses.replace(base.data, batch_size=8),
            ),
            GRID,
            tmp_path,
            parallel=3,
        )


CONFIG = """
import json
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.fields import from_dict
from zflora_jax.experiments.grid import Grid

def get_sweep():
    return Grid("ranks", from_dict(RunConfig, json.loads({base!r})), {{"adapter.rank": [2, 3]}})
"""


def test_the_command_writes_a_page(base, tmp_path, capsys, fake):
    from zflora_jax.core.fields import to_dict

    (tmp_path / "s.py").write_text(CONFIG.format(base=json.dumps(to_dict(base))))
    command = [
        "sweep",
        "--config",
        str(tmp_path / "s.py"),
        "--workdir",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path / "out"),
        "--set",
        "train.steps=3",
    ]
    assert main(command) == 0
    rows = json.loads((tmp_path / "out" / "ranks.json").read_text())["rows"]
    assert [row["adapter.rank"] for row in rows] == [2, 3] and all(
        row["steps"] == 3 for row in rows
    )
    assert (tmp_path / "out" / "ranks.md").is_file()


def test_a_model_that_is_not_there_is_a_row_and_numbers_of_numpy_are_numbers(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr(jobs, "train", FakeTrain())
    settings = [
        {"model": str(tmp_path / "none")},
        {"adapter.rank": np.int64(3), "optim.learning_rate": np.float64(1e-3)},
    ]
    rows = run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    assert [row["status"].partition(":")[0] for row in rows] == ["failed", "finished"]
    assert type(rows[1]["adapter.rank"]) is int


def test_a_base_that_stays_in_memory_has_the_hash_of_its_files(base: RunConfig) -> None:
    bases = grid._Bases()
    assert bases.of(base, jax.devices()[:1]) is not None
    assert bases.digests == {base.model: model_digest(base.model)} != {base.model: None}
    assert bases.of(base, jax.devices()[:2]) is None  # each run loads its slices
