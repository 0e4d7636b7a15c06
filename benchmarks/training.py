"""Time and memory of one training step next to PEFT's, from the same weights, batch, mask, dtype
and optimizer settings.

Command: python benchmarks/training.py --table float32 --repeats 3
(about 12 minutes on 2 CPU cores; PEFT: extra test, quantised bases: bitsandbytes)
Writes one table of results/train.json and .md; other tables stay. The first losses have to agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import peft_baselines
from harness import arguments, at_least, origins, write_part
from peft_baselines import OPTIM, Case

from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.reporting.tables import markdown_table

PEFT = "PEFT lora"
Row = dict[str, Any]


def load(case: Case) -> Any:
    """Loads the float base of a case; presets other than smollm2-135m get random weights."""
    from zflora_jax.experiments.latency import random_base
    from zflora_jax.hf.load import load_model

    if case.model in PRESETS and case.model != "smollm2-135m":
        return random_base(preset(case.model), case.dtype)
    return load_model(case.model, dtype=case.dtype)


def our_step(case: Case, model: Any, method: str) -> Callable[[], float]:
    """A function that trains one step of a method on a base and returns its loss."""
    import jax

    from zflora_jax.adapters.init import init_adapters
    from zflora_jax.training.trainer import TrainStep, init_state

    adapter = AdapterConfig(method, rank=case.rank)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 1000)
    batch = jax.device_put(case.batch_arrays(model.config.vocab_size))
    step = TrainStep(model.config, adapter, OPTIM, 1000).jitted()

    def run() -> float:
        nonlocal state
        state, metrics = step(model.params, state, batch)
        return float(metrics["loss"])

    return run


def train_in_this_process(job: Mapping[str, Any]) -> tuple[float, float]:
    """Trains three steps; returns the peak memory in bytes (on a GPU the device's) and the seconds
    from loading to the end of the first step.
    """
    case, directory = Case(**job["case"]), job["directory"]
    if job["label"] == PEFT:
        torch, _, _ = peft_baselines.imports()
        started = time.perf_counter()
        run = peft_baselines.train_step(case, directory, peft_baselines.device())
    else:
        import jax

        from zflora_jax.hf.load import load_model

        jax.devices()
        started = time.perf_counter()
        how = None if case.quantize == "none" else case.quantize
        run = our_step(case, load_model(directory, dtype=case.dtype, quantize=how), job["label"])
    run()
    first = time.perf_counter() - started
    run(), run()
    peak = peft_baselines.peak_resident()
    if job["label"] == PEFT and peft_baselines.device() == "cuda":
        peak = torch.cuda.max_memory_allocated()
    elif job["label"] != PEFT and jax.default_backend() == "gpu":
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak)
    return peak, first


def in_a_process(case: Case, label: str, directory: str) -> tuple[float, float]:
    """Runs `train_in_this_process` in a process that does nothing else."""
    job = {"case": dataclasses.asdict(case), "label": label, "directory": directory}
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{label}, {case}: ended with {done.returncode}: {done.stderr[-2000:]}")
    peak, first = json.loads(done.stdout.splitlines()[-1])
    return peak, first


def measure(case: Case, labels: list[str], repeats: int) -> list[Row]:
    """A row per label, a method or `PEFT`: step_ms (median over turns, with _min and _max);
    step_ratio to PEFT's within a turn; tokens_per_s; compile_s (first step minus a later one);
    peak_bytes and first_step_s, each of a separate process; loss of the first step; trainable
    parameters. ValueError if the first losses differ: then labels do not do the same work.
    """
    import numpy as np

    from zflora_jax.adapters.widths import count_params
    from zflora_jax.experiments.latency import ratio, summary, turns
    from zflora_jax.hf.save import save_hf
    from zflora_jax.nn.quantize_model import quantize_model

    model = load(case)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder, model)
        separate = {label: in_a_process(case, label, folder) for label in labels}
        base = model if case.quantize == "none" else quantize_model(model, case.quantize)
        steps = {
            label: peft_baselines.train_step(case, folder, peft_baselines.device())
            if label == PEFT
            else our_step(case, base, label)
            for label in labels
        }

    def seconds(label: str) -> tuple[float, float]:
        start = time.perf_counter()
        loss = steps[label]()
        return time.perf_counter() - start, loss

    first = {label: seconds(label) for label in labels}
    # bitsandbytes rounds differently.
    same = [first[x][1] for x in labels if x != PEFT or case.quantize == "none"]
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    if not np.ptp(same) <= tolerance * np.max(same):  # NaN does not agree
        raise ValueError(f"the first losses differ: {first}")
    times: dict[str, list[float]] = {label: [] for label in labels}
    for label in turns(labels, repeats):
        times[label].append(1e3 * seconds(label)[0])
    rows = []
    for label, (peak, first_step) in separate.items():
        row = {"case": dataclasses.asdict(case), "label": label}
        row |= summary(times[label], "step_ms")
        adapter = AdapterConfig("lora" if label == PEFT else label, rank=case.rank)
        row |= {
            "step_ratio": ratio(times[label], times[PEFT]),
            "memory_ratio": peak / separate[PEFT][0],
            "tokens_per_s": 1e3 * case.batch * case.length / row["step_ms"],
            "compile_s": first[label][0] - row["step_ms"] / 1e3,
            "loss": first[label][1],
            "peak_bytes": peak,
            "first_step_s": first_step,
            "trainable": count_params(model.config, adapter),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def page(result: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    lines = [
        "# A training step next to PEFT's",
        "",
        "One step (forward, backward, clip, AdamW) from the same weights, tokens and mask, which"
        " both sides share. Medians of the turns [minimum, maximum]; the rows of a case take turns"
        " in one process.",
        "",
        '- "x PEFT" is the median over turns of the ratio within a turn.',
        '- "masked" is the share of positions, from the start, without loss.',
        '- "peak" is the resident memory (on a GPU the device memory) of a process that loads the'
        ' model and trains three steps; "first step after" are its seconds from loading to the end'
        " of the first step, without a compile cache.",
        "",
    ]
    for name, table in result.items():
        if name == "environments":
            continue
        shown = [_line(row) for row in table["rows"]]
        lines += [f"## {name}: {table['rows'][0]['case']['model']}, {table['repeats']} turns", ""]
        lines += [markdown_table(shown, list(shown[0])), ""]
        lines += [origins(result, name), ""]
    return "\n".join(lines)


def _line(row: Row) -> Row:
    case = Case(**row["case"])
    spread = f"[{row['step_ms_min']:.0f}, {row['step_ms_max']:.0f}]"
    return {
        "dtype": case.dtype,
        "base": "float" if case.quantize == "none" else case.quantize,
        "batch": f"{case.batch} x {case.length}",
        "rank": case.rank,
        "masked": f"{case.masked:.0%}",
        "": row["label"],
        "step, ms": f"{row['step_ms']:.0f} {spread}",
        "x PEFT": f"{row['step_ratio']:.3f}",
        "tokens/s": round(row["tokens_per_s"]),
        "peak, MB": round(row["peak_bytes"] / 1e6),
        "x PEFT ": f"{row['memory_ratio']:.3f}",
        "compile, s": f"{row['compile_s']:.1f}",
        "first step after, s": f"{row['first_step_s']:.1f}",
    }


def main() -> None:
    parser = arguments(__doc__, "train")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--table", default="float32", metavar="NAME", help="the table to write")
    parser.add_argument("--model", default="smollm2-135m", help="a preset, or a model directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    methods = {"default": ["lora", "zflora-minimal"], "choices": list(METHODS)}
    parser.add_argument("--methods", nargs="+", **methods)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    shares = {"nargs": "+", "type": float, "default": [0.0, 0.5, 0.8]}
    parser.add_argument("--masked", **shares, help="shares of positions without loss")
    parser.add_argument("--quantize", nargs="+", default=["none"], help="none, int8, nf4")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(train_in_this_process(json.loads(args.job))))
        return
    at_least(parser, args, rank=1, batch=1, length=2, repeats=1)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    labels = [*args.methods, PEFT]
    same = args.model, args.dtype, args.rank, args.batch, args.length
    cases = [Case(*same, *own) for own in product(args.masked, args.quantize)]
    rows = [row for case in cases for row in measure(case, labels, args.repeats)]
    write_part(args.out, args.table, {"repeats": args.repeats, "rows": rows}, page)


if __name__ == "__main__":
    main()
