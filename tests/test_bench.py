"""Benchmarks: turns and ratios on a clock of our own, what is counted, and the whole of both on a
tiny model beside transformers and PEFT.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_model

from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.bench import latency, timing, training
from zflora_jax.cli.main import main
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model_config import preset
from zflora_jax.nn.llama import random_model
from zflora_jax.reporting.provenance import environment


class Clock:
    """Time that passes only where a contender says so; the speed of the machine halves after every
    turn.
    """

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[tuple[str, int]]()

    def contender(self, label: str, prefill: float, token: float) -> timing.Contender:
        def generate(count: int) -> None:
            slow = 2.0 ** max(0, (len(self.calls) - 4) // 4)  # four calls warm up, four are a turn
            self.calls.append((label, count))
            self.now += slow * (prefill + count * token)

        return timing.Contender(generate)


def test_turns_alternate_and_ratios_are_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    both = {"a": clock.contender("a", 0.1, 0.01), "b": clock.contender("b", 0.2, 0.03)}
    turns = timing.decode_turns(both, new_tokens=5, repeats=3)
    assert [label for label, _ in clock.calls] == list("aabb" + "aabb" + "bbaa" + "aabb")
    assert [count for _, count in clock.calls] == [1, 5] * 8
    np.testing.assert_allclose(turns["a"]["tpot_ms"], [10, 20, 40])
    np.testing.assert_allclose(turns["a"]["ttft_ms"], [110, 220, 440])
    assert timing.ratio(turns["b"]["tpot_ms"], turns["a"]["tpot_ms"]) == pytest.approx(3.0)
    assert timing.summary(turns["a"]["tpot_ms"], "x") == pytest.approx(
        {"x": 20, "x_min": 10, "x_max": 40}
    )


def test_the_floor_is_measured_beside_every_contender_whose_bytes_are_known() -> None:
    quick = timing.Contender(lambda count: None, read_bytes=6_000_000)
    rates = iter([1e9, 2e9, 3e9])
    turns = timing.decode_turns(
        {"a": quick, "b": timing.Contender(lambda count: None)}, 2, 3, lambda: next(rates)
    )
    assert turns["a"]["floor_ms"] == [6.0, 3.0, 2.0] and "floor_ms" not in turns["b"]
    assert next(rates, None) is None
    assert timing.bandwidth_meter(size=2**22, repeats=1)() > 1e6


def test_bytes_read_are_those_of_all_weights_but_the_lookup() -> None:
    for tied in (True, False):
        model = pack_for_decode(tiny_model(tie_word_embeddings=tied))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        config = model.config
        cache = 2 * 3 * config.num_layers * config.num_kv_heads * config.head_dim * 10 * 4
        lookup = 0 if tied else config.vocab_size * config.hidden_size * 4
        assert (
            latency.read_bytes({"params": model.params}, config, 3, 10) == weights - lookup + cache
        )


def test_random_packed_has_the_shapes_of_a_packed_fused_model() -> None:
    model = tiny_model()
    config = fused_config(model.config, AdapterConfig("zflora-uniform", rank=8))

    want = pack_for_decode(random_model(config, jax.random.key(0)))
    found = latency.random_packed(config, "bfloat16")
    assert jax.tree.map(lambda leaf: leaf.shape, found.params) == jax.tree.map(
        lambda leaf: leaf.shape, want.params
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {
        "bfloat16"
    } and found.config.dtype == "bfloat16"


@pytest.mark.parametrize("real", [False, True])
def test_latency_table(real: bool, tmp_path: Path) -> None:
    source = tiny_model() if real else preset("tiny")
    methods = ["lora", "zflora-minimal", "zflora-uniform"]
    result = latency.measure(
        source,
        methods=methods,
        ranks=(4, 8),
        batches=(1, 2),
        prompts=(8,),
        new_tokens=4,
        repeats=2,
        say=lambda _: None,
    )
    rows = result["rows"]
    assert [(r["rank"], r["batch"], r["prompt"]) for r in rows[:: len(rows) // 3]] == [
        (4, 1, 8),
        (8, 1, 8),
        (4, 2, 8),
    ]
    labels = [
        "base",
        "lora un-merged",
        "lora merged",
        "zflora-minimal",
        "zflora-minimal idle",
        "zflora-uniform",
    ]
    assert [r["label"] for r in rows] == labels * 3
    size = {(r["label"], r["rank"]): r["bytes_ratio"] for r in rows if r["batch"] == 1}
    assert size["base", 4] == size["lora merged", 8] == 1.0
    assert 1 < size["zflora-minimal", 4] < size["zflora-minimal", 8] < size["zflora-uniform", 8]
    assert not real or size["zflora-minimal", 8] == size["zflora-minimal idle", 8]
    assert all(
        r["ttft_ms_min"] <= r["ttft_ms"] <= r["ttft_ms_max"] and r["compile_s"] >= 0 for r in rows
    )
    result |= {
        "settings": {
            "model": "tiny",
            "weights": "random",
            "dtype": "float32",
            "new_tokens": 4,
            "repeats": 2,
        },
        "environment": environment(),
    }
    latency.write(result, tmp_path / "latency-1.5b", "Latency")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"latency-1.5b{end}"
        for end in (".json", ".md", "-ratio.png", "-ratio.svg", "-rank.png", "-rank.svg")
    }
    assert json.loads((tmp_path / "latency-1.5b.json").read_text())["rows"] == json.loads(
        json.dumps(rows)
    )


def test_benchmarks_by_command_beside_transformers_and_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "tiny", "--repeats", "2", "--out"]
    shape = ["--methods", "zflora-minimal", "--prompts", "8", "--new-tokens", "3", "--peers"]
    assert main(["bench", "latency", *small, str(tmp_path / "latency"), *shape]) == 0
    labels = {row["label"] for row in json.loads((tmp_path / "latency.json").read_text())["rows"]}
    assert labels >= {
        "base",
        "transformers",
        "transformers + PEFT lora",
        "transformers + PEFT idle",
    }
    assert (
        main(
            [
                "bench",
                "train",
                *small,
                str(tmp_path / "train"),
                "--batch",
                "2",
                "--length",
                "16",
                "--masked",
                "0",
                "0.5",
            ]
        )
        == 0
    )
    rows: list[dict[str, Any]] = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["lora", "zflora-minimal", "PEFT lora"] * 2
    assert all(row["step_ratio"] == 1.0 for row in rows if row["label"] == "PEFT lora")
    assert all(
        1e8 < row["peak_bytes"] < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        and row["first_step_s"] > 0
        for row in rows
    )
    assert (
        rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-4)
        and rows[0]["loss"] != rows[3]["loss"]
    )
    assert (tmp_path / "train.png").is_file() and "x PEFT" in (tmp_path / "train.md").read_text()


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_gpu_script_makes_its_tables_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    """On tiny shapes, its third latency table made impossible; a budget that holds nothing is said
    too.
    """
    program = (
        "import runpy, sys; from zflora_jax.bench import latency; whole, calls = latency.measure,"
        " []\nlatency.measure = lambda *a, **k: whole(*a, **k) if not calls.append(1) and"
        " len(calls) != 3 else 1 / 0; sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0],"
        " run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        program,
        str(BENCHMARKS / "gpu.py"),
        "--new-tokens",
        "2",
        "--repeats",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--tiny"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (
        list(found["left_out"]) == ["latency-3b"]
        and "ZeroDivisionError" in found["left_out"]["latency-3b"]
    )
    what = [row["what"] for row in found["targets"]]
    for part in ("latency-1b", "latency-7b", "latency-1b-ranks"):
        assert (tmp_path / f"{part}.json").is_file() and (tmp_path / f"{part}-ratio.png").is_file()
        # TPOT and TTFT each.
        assert sum(name.startswith(f"{part}, zflora-minimal, ") for name in what) == (
            4 if part.endswith("ranks") else 2
        )
    assert sum("share of the floor" in name for name in what) == 2
    assert (
        sum("MFU by 4N" in name for name in what) == 3
        and sum("over PEFT's" in name for name in what) == 4
    )
    assert (
        "transformers" in (tmp_path / "latency-1b.md").read_text()
        and "latency-3b" in (tmp_path / "gpu.md").read_text()
    )
    done = subprocess.run(
        [*command, "--no-peers", "--budget", "1"], capture_output=True, text=True, timeout=100
    )
    assert (
        done.returncode != 0
        and "nothing was measured" in done.stderr
        and "were left of the budget" in done.stdout
    )


def test_speed_targets_are_read_from_results_of_their_own_set_up(tmp_path: Path) -> None:
    """On hand-made results: what is reached, what is not and why, what is missing; another model's
    results are refused.
    """
    env = {"command": "c", "commit": None, "dirty": True, "device": "cpu", "cpu_count": 2}
    env |= {"jax": "0.10.2", "date": "today"}
    case = {"rank": 16, "batch": 1, "prompt": 32}
    base = case | {
        "label": "base",
        "floor_share": 0.5,
        "tpot_ratio": 1.0,
        "ttft_ratio": 1.0,
        "bytes_ratio": 1.0,
    }
    rows = [
        base,
        base
        | {
            "label": "zflora-minimal",
            "tpot_ratio": 1.02,
            "ttft_ratio": 1.07,
            "bytes_ratio": 1.03,
        },
    ]
    rows += [
        base | {"label": "zflora-minimal idle", "ttft_ratio": 1.06},
        base | {"label": "transformers", "tpot_ratio": 4.0},
    ]
    rows += [
        base | {"label": "lora un-merged", "tpot_ratio": 1.2},
        base | {"rank": 8, "floor_share": 0.8},
        base | {"rank": 64, "floor_share": 0.4},
    ]
    settings = {"model": "smollm2-135m", "dtype": "float32"}

    def pages(**changes: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "latency.json").write_text(
            json.dumps({"rows": rows, "settings": settings | changes, "environment": env})
        )
        command = [sys.executable, str(BENCHMARKS / "speed.py"), "--results", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    starts = {"vLLM, base": [80.0, 130.0], "this project's decode": [120.0, 120.0]}
    vllm = [
        {"": name, "model": "m", "batch": 1, "tpot_ms_all": times, "tpot_ratio": 1.2}
        for name, times in starts.items()
    ]
    (tmp_path / "vllm_latency_1b.json").write_text(json.dumps({"rows": vllm, "environment": env}))
    assert pages().returncode == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    by_name = {row["what"]: row for row in found["rows"]}
    slow, quick = (
        next(row for name, row in by_name.items() if part in name)
        for part in ("bandwidth floor", "over transformers'")
    )
    assert (slow["reached"], slow["measured"], quick["reached"], quick["measured"]) == (
        "no",
        "2.000 x",
        "yes",
        "0.250 x",
    )
    assert slow["why not"] != "not known" and slow["commit"] == "unknown +changes"
    fused, late = (
        by_name[f"zflora-minimal fused, rank 16, batch 1, prompt 32: {name} over the base's"]
        for name in ("TPOT", "TTFT")
    )
    assert fused["reached"] == "yes" and "why not" not in fused
    assert late["reached"] == "no" and "zflora-minimal idle 1.060" in late["why not"]
    assert (
        by_name["lora un-merged, rank 16, batch 1, prompt 32: TPOT over the base's"]["reached"]
        == "-"
    )
    assert (
        "median of 3 cases, 1.250 to 2.500" in slow["what"] and "median of 1 cases" in quick["what"]
    )
    ours = by_name[
        "m, batch 1: our TPOT over vLLM's (CPU build, float32; in 2 starts 0.92 to 1.50)"
    ]
    assert (
        ours["reached"] == "no"
        and "vLLM's base took 80 to 130 ms, ours 120 to 120" in ours["why not"]
    )
    page = (tmp_path / "speed.md").read_text()
    assert (
        page.count("Command: `c`") == 2 and "- latency.json: Command: `c`; commit unknown" in page
    )
    assert f"1. {slow['why not']}." in page and "| no | 1 |" in page
    assert any("train.json is missing" in line for line in found["missing"]) and any(
        "H100" in line for line in found["missing"]
    )
    assert "for {'model': 'smollm2-135m'" in pages(model="llama-3.2-1b").stderr
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--results", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (
        done.returncode == 2
        and "is no directory" in done.stderr
        and not (tmp_path / "none").exists()
    )


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        ("decode_variants.py", ["--repeats", "0"], "--repeats: give at least 1"),
        ("decode_variants.py", ["--new-tokens", "1"], "--new-tokens: at least 2"),
        ("startup.py", ["--repeats", "0"], "--repeats 0: give at least 1"),
        (
            "vllm_latency.py",
            ["--batches", "1", "0"],
            "--batches, --prompt, --repeats, --rounds and --ranks: give at least 1",
        ),
        (
            "vllm_latency.py",
            ["--vllm-python", "nowhere"],
            "--vllm-python nowhere: give the Python of an environment that has vLLM",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_scripts_refuse_wrong_counts_before_they_measure(
    script: str, given: list[str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *given],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_masks_leave_the_share_that_was_asked_for() -> None:
    for masked, wanted in ((0.0, 99), (0.5, 50), (0.8, 20)):
        mask = training.Case("tiny", length=100, batch=2, masked=masked).batch_arrays(50)[
            "loss_mask"
        ]
        assert mask.sum(axis=1).tolist() == [wanted] * 2


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: latency.measure(preset("tiny"), ranks=()), r"ranks=\[\]: give at least one"),
        (
            lambda: latency.measure(preset("tiny"), new_tokens=1),
            r"new_tokens=1: TPOT needs at least 2",
        ),
        (lambda: latency.measure(preset("tiny"), repeats=0), r"repeats=0: must be at least 1"),
        (
            lambda: latency.measure(preset("tiny"), methods=("full",)),
            r"methods \['full'\] cannot be .*choose from lora, ffa, ffba",
        ),
        (
            lambda: latency.measure(preset("tiny"), prompts=(500,)),
            r"prompts of 500 and 32 new tokens exceed the model's context of 512",
        ),
        (
            lambda: training.Case("tiny", masked=1.0),
            r"masked=1.0: a share of the positions, at least 0 and below 1",
        ),
        (
            lambda: training.measure([training.Case("tiny")], ["lorra"]),
            r"methods=\['lorra'\]: choose from lora, ffa",
        ),
        (
            lambda: training.measure([training.Case("tiny", length=1000)], ["lora"]),
            r"length=1000 exceeds the context of 512",
        ),
    ],
)
def test_wrong_settings(run: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run()
