"""Runs: training changes what it should, a killed run resumes bit for bit, bad states are refused.
On a tiny model with real files on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always
from support.paths import ROOT
from support.runs import quiet_train, small_run

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.errors import NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.data.dates import dated
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.restore import load_fused, load_run
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import load_peft
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.trainer import step_of
from zflora_jax.training.workdir import read_config


@pytest.mark.parametrize("method", always(METHODS, lambda m: m == "zflora-uniform"))
def test_every_method_learns_and_exports(method, run, tmp_path):
    run = override(run, {"adapter.method": method, "train.steps": 6})
    trained = quiet_train(run, tmp_path / "run")
    losses = [
        r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"
    ]
    assert losses[-1] < losses[0] - 0.05
    report = export_run(tmp_path / "run", tmp_path / "out")
    assert (
        report["top1_agreement"] == 1.0 and report["max_abs_dlogit"] <= 1e-5 * report["logit_scale"]
    )
    tokens = np.asarray([[5, 6, 7, 8]], np.int32)
    assert_logits_close(
        forward(load_model(str(tmp_path / "out")), tokens),
        forward(trained.model, tokens, run.adapter, trained.adapters),
    )
    result = evaluate(run, load_fused(tmp_path / "run")[0], out=tmp_path / "eval", console=False)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == result["rows"] == 4 and 0 <= result["accuracy"] <= 1
    assert {"prompt", "output", "prediction", "answer", "correct"} <= rows[0].keys()


def test_the_loss_does_not_depend_on_accumulation(run, tmp_path):
    """Micro-batches hold different numbers of target tokens; a mean of means would differ."""
    losses = []
    run = override(run, {"train.steps": 4})
    for accumulate in (1, 2, 4):
        quiet_train(
            override(run, {"data.grad_accum_steps": accumulate}), tmp_path / str(accumulate)
        )
        losses.append(
            [
                r["loss"]
                for r in read_metrics(tmp_path / str(accumulate) / "metrics.jsonl")
                if r["split"] == "train"
            ]
        )
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


@pytest.fixture(scope="module")
def finished_run(base_dir, tmp_path_factory):
    run, folder = small_run(base_dir), tmp_path_factory.mktemp("finished") / "run"
    quiet_train(run, folder)
    return folder


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of a run that has ended, and its adapters."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run", load_run(finished_run)[2]


def test_a_finished_run_is_loaded_not_trained(run, finished, caplog):
    workdir, adapters = finished
    report = json.loads((workdir / "report.json").read_text())
    caplog.set_level("INFO", logger="zflora_jax")
    again = quiet_train(run, workdir)
    assert_trees_equal(again.adapters, adapters)
    assert again.report == json.loads((workdir / "report.json").read_text()) == report
    assert "is finished" in caplog.text


@pytest.mark.usefixtures("own_programs")
def test_a_run_keeps_its_compiled_step_and_says_where_time_went(run, tmp_path):
    """The step alone takes longer to compile than what is not kept."""
    report = quiet_train(run, tmp_path / "run").report
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert [
        entry.name.startswith("jit_train_step-")
        for entry in (tmp_path / "run" / "compile_cache").glob("jit_train_step*")
    ]
    assert (
        0
        < report["load_seconds"] + report["data_seconds"]
        < report["first_step_seconds"]
        < report["seconds"]
    )


def test_another_config_is_refused_and_nothing_is_lost(run, finished):
    workdir, adapters = finished
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.01 there, 0\.002 now"):
        quiet_train(override(run, {"optim.learning_rate": 2e-3}), workdir)
    assert read_config(workdir) == dated(run)
    assert_trees_equal(
        quiet_train(override(run, {"eval.limit": 2, "train.log_every": 3}), workdir).adapters,
        adapters,
    )


def test_another_base_is_refused(finished, base_dir, tmp_path):
    model = load_model(base_dir)
    model.params["final_norm"]["scale"] = model.params["final_norm"]["scale"] * 1.01
    save_hf(tmp_path / "other", model)
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(base_dir, str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="was trained on another base"):
        load_run(tmp_path / "run")


def test_non_finite_loss_stops_with_the_step_named_and_the_checkpoint_intact(
    run, tmp_path, monkeypatch
):
    """A batch that makes the loss NaN at step 6: steps 1 to 5 were good, step 4 was saved."""
    real = step_of

    def poisoned(*args, **kwargs):
        step = real(*args, **kwargs)

        def run_step(params, state, batch):
            if int(state.step) == 5:
                params = trees.map_with_names(
                    lambda name, x: x * np.float32("nan") if name == "final_norm/scale" else x,
                    params,
                )
            return step(params, state, batch)

        return run_step

    monkeypatch.setattr("zflora_jax.experiments.train.step_of", poisoned)
    with pytest.raises(NonFiniteError, match="loss is nan at step 6"):
        quiet_train(run, tmp_path)
    monkeypatch.undo()
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_run(tmp_path)[2]))
    assert quiet_train(run, tmp_path).report["resumed_from"] == 4


def test_lora_run_exports_to_peft_and_back(run, base_dir, tmp_path):
    run = override(run, {"adapter.method": "lora", "train.steps": 4})
    trained = quiet_train(run, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "peft", format="peft")
    adapter, adapters = load_peft(tmp_path / "peft", load_model(base_dir))
    assert adapter.scale == run.adapter.scale
    assert_trees_equal(adapters, trained.adapters)


def test_bfloat16_run_trains_float32_adapters(run, tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes dtypes in bfloat16
        trained = quiet_train(
            override(run, {"train.dtype": "bfloat16", "train.remat": "block"}), tmp_path
        )
        assert all(x.dtype == np.float32 for x in jax.tree.leaves(trained.adapters))
        assert all(
            str(x.dtype) == "bfloat16"
            for x in jax.tree.leaves(fuse(trained.model, run.adapter, trained.adapters).params)
        )
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert losses[-1] < losses[0]


def test_other_data_is_refused(run, tmp_path):
    """A run on a JSON file that has changed since does not go on with it in silence."""
    rows = [
        {"instruction": f"Say {i}.", "input": "", "output": f"{i}", "answer": f"{i}"}
        for i in range(40)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    run = override(
        run, {"data.task": "rows", "data.data_dir": str(tmp_path / "data"), "train.steps": 4}
    )
    quiet_train(run, tmp_path / "run")
    rows[3]["output"] = "something else"
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match="was trained on another data"):
        quiet_train(run, tmp_path / "run")


def test_two_processes_on_one_workdir(run, tmp_path):
    with (
        locked_by_another_process(tmp_path),
        pytest.raises(ConfigError, match="is being trained by another process"),
    ):
        quiet_train(run, tmp_path)
    assert not (tmp_path / "config.json").exists()  # what the other process wrote stays


@contextmanager
def locked_by_another_process(workdir: Path):
    program = (
        "import sys, time; from zflora_jax.training.lock import locked\nwith"
        " locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(workdir)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"held\n"  # type: ignore[union-attr]
        yield
        process.stdin.close()  # type: ignore[union-attr]


def test_an_export_with_widened_streams_is_no_base(run, tmp_path):
    model = load_model(run.model)
    adapters = init_adapters(jax.random.key(0), model, run.adapter)
    save_hf(tmp_path / "out", fuse(model, run.adapter, adapters))
    with pytest.raises(ConfigError, match="zflora-minimal fused in"):
        quiet_train(override(run, {"model": str(tmp_path / "out")}), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_bad_targets_claim_no_workdir(run, tmp_path):
    with pytest.raises(ConfigError, match="matches no kernel"):
        quiet_train(override(run, {"adapter.targets": "zzz"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_stops_after_the_step_and_the_handlers_are_put_back(run, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    real = step_of

    def signalled(*args, **kwargs):
        step = real(*args, **kwargs)

        def run_step(params, state, batch):
            if int(state.step) == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
            return step(params, state, batch)

        return run_step

    monkeypatch.setattr("zflora_jax.experiments.train.step_of", signalled)
    with pytest.raises(Preempted, match="stopped by a signal after step 3 of 8, which is saved in"):
        quiet_train(run, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    monkeypatch.undo()
    assert load_run(tmp_path)[3] == 3
    assert quiet_train(run, tmp_path).report["resumed_from"] == 3


def test_signals_wait_until_the_last_checkpoint_is_written(run, tmp_path, monkeypatch):
    """SIGTERM when the last save may still be being written: it is finished, and the run is not
    ended half-way.
    """
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
