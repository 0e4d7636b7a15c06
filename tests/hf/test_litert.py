"""save_litert: what it refuses, which eps_z it takes, what its files compute where LiteRT is
installed, and that nothing half-written stays.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.models import perturb, tiny_fused, tiny_model

from zflora_jax import AdapterConfig, forward, fuse, init_adapters, quantize_model, save_litert
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.experiments.exporters import EXPORTERS
from zflora_jax.hf import litert_save
from zflora_jax.hf.litert_convert import fix_rope
from zflora_jax.hf.litert_save import QUANTS, check_target, int8_eps_z
from zflora_jax.hf.state_scale import choose_eps_z


def with_tokenizer(model: Model) -> Model:
    model.tokenizer = byte_tokenizer()
    return model


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert_save, "require_packages", lambda: None)


def stand_in(folder: Path, body: str) -> str:
    """A Python that runs `body` with the job as `job` instead of the conversion."""
    script = folder / "stand_in.py"
    script.write_text(f"import json, pathlib, sys\njob = json.loads(sys.argv[-1])\n{body}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_what_is_wrong_is_said_before_anything_is_made(tmp_path: Path, installed: None) -> None:
    there = tmp_path / "there.tflite"
    there.write_bytes(b"mine")
    for out, settings, words in (
        ("x.tflite", {"quant": "int4"}, "quant='int4' of a LiteRT file: .*f32, int8"),
        ("x.gguf", {}, r"ends in \.litertlm or \.tflite"),
        ("s3://bucket/x.tflite", {}, "not written to object storage"),
        ("x.tflite", {"context": 1}, "context=1: must be at least 2"),
    ):
        path = out if "://" in out else tmp_path / out
        with pytest.raises(ConfigError, match=words):
            check_target(path, **{"quant": "int8", **settings})
    with pytest.raises(CheckpointError, match="exists, and a LiteRT file replaces nothing"):
        check_target(there, "int8")
    model = tiny_model()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        save_litert(tmp_path / "x.tflite", model, context=64)
    with pytest.raises(ConfigError, match="made for at most"):
        save_litert(tmp_path / "x.tflite", with_tokenizer(model), context=1 << 20)
    with pytest.raises(ConfigError, match="this model has none"):
        save_litert(tmp_path / "x.tflite", model, context=64, eps_z=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["there.tflite"]
    assert there.read_bytes() == b"mine"


def test_missing_packages_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(litert_save, "PACKAGES", ("json", "no_such_runtime"))
    with pytest.raises(ConfigError, match=r"need no_such_runtime, .*zflora-jax\[litert\]"):
        EXPORTERS["litert"].check(tmp_path / "x.tflite", quant=None, context=None)
    check_target(tmp_path / "x.tflite", "f32", python="another")  # which may have them


def test_the_scale_of_the_state_is_for_the_rounding_of_the_file() -> None:
    base = tiny_model()
    adapter = AdapterConfig("zflora-minimal", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), base, adapter), std=0.02)
    fused = fuse(base, adapter, adapters)
    found = int8_eps_z(fused)
    assert found >= choose_eps_z(fused, "bfloat16") > choose_eps_z(fused, "float32")
    codes = fuse(quantize_model(base, QuantizeConfig("int8")), adapter, adapters)
    assert int8_eps_z(codes) == pytest.approx(found, rel=1)  # at most twice as large


COPY = "pathlib.Path(job['out']).write_text(json.dumps(job))"


@pytest.mark.parametrize("quant", list(QUANTS))
def test_the_job_of_the_conversion(quant: str, tmp_path: Path) -> None:
    """It gets an export of the model, and what it makes takes its place as a whole."""
    python = stand_in(tmp_path, COPY)
    model, out = with_tokenizer(tiny_fused("zflora-uniform")), tmp_path / "out" / "x.litertlm"
    report = save_litert(out, model, quant, context=64, python=python)
    job = json.loads(out.read_text())
    assert job["recipe"] == QUANTS[quant].recipe and job["context"] == job["prefill"] == 64
    wanted = int8_eps_z(model) if quant == "int8" else choose_eps_z(model, "float32")
    assert report["eps_z"] == wanted and report["bytes"] == out.stat().st_size
    assert "hidden 72" in report["widths"] and report["context"] == 64  # of 4 heads
    assert [path.name for path in out.parent.iterdir()] == ["x.litertlm"]
    with pytest.raises(CheckpointError, match="replaces nothing"):
        save_litert(out, model, quant, context=64, python=python)


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.tflite"
    python = stand_in(tmp_path, f"{COPY}\npathlib.Path({str(out)!r}).write_text('another')")
    with pytest.raises(CheckpointError, match="replaces nothing"):
        save_litert(out, with_tokenizer(tiny_model()), "f32", context=64, python=python)
    assert out.read_text() == "another" and list(out.parent.iterdir()) == [out]


def test_a_conversion_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    body = "pathlib.Path(job['out']).write_text('half'); sys.exit('no such operation')"
    folder, model = tmp_path / "out", with_tokenizer(tiny_model())
    for words, code in (("no such operation", body), ("exit status 0", "pass")):
        with pytest.raises(CheckpointError, match=words):
            save_litert(folder / "x.tflite", model, context=64, python=stand_in(tmp_path, code))
        assert not list(folder.iterdir())


def test_longrope_becomes_a_table_of_frequencies() -> None:
    class Module:
        def __init__(self, rope_type: str) -> None:
            self.rope_type = rope_type

    class Source:
        model: Any

    rope, other = Module("longrope"), Module("llama3")
    source = Source()
    source.model = type("M", (), {"modules": lambda self: [object(), rope, other]})()
    assert fix_rope(source, None, "made") == "made"
    assert (rope.rope_type, other.rope_type) == ("default", "llama3")


def test_the_files_compute_what_the_model_does(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in litert_save.PACKAGES):
        pytest.skip(f"needs: {litert_save.INSTALL}")  # importorskip would load torch here
    from zflora_jax.hf.litert_run import LiteRTModel

    model = with_tokenizer(tiny_fused("zflora-uniform"))
    ids = np.random.default_rng(0).integers(0, 256, 24).tolist()
    want = np.asarray(forward(model, np.asarray([ids], np.int32)))[0]
    for name, quant, tolerance in (("x.tflite", "f32", 1e-5), ("x.litertlm", "int8", 0.3)):
        save_litert(tmp_path / name, model, quant, context=32)
        file = LiteRTModel(tmp_path / name)
        assert np.abs(file.logits(ids) - want).max() <= tolerance * np.abs(want).max()
        file.clear()
        file.read(ids[:-1])  # in one piece
        assert np.abs(file.step(ids[-1], 23) - want[-1]).max() <= tolerance * np.abs(want).max()
        with pytest.raises(ValueError, match="the cache holds 32 tokens"):
            file.step(0, 32)
