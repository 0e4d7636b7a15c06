"""benchmarks/on_device.py without its runtimes: page, figures, and what it refuses to time."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import ROOT

LABELS = ("base", "LoRA un-merged", "LoRA merged", "zflora-minimal", "zflora-uniform")
SCRIPT = ROOT / "benchmarks" / "on_device.py"


@pytest.fixture(scope="module")
def on_device() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        return importlib.import_module("on_device")


def test_the_page_has_a_row_for_each_file_over_the_base_of_its_type(
    on_device: Any, tmp_path: Path
) -> None:
    from zflora_jax.reporting.provenance import environment

    rows = []
    for kind, scale in (("f32", 4.0), ("q4_1", 1.0)):
        for i, label in enumerate(LABELS):
            row = {"type": kind, "": label, "bytes": int(scale * (100 + i) * 1e6)}
            for name in on_device.KINDS:
                value = {"_min": 1.0, "_max": 3.0, "_ratio": 1 + i / 8, "": 2.0}
                row |= {f"{name}{suffix}": x for suffix, x in value.items()}
            rows.append(row)
    settings = {"prompt": 128, "new_tokens": 64, "rounds": 3}
    parts = [{"types": ["f32"], "environment": environment()}]
    result = {"rows": rows, "settings": settings, "parts": parts}
    lines = on_device.page(result).splitlines()
    [line] = [line for line in lines if line.startswith("| q4_1 | zflora-uniform")]
    assert "104.0" in line and "1.040" in line and "1.500" in line and "2.0 [1.0, 3.0]" in line
    on_device.draw(result, str(tmp_path / "x"))
    assert {path.name for path in tmp_path.glob("*.png")} == {"x-ttft.png", "x-tpot.png"}


def test_a_lora_that_is_not_applied_is_not_timed(on_device: Any) -> None:
    tokens = {on_device.BASE: [1, 2, 3], on_device.BESIDE: [1, 2, 3]}
    with pytest.raises(SystemExit, match="changes no token"):
        on_device.check_lora(tokens, None)
    tokens[on_device.BESIDE] = [1, 4, 3]
    on_device.check_lora(tokens, [1, 4, 3])
    with pytest.raises(SystemExit, match="of 3 tokens of LoRA beside the base 2 are ours"):
        on_device.check_lora(tokens, [1, 4, 5])


def test_a_worker_that_cannot_start_says_why(on_device: Any, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho xllamacpp is not installed >&2; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"cannot run.*\n.*xllamacpp is not installed"):
        on_device.Worker(str(python), {"gguf": "x.gguf", "lora": None}, 8)


def test_the_types_are_those_of_the_runtimes_given(
    on_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    given = {"--python": on_device.TYPES, "--litert-python": tuple(on_device.LITERT)}
    for option, kinds in given.items():
        monkeypatch.setattr(sys, "argv", ["on_device.py", option, sys.executable])
        assert tuple(on_device.parse_args().types) == kinds
    both = ["on_device.py", *(word for option in given for word in (option, sys.executable))]
    monkeypatch.setattr(sys, "argv", both)
    assert len(on_device.parse_args().types) == 7


def test_a_turn_of_litert_is_timed_as_one_of_llama_cpp() -> None:
    from litert_worker import timed

    class Counting:
        """A model whose likeliest token is the position."""

        def clear(self) -> None:
            self.seen: list[int] = []

        def read(self, ids: list[int]) -> None:
            self.seen += ids

        def step(self, token: int, position: int) -> Any:
            assert position == len(self.seen)
            self.seen.append(token)
            return np.arange(100) == position

    model = Counting()
    row = timed(model, [7, 8, 9], 4)
    assert row["tokens"] == [2, 3, 4, 5] and model.seen == [7, 8, 9, 2, 3, 4]
    assert all(row[name] >= 0 for name in ("ttft_ms", "tpot_ms", "ttft_cpu_ms", "tpot_cpu_ms"))


def test_types_that_are_not_measured_keep_their_rows(on_device: Any, tmp_path: Path) -> None:
    settings = {"prompt": 128, "new_tokens": 64, "rounds": 3}
    rows = [{"type": kind} for kind in ("f32", "q8_0", "litert f32")]
    parts = [
        {"types": ["f32", "q8_0"], "environment": "first"},
        {"types": ["litert f32"], "environment": "second"},
    ]
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"rows": rows, "settings": settings, "parts": parts}))
    args = argparse.Namespace(out=str(tmp_path / "x"), types=["litert f32", "q8_0"])
    assert on_device.kept(args, settings) == {
        "rows": [{"type": "f32"}],
        "parts": [{"types": ["f32"], "environment": "first"}],
    }
    with pytest.raises(SystemExit, match="Give the same settings, or another --out"):
        on_device.kept(args, settings | {"rounds": 5})
    args.types = ["f32", "q8_0", "litert f32"]
    assert on_device.kept(args, settings | {"rounds": 5}) == {"rows": [], "parts": []}
