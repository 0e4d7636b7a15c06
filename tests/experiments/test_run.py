"""Runs: training changes what it should, a stopped run goes on, bad states are refused. On a tiny
model with real files on disk; bit-equal resume is in tests/training.
"""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from support.checks import assert_logits_close
from support.grids import always
from support.runs import quiet_train

from zflora_jax import ConfigError, evaluate, export_run, forward, load_model, override, save_hf
from zflora_jax.adapters.fuse import fuse
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.errors import NonFiniteError, Preempted
from zflora_jax.experiments.restore import load_fused, load_run
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.trainer import step_of


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]


@pytest.fixture
def before_step(monkeypatch):
    """before_step(n, action) calls action(params) -> params ahead of step n of the next run."""

    def set_action(number, action):
        def wrapped(*args):
            step = step_of(*args)

            def run_step(params, state, batch):
                params = action(params) if int(state.step) + 1 == number else params
                return step(params, state, batch)

            return run_step

        monkeypatch.setattr("zflora_jax.training.group.step_of", wrapped)

    return set_action


@pytest.mark.parametrize("method", always(METHODS, lambda m: m == "zflora-uniform"))
def test_every_method_learns_and_exports(method, run, tmp_path):
    run = override(run, {"adapter.method": method, "train.steps": 6})
    trained = quiet_train(run, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.05
    report = export_run(tmp_path / "run", tmp_path / "out")
    assert report["top1_agreement"] == 1.0
    assert report["max_abs_dlogit"] <= 1e-5 * report["logit_scale"]
    tokens = np.asarray([[5, 6, 7, 8]], np.int32)
    adapted = forward(trained.model, tokens, run.adapter, trained.adapters)
    assert_logits_close(forward(load_model(str(tmp_path / "out")), tokens), adapted)
    result = evaluate(run, load_fused(tmp_path / "run")[0], out=tmp_path / "eval", console=False)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == result["rows"] == 4 and 0 <= result["accuracy"] <= 1
    assert {"prompt", "output", "prediction", "answer", "correct"} <= rows[0].keys()


@pytest.mark.usefixtures("own_programs")
def test_a_run_keeps_its_compiled_step(run, tmp_path):
    report = quiet_train(run, tmp_path / "run").report
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert list((tmp_path / "run" / "compile_cache").glob("jit_train_step-*"))
    assert 0 < report["first_step_seconds"] < report["seconds"]


def test_another_base_is_refused(run, base_dir, tmp_path):
    quiet_train(override(run, {"train.steps": 3}), tmp_path / "run")
    model = load_model(base_dir)
    model.params["final_norm"]["scale"] = model.params["final_norm"]["scale"] * 1.01
    save_hf(tmp_path / "other", model)
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(base_dir, str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="was trained on another base"):
        load_run(tmp_path / "run")


def test_other_data_is_refused(run, tmp_path):
    rows, file = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(40)], "rows.json"
    (tmp_path / file).write_text(json.dumps(rows))
    own = {"data.task": "rows", "data.data_dir": str(tmp_path / file), "train.steps": 4}
    run = override(run, own)
    quiet_train(run, tmp_path / "run")
    rows[3]["output"] = "something else"
    (tmp_path / file).write_text(json.dumps(rows))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="was trained on another data"):
        quiet_train(override(run, {"train.log_every": 3}), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_non_finite_loss_stops_with_the_step_named_and_the_checkpoint_intact(
    run, tmp_path, before_step, monkeypatch
):
    """The loss is NaN at step 6: steps 1 to 5 were good, step 4 was saved."""

    def poisoned(params):
        return trees.map_with_names(
            lambda name, x: x * np.float32("nan") if name == "final_norm/scale" else x, params
        )

    before_step(6, poisoned)
    with pytest.raises(NonFiniteError, match="loss is nan at step 6"):
        quiet_train(run, tmp_path)
    monkeypatch.undo()
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_run(tmp_path)[2]))
    assert quiet_train(run, tmp_path).report["resumed_from"] == 4


def test_bfloat16_run_trains_float32_adapters(run, tmp_path):
    run = override(run, {"train.dtype": "bfloat16", "train.remat": "block", "train.steps": 16})
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes dtypes in bfloat16
        trained = quiet_train(run, tmp_path)
        fused = fuse(trained.model, run.adapter, trained.adapters)
    assert {str(x.dtype) for x in jax.tree.leaves(trained.adapters)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(fused.params)} == {"bfloat16"}
    found = losses(tmp_path)
    assert found[-1] < found[0]


def test_a_signal_stops_after_the_step_and_the_handlers_are_put_back(
    run, tmp_path, before_step, monkeypatch
):
    def signalled(params):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return params

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    before_step(3, signalled)
    with pytest.raises(Preempted, match="stopped by a signal after step 3 of 8, which is saved in"):
        quiet_train(run, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    monkeypatch.undo()
    assert load_run(tmp_path)[3] == 3
    assert quiet_train(run, tmp_path).report["resumed_from"] == 3


def test_signals_wait_until_the_last_checkpoint_is_written(run, tmp_path, monkeypatch):
    """The run is not ended half-way."""
    real = Checkpoints.__exit__

    def signalled(self, *error):
        os.kill(os.getpid(), signal.SIGTERM)
        real(self, *error)

    monkeypatch.setattr(Checkpoints, "__exit__", signalled)
    trained = quiet_train(run, tmp_path)
    assert trained.report["steps"] == 8 and trained.signalled  # a sweep begins no other run
    monkeypatch.undo()
    assert not quiet_train(run, tmp_path).signalled
    assert load_run(tmp_path)[3] == 8
