"""`zflora plan --save` and `zflora train --step`: a run whose step was compiled before it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.needs import needs_libtpu
from support.runs import quiet_train, small_run

from zflora_jax import ConfigError, override, preset, train
from zflora_jax.experiments import saved_step
from zflora_jax.experiments.plan import memory_plan
from zflora_jax.experiments.saved_step import KEY
from zflora_jax.hf.load import model_config
from zflora_jax.parallel.targets import target
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.group import Group

# Those that a step depends on most: a widened head, a quantised base, a mesh
SETTINGS: dict[str, Any] = {
    "adapter.method": "zflora-uniform",
    "quantize.kernels": "int8",
    "mesh.fsdp": 2,
}
SETTINGS |= {"data.bucket_lengths": (160, 208)}  # the batches need both


def test_a_run_takes_the_saved_step_and_compiles_none(
    base_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = override(small_run(base_dir), SETTINGS), tmp_path / "a.step"
    total = memory_plan(run, model_config(base_dir), save=file)["compiled"]["bytes"]["total"]
    quiet_train(run, tmp_path / "compiled_here")
    monkeypatch.setattr(Group, "step_of", lambda *_: None)
    train(run, tmp_path / "a", console=False, compiled=file)
    places = (tmp_path / name / "metrics.jsonl" for name in ("compiled_here", "a"))
    here, saved = map(read_metrics, places)
    keys = ("step", "split", "loss", "grad_norm", "step_memory_bytes")
    assert [[r.get(k) for k in keys] for r in saved] == [[r.get(k) for k in keys] for r in here]
    lengths = {r["step_memory_bytes"] for r in saved if r["split"] == "train"}
    assert max(lengths) == total and len(lengths) == 2


def test_a_step_of_another_run_is_refused_before_anything_is_written(
    base_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, workdir = small_run(base_dir), tmp_path / "run"
    small = override(run, {"quantize.kernels": "nf4", "quantize.group": 32})
    with pytest.raises(ConfigError, match=r"codes of 4 bits\. Set quantize.kernels to int8"):
        memory_plan(small, preset("tiny").replace(head_dim=32), save=tmp_path / "a.step")
    assert not list(tmp_path.iterdir())
    memory_plan(run, model_config(base_dir), save=(file := tmp_path / "a.step"))
    (tmp_path / "text").write_text("no archive")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(file.read_bytes()[:1000])
    cases: list[tuple[dict[str, Any], Path, str]] = [
        ({"optim.learning_rate": 0.1}, file, r"optim\.learning_rate: 0\.01 there, 0\.1 here"),
        ({"data.batch_size": 8}, file, r"rows of 256 tokens(.|\n)*data\.batch_size: 4 there, 8"),
        ({"data.bucket_lengths": (256,)}, file, "data.bucket_lengths"),
        ({"mesh.data": 2}, file, "devices: 1 there, 2 here"),
        ({}, tmp_path / "nowhere", "holds no steps of `zflora plan --save`: .*No such file"),
        ({}, tmp_path / "text", "holds no steps of `zflora plan --save`: File is not a zip"),
        ({}, damaged, "holds no steps of `zflora plan --save`"),
    ]
    for changes, given, message in cases:
        with pytest.raises(ConfigError, match=message):
            train(override(run, changes), workdir, console=False, compiled=given)
    monkeypatch.setattr(saved_step, "version", lambda package: f"{package}-9")
    with pytest.raises(ConfigError, match=r"jax: \d.* there, jax-9 here(.|\n)*Write it again"):
        train(run, workdir, console=False, compiled=file)
    assert not workdir.exists()
    monkeypatch.undo()
    # What is evaluated and saved, and when, is no part of the step.
    other = override(run, {"eval.limit": 2, "train.save_every": 4, "train.max_to_keep": 1})
    assert train(other, workdir, console=False, compiled=file).report["steps"] == 8


@needs_libtpu
def test_a_step_for_absent_tpus(base_dir: str, tmp_path: Path) -> None:
    run = override(small_run(base_dir), {"mesh.fsdp": 4, "data.grad_accum_steps": 1})
    file, config = tmp_path / "a.step", preset("tiny")
    memory_plan(run, config, target("tpu:v5e:2x2"), save=file)
    with zipfile.ZipFile(file) as archive:
        assert {*archive.namelist()} == {KEY, "256", "320"}
        facts = json.loads(archive.read(KEY))["facts"]
    assert facts["device"] == "TPU v5 lite" and facts["devices"] == 4 and facts["libtpu"]
    with pytest.raises(ConfigError, match="device: TPU v5 lite there, cpu here"):
        train(run, tmp_path / "run", console=False, compiled=file)
