"""The scripts of benchmarks/, within the test's process: their tables, what they refuse."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT, TESTS

from zflora_jax.bench import contenders, latency, timing, training, training_step
from zflora_jax.bench.case import Case

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Runs a file of benchmarks/ within this process: exit code or last word, stdout, stderr."""
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_ENABLE_COMPILATION_CACHE"):
        monkeypatch.setenv(name, "false")  # a script may set it: put back after the test

    def run(name: str, *given: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / name), *map(str, given)])
        monkeypatch.syspath_prepend(str(BENCHMARKS))  # as for a script that is run by itself
        capsys.readouterr()
        code: object = 0
        try:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def failing_third(measure: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def measured(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return measure(*args, **settings)

    return measured


def assert_gpu_tables(folder: Path) -> None:
    """Those of a run whose third latency table failed."""
    found = json.loads((folder / "gpu.json").read_text())
    assert (
        list(found["left_out"]) == ["latency-3b"]
        and "ZeroDivisionError" in found["left_out"]["latency-3b"]
    )
    what = [row["what"] for row in found["targets"]]
    for part in ("latency-1b", "latency-7b", "latency-1b-ranks"):
        assert (folder / f"{part}.json").is_file() and (folder / f"{part}-ratio.png").is_file()
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
        "transformers" in (folder / "latency-1b.md").read_text()
        and "latency-3b" in (folder / "gpu.md").read_text()
    )


def test_the_gpu_script_makes_its_tables_and_goes_on_after_a_failure(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With decoding and training that take a known time instead of programs: both are measured in
    other tests, and in `make soak` with this script. A budget that holds nothing is said too.
    """

    def contender(model: Any, *shape: Any) -> timing.Contender:
        size = contenders.read_bytes({"params": model.params}, model.config, 1, 8)
        return timing.Contender(lambda count: time.sleep(1e-3 * count), size, {"compile_s": 1.0})

    def trained(cases: list[Case], methods: Any, **settings: Any) -> Any:
        row = {name: 1.0 for name in ("step_ms", "step_ms_min", "step_ms_max", "tokens_per_s")}
        row |= {"compile_s": 1.0, "first_step_s": 1.0, "flops_share": 0.5, "trainable": 1}
        ratios = {"step_ratio": 0.5, "memory_ratio": 0.9}
        return {
            "matmul_flops": {"bfloat16": 1e12},
            "repeats": 3,
            "failed": [],
            "rows": [
                row | {"case": cases[0], "label": label, "peak_bytes": 2**30, **ratios}
                for label in (*methods, training_step.PEFT)
            ],
        }

    monkeypatch.setattr(contenders, "contender", contender)
    monkeypatch.setattr(latency, "bandwidth_meter", lambda: lambda: 1e10)
    monkeypatch.setattr(latency, "measure", failing_third(latency.measure))
    monkeypatch.setattr(training, "measure", trained)
    given = ["--new-tokens", "2", "--repeats", "1", "--out", tmp_path]
    code, _, err = script("gpu.py", *given, "--tiny")
    assert code == 0, err
    assert_gpu_tables(tmp_path)
    code, out, _ = script("gpu.py", *given, "--no-baselines", "--budget", "1")
    assert code == "nothing was measured" and "were left of the budget" in out


@pytest.mark.soak
def test_the_gpu_script_measures_tiny_shapes(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; from test_benchmark_scripts import failing_third, latency\n"
        "latency.measure = failing_third(latency.measure); sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", program, str(BENCHMARKS / "gpu.py"), "--tiny"]
    command += ["--new-tokens", "2", "--repeats", "1", "--out", str(tmp_path)]
    env = os.environ | {
        "PYTHONPATH": f"{BENCHMARKS.parent}{os.pathsep}{TESTS}{os.pathsep}{Path(__file__).parent}"
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_gpu_tables(tmp_path)


def test_speed_targets_are_read_from_results_of_their_own_set_up(
    script: Any, tmp_path: Path
) -> None:
    """On hand-made results: what is reached, what is not and why, what is missing; another model's
    results are refused.
    """
    env = {"command": "c", "commit": None, "dirty": True, "device": "cpu", "cpu_count": 2}
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

    def pages(**changes: Any) -> tuple[object, str, str]:
        (tmp_path / "latency.json").write_text(
            json.dumps({"rows": rows, "settings": settings | changes, "environment": env})
        )
        return script("speed.py", "--results", tmp_path)

    starts = {"vLLM, base": [80.0, 130.0], "this project's decode": [120.0, 120.0]}
    vllm = [
        {"": name, "model": "m", "batch": 1, "tpot_ms_all": times, "tpot_ratio": 1.2}
        for name, times in starts.items()
    ]
    (tmp_path / "vllm_latency_1b.json").write_text(json.dumps({"rows": vllm, "environment": env}))
    assert pages()[0] == 0
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
    assert any("train.json is missing" in line for line in found["missing"]) and any(
        "H100" in line for line in found["missing"]
    )
    assert "for {'model': 'smollm2-135m'" in str(pages(model="llama-3.2-1b")[0])
    code, _, err = script("speed.py", "--results", tmp_path / "none")
    assert code == 2 and "is no directory" in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "given", "message"),
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
        ("on_device.py", ["--rounds", "0"], "--rounds, --prompt: give at least 1"),
        (
            "on_device.py",
            ["--python", "nowhere"],
            "--python nowhere: give the Python of an environment that has xllamacpp",
        ),
        (
            "on_device.py",
            ["--litert-python", "nowhere"],
            "--litert-python nowhere: give the Python of an environment that has the extra litert",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_scripts_refuse_wrong_counts_before_they_measure(
    name: str,
    given: list[str],
    message: str,
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = script(name, *given)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


def test_a_method_without_all_its_seeds_is_left_out_of_the_cost_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = {"task": {"mean": -1.0, "low": -3.0, "high": 1.0, "p": 0.4, "seeds": 1}}
    table = {
        "missing": ["a (seeds 1, 2)", "d"],
        "differences": dict.fromkeys(["base", "a", "b"], gap),
    }
    (tmp_path / "accuracy_arithmetic.json").write_text(json.dumps(table))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    quality = runpy.run_path(str(BENCHMARKS / "cost_quality.py"))["quality"]
    assert quality(tmp_path) == {"lora": [0.0] * 3, "b": [-1.0, -3.0, 1.0]}


def test_the_cost_picture_knows_every_methods_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge by addition is called so, and what is trained otherwise costs the same."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    script = runpy.run_path(str(BENCHMARKS / "cost_quality.py"))
    programs = {script["MERGED"]: 1, script["UNMERGED"]: 2, "ffba": 3, "zflora-minimal": 4}
    turns = {"tpot_ratio": 1.0, "tpot_ratio_low": 1.0, "tpot_ratio_high": 1.0}
    compiled = {name: {"kernels": n, "read_bytes": 10 * n} for name, n in programs.items()}
    made = script["adapters"]()
    assert {script["UNMERGED"], "ffba", "zflora-minimal"} < made.keys()
    assert "zflora-minimal-plus" not in made
    quality = dict.fromkeys(["lora", "dora", "ffba", "zflora-minimal-plus"], [0.0] * 3)
    result = {"decode": dict.fromkeys(programs, turns), "compiled": compiled, "quality": quality}
    assert script["_missing"](result, "decode") == []
    more = {"quality": quality | {"state-alone": [0.0] * 3}}
    assert script["_missing"](result | more, "compiled") == ["state-alone"]
    rows = script["rows"](result)
    assert {row["method"]: (row["kernels"], row["bytes"]) for row in rows} == {
        "lora merged": (0, 1.0),
        "lora un-merged": (1, 2.0),
        "dora merged": (0, 1.0),
        "ffba": (2, 3.0),
        "zflora-minimal-plus": (3, 4.0),
    }
