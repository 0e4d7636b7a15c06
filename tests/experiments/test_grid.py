"""Sweeps over a grid: a row per run, failures too; not run again; `zflora sweep`."""

import dataclasses
import json
import logging
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_train import FakeTrain, loss_of
from support.runs import mark_saved

from zflora_jax import NonFiniteError, Preempted, RunConfig, locked
from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.experiments import grid
from zflora_jax.experiments.grid import combinations, run_grid, sweep
from zflora_jax.nn.quantize_model import is_quantized

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
    monkeypatch.setattr(grid, "_base", lambda _: None)
    return fake


def test_every_combination_is_a_row_and_is_not_run_again(base, tmp_path, fake, capsys):
    frame = sweep(base, GRID, tmp_path / "s")
    assert "run 4 of 4: adapter.method=zflora-minimal,adapter.rank=4\n" in capsys.readouterr().out
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
    """Settings that cannot be used, a loss that is not finite, too little memory; the others run.
    The log says how each run ended, and failures are tried again.
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
    rows = run_grid(base, settings, tmp_path / "s", console=False)
    said = ("warmup_steps=99", "the loss is nan", "finished", "failed: MemoryError")
    for row, why in zip(rows, said, strict=True):
        assert why in row["status"] and f"{row['run']}: {row['status']}" in caplog.messages
        assert row["status"].startswith("failed: ") == (why != "finished")
    assert type(rows[2]["adapter.rank"]) is int  # numpy's numbers are numbers
    assert "failed" in (tmp_path / "s" / "rows.md").read_text()
    fake.runs.clear()
    run_grid(base, settings, tmp_path / "s", console=False)
    assert [run.adapter.rank for run in fake.runs] == [base.adapter.rank, 5]


def test_a_signal_after_the_last_step_and_a_fault_of_ours_end_a_sweep(
    base, tmp_path, monkeypatch, fake
):
    late = lambda *a, **k: dataclasses.replace(fake(*a, **k), signalled=True)  # noqa: E731
    monkeypatch.setattr(grid, "train", late)
    with pytest.raises(Preempted, match="is saved, the same command resumes it"):
        run_grid(base, GRID, tmp_path / "s", console=False)
    assert len(fake.runs) == 1
    monkeypatch.setattr(grid, "train", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_grid(base, GRID, tmp_path / "s", console=False)


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
        rows = run_grid(base, GRID, tmp_path / "s", console=False)
    assert [row["run"] for row in rows] == names and len(fake.runs) == 4
    assert fake.runs[-1].adapter.rank == rows[0]["adapter.rank"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "the grid is empty"),
        ("abc", "the grid is 'abc': give a table of lists"),
        (None, "the grid is None: give a table of lists"),
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


def test_joined_processes_do_not_share_a_sweep(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="JAX has joined 2 here: train its runs one by one"):
        run_grid(base, GRID, tmp_path / "s")


def test_names_are_directories(base):
    assert combinations(base, {}) == [("base", {})]  # the product of nothing
    names = [name for name, _ in combinations(base, {"model": ["a/b", "a_b", "x" * 300]})]
    assert len(set(names)) == 3 and all("/" not in name and len(name) <= 120 for name in names)


def test_runs_share_a_base_that_is_stored_alike(base, tmp_path, monkeypatch):
    models, fake = [], FakeTrain()
    monkeypatch.setattr(grid, "train", lambda *a, model, **k: models.append(model) or fake(*a, **k))
    settings = {"quantize.kernels": ["none", "int8"], "train.seed": [0, 1]}
    run_grid(base, settings, tmp_path, console=False)
    assert models[0] is models[1] and models[2] is models[3]
    assert not is_quantized(models[0]) and is_quantized(models[2])
    mesh = override(base, {"mesh.fsdp": 2, "data.batch_size": 8})
    run_grid(mesh, {"train.seed": [0, 1]}, tmp_path / "mesh", console=False)
    assert models[-1] is models[-2]
    kernel = models[-1].params["layers"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 2 and not kernel.is_fully_replicated


# --- the command ----------------------------------------------------------------------------------

CONFIG = """
import json
import zflora_jax as zf
from zflora_jax.core.fields import from_dict

def get_sweep():
    return from_dict(zf.RunConfig, json.loads({base!r})), {{"adapter.rank": [2, 3]}}
"""


def test_the_command_runs_a_grid_with_changed_settings(base, tmp_path, capsys, fake):
    (tmp_path / "s.py").write_text(CONFIG.format(base=json.dumps(to_dict(base))))
    command = ["sweep", "--config", str(tmp_path / "s.py"), "--workdir", str(tmp_path / "w")]
    assert main([*command, "--set", "optim.warmup_steps=99"]) == 2 and not fake.runs
    assert "optim.warmup_steps=99" in capsys.readouterr().err  # no run has finished
    assert main([*command, "--together", "2", "--set", "train.steps=3"]) == 0
    assert main([*command, "--together", "0"]) == 2
    rows = json.loads((tmp_path / "w" / "rows.json").read_text())["rows"]
    assert [(row["adapter.rank"], row["steps"]) for row in rows] == [(2, 3), (3, 3)]
    assert "adapter.rank=3" in capsys.readouterr().out
    assert main([*command, "--set", "adapter.rank=9"]) == 2
    assert "--set adapter.rank: the grid sets it for each of its runs" in capsys.readouterr().err
