"""Time and memory of one training step: ours and PEFT's, from the same weights, batch, mask, dtype
and optimizer settings.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import count_params
from zflora_jax.bench import baselines, peft
from zflora_jax.bench.case import OPTIM, Case, peak_resident
from zflora_jax.bench.timing import ratio, summary
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import PRESETS, preset
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import random_model
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.plots import bars
from zflora_jax.reporting.provenance import origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.trainer import init_state, make_train_step

Row = dict[str, Any]
PEFT = "PEFT lora"


def load(case: Case) -> Model:
    """The base model of `case`, in its dtype."""
    if case.model not in PRESETS or case.model == "smollm2-135m":
        return load_model(case.model, dtype=case.dtype)
    model = random_model(preset(case.model).replace(dtype=case.dtype), jax.random.key(0))
    return Model(model.config, jax.tree.map(lambda leaf: leaf.astype(case.dtype), model.params))


def our_step(case: Case, model: Model, method: str) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    adapter = AdapterConfig(method, rank=case.rank)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 1000)
    step = make_train_step(model.config, adapter, OPTIM, 1000)
    batch = jax.device_put(case.batch_arrays(model.config.vocab_size))

    def run() -> float:
        nonlocal state
        state, metrics = step(model.params, state, batch)
        return float(metrics["loss"])

    return run


def alone(case: Case, label: str, directory: str, steps: int = 3) -> tuple[float, float]:
    """(peak memory in bytes, seconds from nothing to the first finished step) of a process that
    trains `steps` steps and nothing else.

    Memory is resident memory, on a GPU the device's. RuntimeError with the end of its output where
    it fails.
    """
    module = "peft" if label == PEFT else "training"
    device = baselines.device() if label == PEFT else ""
    job = {
        "case": dataclasses.asdict(case),
        "label": label,
        "directory": directory,
        "steps": steps,
        "device": device,
    }
    command = [sys.executable, "-c", f"from zflora_jax.bench import {module}; {module}.main()"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(
            f"{label} ended with {done.returncode} in a process of its own:"
            f" {done.stderr.strip()[-300:]}"
        )
    peak, first = json.loads(done.stdout.splitlines()[-1])
    return peak, first


def main() -> None:
    """As `peft.main`, for a method of ours."""
    job = json.load(sys.stdin)
    case = Case(**job["case"])
    jax.devices()
    started = time.perf_counter()
    run = our_step(case, load_model(job["directory"], dtype=case.dtype), job["label"])
    run()
    first = time.perf_counter() - started
    for _ in range(job["steps"] - 1):
        run()
    peak = peak_resident()
    if jax.default_backend() == "gpu":  # what counts there is the device's memory
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak)
    print(json.dumps([peak, first]))


def matmul_rate(dtype: str, repeats: int = 3) -> float:
    """FLOP/s that a chain of products of square matrices reaches at best on the default device."""
    # Elsewhere one product takes no longer than to call it.
    size, count = (2048, 1) if jax.default_backend() == "cpu" else (4096, 20)
    x, best = jnp.full((size, size), 1 / size, jnp.dtype(dtype)), 0.0

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)

    jax.block_until_ready(chain(x))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(chain(x))
        best = max(best, 2 * count * size**3 / (time.perf_counter() - start))
    return best


def measure(
    cases: Sequence[Case],
    methods: Sequence[str],
    *,
    repeats: int = 5,
    with_peft: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """A row per case and label: step_ms (median over turns, _min, _max), its ratio to PEFT's within
    a turn, tokens_per_s, flops_share, compile_s (first step less a later one), peak_bytes and
    first_step_s (each of a process of its own), loss of the first step.

    flops_share: 4 N per token (forward, and backward through the frozen base: no gradient of a base
    kernel) over the device's measured matmul rate; 6 N for method "full". ValueError if the labels'
    first losses differ: they would not do the same work.
    """
    unknown = [m for m in methods if m not in METHODS]
    require(
        len(methods) > 0 and not unknown,
        f"methods={list(methods)}: choose from {', '.join(METHODS)}.",
    )
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    if with_peft:
        peft.imports()  # what is not installed is said before anything slow
    failed: list[str] = []
    rates: dict[str, float] = {}
    rows: list[Row] = []
    for case in cases:
        model = load(case)
        config = model.config
        require(
            case.length <= config.max_position_embeddings,
            f"length={case.length} exceeds the context of {config.max_position_embeddings}.",
        )
        if case.dtype not in rates:
            rates[case.dtype] = matmul_rate(case.dtype)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "base"
            save_hf(directory, model)
            labels = [*methods, *([PEFT] if with_peft else [])]
            apart: dict[str, tuple[float, float]] = {}
            for label in labels:  # before anything of a step lies in this process
                try:
                    apart[label] = alone(case, label, str(directory))
                except (
                    RuntimeError
                ) as error:  # PEFT needs more memory than we do: ours is measured all the same
                    if label != PEFT:
                        raise
                    failed.append(f"{case}: {error}")
                    say(failed[-1])
            labels = list(apart)
            steps = {
                label: (
                    peft.train_step(case, directory, baselines.device())
                    if label == PEFT
                    else our_step(case, model, label)
                )
                for label in labels
            }
            first: dict[str, tuple[float, float]] = {}
            for label in labels:
                start = time.perf_counter()
                first[label] = (steps[label](), time.perf_counter() - start)
            losses = [loss for loss, _ in first.values()]
            if not np.ptp(losses) <= (1e-3 if case.dtype == "float32" else 5e-2) * np.max(
                losses
            ):  # NaN does not agree
                raise ValueError(
                    f"the first losses differ: {dict(zip(labels, losses, strict=True))}"
                )
            times: dict[str, list[float]] = {label: [] for label in labels}
            for turn in range(repeats):
                for label in labels[:: 1 if turn % 2 == 0 else -1]:
                    start = time.perf_counter()
                    steps[label]()
                    times[label].append(1e3 * (time.perf_counter() - start))
            del steps, model
            gc.collect()
        for label in labels:
            row: Row = {"case": case, "label": label} | summary(times[label], "step_ms")
            if PEFT in apart:
                row["step_ratio"] = ratio(times[label], times[PEFT])
                row["memory_ratio"] = apart[label][0] / apart[PEFT][0]
            tokens = case.batch * case.length
            row |= {
                "tokens_per_s": 1e3 * tokens / row["step_ms"],
                "compile_s": first[label][1] - row["step_ms"] / 1e3,
                "loss": first[label][0],
            }
            row |= {"peak_bytes": apart[label][0], "first_step_s": apart[label][1]}
            row["flops_share"] = (
                (6 if label == "full" else 4)
                * count_base(config)
                * row["tokens_per_s"]
                / rates[case.dtype]
            )
            adapter = AdapterConfig("lora" if label == PEFT else label, rank=case.rank)
            row["trainable"] = count_params(config, adapter)
            rows.append(row)
            say(
                f"{case}  {label}: {row['step_ms']:.0f} ms,"
                f" {row.get('step_ratio', float('nan')):.3f} x PEFT"
            )
    return {"matmul_flops": rates, "repeats": repeats, "failed": failed, "rows": rows}


def page(result: Mapping[str, Any], title: str) -> str:
    """The table as Markdown. result: of `measure`, with "environment"."""
    env, shown = result["environment"], []
    for row in result["rows"]:
        case = row["case"]
        line: Row = {
            "dtype": case.dtype,
            "batch": f"{case.batch} x {case.length}",
            "rank": case.rank,
            "masked": f"{case.masked:.0%}",
            "": row["label"],
        }
        line |= {
            "trainable": row["trainable"],
            "step, ms": (
                f"{row['step_ms']:.0f} [{row['step_ms_min']:.0f}, {row['step_ms_max']:.0f}]"
            ),
        }
        line |= {
            "x PEFT": f"{row['step_ratio']:.3f}" if "step_ratio" in row else "-",
            "tokens/s": round(row["tokens_per_s"]),
        }
        line |= {
            "FLOP share": f"{row['flops_share']:.2f}",
            "peak, MB": round(row["peak_bytes"] / 1e6),
        }
        line |= {"x PEFT ": f"{row['memory_ratio']:.3f}" if "memory_ratio" in row else "-"}
        line |= {
            "compile, s": f"{row['compile_s']:.1f}",
            "first step after, s": f"{row['first_step_s']:.1f}",
        }
        shown.append(line)
    rates = ", ".join(
        f"{rate / 1e12:.2f} TFLOP/s in {dtype}" for dtype, rate in result["matmul_flops"].items()
    )
    lines = [
        f"# {title}",
        "",
        (
            f"{result['rows'][0]['case'].model}. One training step (forward, backward, clip, AdamW)"
            f" on the same weights, tokens and mask; medians of {result['repeats']} turns [least,"
            " most], all labels of a case by turns in one process. x PEFT: median over turns of"
            " ratios within a turn."
        ),
        (
            "masked: share of positions, from the start, that the loss leaves out. FLOP share: 4 N"
            f" FLOPs per token (6 N for full) over the measured matmul rate, {rates}. peak:"
            " resident memory (on a GPU: device memory) of a process that loads the model and"
            " trains three steps; first step after: seconds from loading to the end of its first"
            " step, no compile cache."
        ),
        *(f"PEFT could not be measured: {why}" for why in result["failed"]),
        "",
        markdown_table(shown, list(shown[0])),
        "",
        origin_line(env),
        "",
    ]
    return "\n".join(lines)


def write(result: Mapping[str, Any], out: str | Path, title: str) -> None:
    """<out>.json, <out>.md, and with PEFT <out>.png: step time over PEFT's, a bar per case and
    label.
    """
    if "step_ratio" in result["rows"][0]:

        def bar(label: str, case: Case) -> str:
            return f"{label}, {case.batch} x {case.length}, {case.masked:.0%} masked"

        values = {bar(r["label"], r["case"]): r["step_ratio"] for r in result["rows"]}
        bars(values, out, title, label="step time / PEFT's")
    write_json(
        f"{out}.json",
        {
            **result,
            "rows": [row | {"case": dataclasses.asdict(row["case"])} for row in result["rows"]],
        },
    )
    atomic_write(f"{out}.md", page(result, title).encode())
