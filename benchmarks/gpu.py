"""The tables for one GPU, in one call of under ten minutes: decode latency of the 1B, 3B and 7B
shapes, and training of 1B beside PEFT, in bfloat16.

Command: python benchmarks/gpu.py
(random weights; transformers and PEFT take turns where they are installed)
Writes results/gpu/<part>.json, .md and pictures, part after part, and results/gpu/gpu.md and .json:
each target with what was measured. A part that no longer fits the budget is left out and named; a
part that fails is named with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # times to compile are reported

import jax

from zflora_jax.bench import contenders, latency, peft, training, training_step
from zflora_jax.bench.case import Case
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.presets import preset
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

FUSED = "zflora-minimal"


@dataclass(frozen=True)
class Part:
    """One table. seconds: what it takes at most, on an H100; it is begun only if the budget still
    holds that.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]
    write: Callable[[dict[str, Any], Path, str], None]


def latency_part(
    name: str, model: str, seconds: float, args: argparse.Namespace, **settings: Any
) -> Part:
    def run() -> dict[str, Any]:
        shared = {
            "dtype": "bfloat16",
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
        } | settings
        return latency.measure(preset(model), **shared) | {
            "settings": {"model": model, "weights": "random"} | shared
        }

    return Part(name, seconds, run, latency.write)


def parts(args: argparse.Namespace, with_baselines: bool) -> list[Part]:
    """In order of what would be missed most."""
    small, middle, large = (
        ("tiny",) * 3 if args.tiny else ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
    )
    batch, length = (2, 64) if args.tiny else (8, 2048)
    case = Case(small, "bfloat16", 16, batch, length)
    return [
        latency_part(
            "latency-1b",
            small,
            150,
            args,
            methods=("lora", FUSED, "zflora-uniform"),
            baselines=with_baselines,
        ),
        Part(
            "train-1b",
            120,
            lambda: training.measure([case], ("lora", FUSED), repeats=3, with_peft=with_baselines),
            training.write,
        ),
        latency_part("latency-7b", large, 100, args, methods=(FUSED,)),
        latency_part("latency-3b", middle, 90, args, methods=(FUSED,)),
        latency_part("latency-1b-ranks", small, 90, args, methods=(FUSED,), ranks=(8, 64)),
    ]


# Bytes of the weights over an H100's 3.35 TB/s, ms: what a step at batch 1 takes at least; and the
# share of it that a step is to reach.
FLOORS = {"llama-3.2-1b": (0.738, 0.6), "llama-3.2-3b": (1.918, 0.7), "llama-2-7b": (3.945, 0.8)}


def target(what: str, limit: str, measured: str, ok: bool | None = None) -> dict[str, str]:
    """A row of the table; ok: None where there is no target."""
    reached = {True: "yes", False: "no", None: "-"}[ok]
    return {"what": what, "target": limit, "measured": measured, "reached": reached}


def reached(found: dict[str, dict[str, Any]], peak: float) -> list[dict[str, str]]:
    """The targets that the parts in `found` speak to, as rows."""
    decode = [
        target_row
        for part, result in found.items()
        if part != "train-1b"
        for row in result["rows"]
        for target_row in decode_targets(part, row, result["settings"]["model"])
    ]
    train = found.get("train-1b", {}).get("rows", [])
    return decode + [target_row for row in train for target_row in train_targets(row, peak)]


def decode_targets(part: str, row: dict[str, Any], model: str) -> list[dict[str, str]]:
    name = f"{part}, {row['label']}, r={row['rank']}"
    if row["label"] == contenders.BASE and part in ("latency-1b", "latency-3b", "latency-7b"):
        floor, share = FLOORS.get(model, (row["floor_ms"], 0.0))
        measured = (
            f"{floor / row['tpot_ms']:.2f} ({row['tpot_ms']:.3f} ms;"
            f" {row['floor_share']:.2f} of the floor at the bandwidth measured)"
        )
        what = f"{name}: share of the floor of {floor:.3f} ms"
        return [target(what, f">= {share}", measured, floor / row["tpot_ms"] >= share)]
    if row["label"] == FUSED:
        limit = row["bytes_ratio"] + 0.01
        return [
            target(
                f"{name}: {measure.upper()} over the base's",
                f"<= {limit:.3f}, its share of bytes + 0.01",
                f"{row[f'{measure}_ratio']:.3f}",
                row[f"{measure}_ratio"] <= limit,
            )
            for measure in ("tpot", "ttft")
        ]
    if row["label"] == contenders.UNMERGED:
        return [target(f"{name}: TPOT over the base's", "reported", f"{row['tpot_ratio']:.3f}")]
    return []


def train_targets(row: dict[str, Any], peak: float) -> list[dict[str, str]]:
    mfu = 4 * count_base(preset(row["case"].model)) * row["tokens_per_s"] / peak
    ours, name = row["label"] != training_step.PEFT, f"train-1b, {row['label']}"
    measured = (
        f"{mfu:.1%}, {row['tokens_per_s']:.0f} tokens/s, peak {row['peak_bytes'] / 2**30:.1f} GiB"
    )
    limit = ">= 40%" if ours else "reported"
    rows = [target(f"{name}: MFU by 4N", limit, measured, mfu >= 0.4 if ours else None)]
    if ours and "step_ratio" in row:
        speed, memory = 1 / row["step_ratio"], row["memory_ratio"]
        rows += [
            target(f"{name}: tokens/s over PEFT's", ">= 1.3", f"{speed:.2f}", speed >= 1.3),
            target(f"{name}: peak memory over PEFT's", "< 1", f"{memory:.2f}", memory < 1),
        ]
    return rows


def write(
    out: Path,
    found: dict[str, dict[str, Any]],
    without: dict[str, str],
    env: dict[str, Any],
    peak_tflops: float,
) -> str:
    """gpu.json and gpu.md of the parts so far; returns the page."""
    rows = reached(found, peak_tflops * 1e12)
    write_json(out / "gpu.json", {"targets": rows, "left_out": without, "environment": env})
    text = (
        f"# {env['device']}\n\nbfloat16, random weights. MFU by 4N FLOPs a token, of"
        f" {peak_tflops:g} TFLOP/s.\n\n"
    )
    text += (markdown_table(rows, list(rows[0])) if rows else "Nothing was measured.") + "\n\n"
    text += (
        "".join(f"Left out: {name}: {why}\n\n" for name, why in without.items())
        + f"{origin_line(env)}\n"
    )
    atomic_write(out / "gpu.md", text.encode())
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=570, metavar="SECONDS", help="for all parts (default: 570)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989,
        help="of the GPU in bfloat16, for MFU (default: 989, an H100)",
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="leave transformers and PEFT out",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, to try the script on any machine"
    )
    parser.add_argument("--out", default="results/gpu", metavar="DIR")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started, out, env = time.perf_counter(), Path(args.out), environment()
    out.mkdir(parents=True, exist_ok=True)
    without: dict[str, str] = {}
    if args.baselines:
        try:
            peft.imports()
        except ConfigError as error:
            args.baselines, without["transformers and PEFT"] = False, str(error)
    found: dict[str, dict[str, Any]] = {}
    for part in parts(args, args.baselines):
        left = args.budget - (time.perf_counter() - started)
        if not args.tiny and part.seconds > left:
            without[part.name] = (
                f"it takes up to {part.seconds:.0f} s, and {left:.0f} s were left of the budget"
            )
            continue
        try:
            found[part.name] = part.run()
            part.write(
                found[part.name] | {"environment": env},
                out / part.name,
                f"{part.name}, {jax.devices()[0].device_kind}",
            )
        # A kernel that this GPU lacks, or no memory left: the other parts still tell something
        except Exception as error:
            without[part.name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(
            f"{part.name}: {without.get(part.name, 'done')}, {time.perf_counter() - started:.0f} s"
            " since the start",
            flush=True,
        )
        # So that nothing is lost if the next part is stopped.
        write(out, found, without, env, args.peak_tflops)
    print(write(out, found, without, env, args.peak_tflops))
    if not found:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
