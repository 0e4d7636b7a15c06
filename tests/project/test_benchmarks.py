"""The scripts of benchmarks/ within the test's process: their tables, pages and refusals."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import peft_baselines
import pytest
import training
from decode_programs import read_bytes
from support.models import tiny_model
from support.paths import ROOT

from zflora_jax import ConfigError, pack_for_decode

BENCHMARKS = ROOT / "benchmarks"
Script = Callable[..., tuple[object, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a file of benchmarks/ within this process: exit code, stdout, stderr."""
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(name, "false")  # a script may set it: put back after the test

    def run(name: str, *given: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / name), *map(str, given)])
        capsys.readouterr()
        code: object = 0
        try:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_every_page_is_what_its_json_file_gives() -> None:
    command = [sys.executable, str(BENCHMARKS / "pages.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_latency_next_to_transformers_and_peft(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "bandwidth_meter", lambda: lambda: 1e9)
    out = tmp_path / "latency-1.5b"
    small = ["--model", "tiny", "--repeats", 2, "--prompts", 8, "--new-tokens", 3, "--ranks", 4]
    given = [*small, "--methods", "zflora-minimal", "--baselines", "--out", out]
    code, _, err = script("latency.py", *given)
    assert code == 0, err
    rows = {r["label"]: r for r in json.loads(Path(f"{out}.json").read_text())["rows"]}
    assert list(rows) == [
        *("base", "lora unmerged", "zflora-minimal", "transformers"),
        *("transformers + PEFT lora", "transformers + PEFT idle"),
    ]
    assert rows["base"]["bytes_ratio"] == 1 < rows["zflora-minimal"]["bytes_ratio"]
    assert rows["base"]["floor_ms"] == pytest.approx(rows["base"]["read_bytes"] / 1e6)
    assert "floor_ms" not in rows["transformers"]
    assert "zflora-minimal" in Path(f"{out}.md").read_text()
    assert Path(f"{out}-ratio.png").is_file()


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_are_those_of_all_weights_but_the_lookup(tied: bool) -> None:
    model = pack_for_decode(tiny_model(tie_word_embeddings=tied))
    weights, config = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)), model.config
    cache = 2 * 3 * config.num_layers * config.num_kv_heads * config.head_dim * 10 * 4
    lookup = 0 if tied else config.vocab_size * config.hidden_size * 4
    assert read_bytes({"params": model.params}, config, 3, 10) == weights - lookup + cache


@pytest.mark.soak
def test_training_next_to_peft(script: Script, tmp_path: Path) -> None:
    """With a process for each label's memory."""
    out = tmp_path / "train"
    small = ["--model", "tiny", "--repeats", 2, "--out", out, "--batch", 2, "--length", 16]
    code, _, err = script("training.py", *small, "--masked", 0.5, "--methods", "lora")
    assert code == 0, err
    rows = json.loads(Path(f"{out}.json").read_text())["float32"]["rows"]
    assert [row["label"] for row in rows] == ["lora", "PEFT lora"]
    assert rows[1]["step_ratio"] == 1.0 and rows[0]["loss"] == pytest.approx(rows[1]["loss"], 1e-4)
    assert all(row["peak_bytes"] > 1e8 and row["first_step_s"] > 0 for row in rows)
    assert "x PEFT" in Path(f"{out}.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, r"length=1: must be at least 2"),
        ({"masked": 1.0}, r"masked=1.0: a share of the positions, at least 0 and below 1"),
        ({"quantize": "keep"}, r"quantize=keep: Allowed: int4, int8"),
        ({"quantize": "int4"}, r"bitsandbytes has no int4: compare int8, nf4"),
    ],
)
def test_wrong_cases(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        peft_baselines.quantization(training.Case("tiny", **settings))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("latency.py", ["--new-tokens", "1"], "--new-tokens 1: give at least 2"),
        ("training.py", ["--repeats", "0"], "--repeats 0: give at least 1"),
        ("serving.py", ["--vllm", "nowhere"], "--vllm nowhere: give vLLM's command"),
        ("pages.py", ["nothing"], "no page nothing: choose from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_scripts_refuse_wrong_options_before_they_measure(
    name: str, given: list[str], message: str, script: Script, tmp_path: Path
) -> None:
    code, _, err = script(name, *given)
    assert code == 2 and message in err and not list(tmp_path.iterdir())
