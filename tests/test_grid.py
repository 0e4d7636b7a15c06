"""Sweeps over a grid: a row per run, failures too; not run again; side by side on several devices
with the numbers of one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas
import pytest

from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments import grid
from zflora_jax.experiments.grid import RECORD, combinations, run_grid, sweep
from zflora_jax.parallel import distributed
from zflora_jax.parallel.distributed import Preempted


@pytest.fixture
def base(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    train = dataclasses.replace(run.train, steps=2, save_every=None)
    return dataclasses.replace(
        run,
        train=train,
        data=dataclasses.replace(run.data, train_limit=12),
        optim=dataclasses.replace(run.optim, warmup_steps=1),
    )


GRID = {"adapter.method": ["lora", "zflora-minimal"], "adapter.rank": [2, 4]}


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["run"], row["status"], row["params_trainable"], row["test_loss"]) for row in rows]


def test_every_combination_is_a_row_and_is_not_run_again(base, tmp_path, monkeypatch):
    seen = []

    def extra(run, trained):
        return {"norm": float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(trained.adapters)))}

    frame = sweep(base, GRID, tmp_path / "s", extra=extra, parallel=1)
    assert (
        isinstance(frame, pandas.DataFrame)
        and list(frame["adapter.method"]) == ["lora"] * 2 + ["zflora-minimal"] * 2
    )
    assert (
        list(frame["adapter.rank"]) == [2, 4, 2, 4]
        and set(frame["status"]) == {"finished"}
        and frame["run"].is_unique
    )
    assert (
        frame["test_loss"].nunique() == 4
        and (frame["norm"] > 0).all()
        and (frame["seconds"] > 0).all()
        and frame["device"].notna().all()
    )
    whole = json.loads((tmp_path / "s" / "rows.json").read_text())
    assert whole["rows"] == frame.to_dict("records")
    page = (tmp_path / "s" / "rows.md").read_text()
    assert "| adapter.method | adapter.rank |" in page and "4 of 4 runs" in page
    assert (tmp_path / "s" / "curves.png").is_file() and (tmp_path / "s" / "curves.svg").is_file()
    monkeypatch.setattr(
        grid, "train", lambda run, *_, **__: seen.append(run) or pytest.fail("trained again")
    )
    again = run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert numbers(again) == numbers(frame.to_dict("records")) and not seen


def test_failures_are_rows(base, tmp_path):
    """Settings that cannot be used, and a loss that is no number, which is not tried again; the
    others run.
    """
    rows = run_grid(
        base,
        [{"adapter.targets": "nothing"}, {"optim.learning_rate": 1e30}, {"adapter.rank": 3}],
        tmp_path / "s",
        parallel=1,
        console=False,
    )
    assert [row["status"].partition(":")[0] for row in rows] == ["failed", "failed", "finished"]
    assert (
        "matches no kernel" in rows[0]["status"] and "not finite" in rows[1]["status"].lower()
    ) or "nan" in rows[1]["status"].lower()
    assert (tmp_path / "s" / rows[1]["run"] / RECORD).is_file() and not (
        tmp_path / "s" / rows[0]["run"] / RECORD
    ).exists()
    assert "failed" in (tmp_path / "s" / "rows.md").read_text()


def test_a_stopped_sweep_goes_on(base, tmp_path, monkeypatch):
    original, calls = grid.train, []

    def stopped(run, *args, **settings):
        calls.append(run)
        if len(calls) == 2:
            raise Preempted("stopped by a signal")
        return original(run, *args, **settings)

    monkeypatch.setattr(grid, "train", stopped)
    with pytest.raises(Preempted):
        run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    assert (
        len(json.loads((tmp_path / "s" / "rows.json").read_text())["rows"]) == 1 and len(calls) == 2
    )
    assert [
        row["status"] for row in run_grid(base, GRID, tmp_path / "s", parallel=1, console=False)
    ] == ["finished"] * 4
    assert len(calls) == 5  # the first one was not run again


def test_side_by_side_gives_the_numbers_of_one_after_the_other(base, tmp_path, monkeypatch):
    used, original = set(), grid.train

    def seen(run, *args, devices, **settings):
        used.add(devices[0])
        return original(run, *args, devices=devices, **settings)

    monkeypatch.setattr(grid, "train", seen)
    together = run_grid(base, GRID, tmp_path / "a", parallel=4, console=False)
    assert len(used) == 4
    assert numbers(together) == numbers(
        run_grid(base, GRID, tmp_path / "b", parallel=1, console=False)
    )


def test_an_error_that_is_a_fault_of_ours_is_not_a_row(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "train", lambda *_, **__: 1 // 0)
    for parallel in (1, 2):
        with pytest.raises(ZeroDivisionError):
            run_grid(base, GRID, tmp_path / "s", parallel=parallel, console=False)


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


def test_the_command_writes_a_page(base, tmp_path, capsys):
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


def test_a_model_that_is_not_there_is_a_row_and_numbers_of_numpy_are_numbers(base, tmp_path):
    settings = [
        {"model": str(tmp_path / "none")},
        {"adapter.rank": np.int64(3), "optim.learning_rate": np.float64(1e-3)},
    ]
    rows = run_grid(base, settings, tmp_path / "s", parallel=1, console=False)
    assert [row["status"].partition(":")[0] for row in rows] == ["failed", "finished"]
    assert type(rows[1]["adapter.rank"]) is int


def test_a_signal_stops_runs_side_by_side_and_they_go_on(base, tmp_path, monkeypatch):
    """SIGTERM to a sweep of several threads: each run is saved after its step, and the sweep goes
    on from there to the same numbers.
    """
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=30))
    original, begun = distributed.StopSignals.requested, []

    def slowly(self, step):
        begun.append(step)
        if step >= 3:
            time.sleep(0.5)  # else the runs might be over before the signal comes
        return original(self, step)

    monkeypatch.setattr(distributed.StopSignals, "requested", slowly)

    def signal_later():
        while not [step for step in begun if step >= 3]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_later, daemon=True).start()
    with pytest.raises(Preempted, match="saved"):
        run_grid(base, GRID, tmp_path / "s", parallel=2, console=False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert list((tmp_path / "s").glob("*/checkpoints/*")) and not list(
        (tmp_path / "s").glob(f"*/{RECORD}")
    )
    monkeypatch.setattr(distributed.StopSignals, "requested", original)
    rows = run_grid(base, GRID, tmp_path / "s", parallel=2, console=False)
    assert numbers(rows) == numbers(
        run_grid(base, GRID, tmp_path / "whole", parallel=2, console=False)
    )


def test_the_output_of_the_process_is_whole_after_runs_side_by_side(base, tmp_path, capsys):
    before = sys.stdout
    run_grid(base, GRID, tmp_path / "s", parallel=4, console=False)
    assert sys.stdout is before
