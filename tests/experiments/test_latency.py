"""Decode latency: turns and ratios by a clock of the test; `zflora bench latency`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from support.models import tiny_model

from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError
from zflora_jax.experiments import latency
from zflora_jax.experiments.latency import decode_turns


class Clock:
    """Time that passes only where a contender says so; the machine halves its speed every turn."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[tuple[str, int]]()

    def contender(self, label: str, prefill: float, token: float) -> latency.Contender:
        def generate(count: int) -> None:
            slow = 2.0 ** max(0, (len(self.calls) - 4) // 4)  # four calls warm up, four are a turn
            self.calls.append((label, count))
            self.now += slow * (prefill + count * token)

        return latency.Contender(generate)


def test_turns_alternate_and_ratios_are_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, before = Clock(), list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    both = {"a": clock.contender("a", 0.1, 0.01), "b": clock.contender("b", 0.2, 0.03)}
    turns = decode_turns(both, new_tokens=5, repeats=3, before=before.append)
    assert [label for label, _ in clock.calls] == list("aabb" + "aabb" + "bbaa" + "aabb")
    assert [count for _, count in clock.calls] == [1, 5] * 8 and before == list("abbaab")
    np.testing.assert_allclose(turns["a"]["tpot_ms"], [10, 20, 40])
    np.testing.assert_allclose(turns["a"]["ttft_ms"], [110, 220, 440])
    assert latency.ratio(turns["b"]["tpot_ms"], turns["a"]["tpot_ms"]) == pytest.approx(3.0)
    found = latency.summary(turns["a"]["tpot_ms"], "x")
    assert found == pytest.approx({"x": 20, "x_min": 10, "x_max": 40})


@pytest.mark.soak
def test_latency_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latency.json"
    small = ["--model", "tiny", "--repeats", "2", "--prompt", "8", "--new-tokens", "3"]
    methods = ["lora", "zflora-minimal", "zflora-uniform"]
    given = [*small, "--rank", "4", "--methods", *methods, "--out", str(out)]
    assert main(["bench", "latency", *given]) == 0
    rows = json.loads(out.read_text())["rows"]
    labels = ["base", "lora unmerged", "lora merged", "zflora-minimal", "zflora-uniform"]
    assert [row["label"] for row in rows] == labels
    assert all(row["tpot_ms_min"] <= row["tpot_ms"] <= row["tpot_ms_max"] for row in rows)
    assert all(row["ttft_ms"] > 0 and row["compile_s"] > 0 for row in rows)
    by_label = {row["label"]: row for row in rows}
    assert by_label["base"]["tpot_ratio"] == 1.0
    memory = [by_label[name]["memory_mb"] for name in ("base", "zflora-minimal", "zflora-uniform")]
    assert memory[0] < memory[1] < memory[2]
    assert "| zflora-minimal |" in capsys.readouterr().out


def test_contenders_decode_what_they_are_called(tmp_path: Path) -> None:
    """In bfloat16; a merge by addition is the base again."""
    base = latency.random_base(tiny_model().config, "bfloat16")
    ready = latency.contenders(base, ["lora", "zflora-minimal"], 4, (2, 8, 3))
    assert ready["lora merged"] is ready["base"]
    shapes = {label: np.shape(one.generate(3)) for label, one in ready.items()}
    assert set(shapes.values()) == {(2, 3)}
    for wrong in ({"methods": ["full"]}, {"rank": 0}, {"new_tokens": 999}, {"new_tokens": 1}):
        with pytest.raises(ConfigError, match=r"full|rank=0|999 new tokens exceed|at least 2"):
            latency.method_latency(base, **wrong)
    assert main(["bench", "latency", "--out", str(tmp_path)]) == 2  # before it measures
