"""The tables for one GPU, in one call of under ten minutes: decode latency of the 1B, 3B and 7B shapes, and training of 1B beside PEFT, in bfloat16.

Command: python benchmarks/gpu.py     (random weights; transformers and PEFT take turns where they are installed)
Writes results/gpu/<part>.json, .md and pictures, part after part, and results/gpu/gpu.md and .json: each target with what was measured. A part that
no longer fits the budget is left out and named; a part that fails is named with its error, and the others go on.
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

import jax

from zflora_jax.adapters.methods import count_base
from zflora_jax.bench import latency, peers, training
from zflora_jax.cache import compile_cache
from zflora_jax.config import preset
from zflora_jax.fields import ConfigError
from zflora_jax.report import atomic_write, environment, markdown_table, write_json

FUSED = "zflora-minimal"


@dataclass(frozen=True)
class Part:
    """One table. seconds: what it takes at most, on an H100; it is begun only if the budget still holds that."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]
    write: Callable[[dict[str, Any], Path, str], None]


def latency_part(name: str, model: str, seconds: float, args: argparse.Namespace, **settings: Any) -> Part:
    def run() -> dict[str, Any]:
        shared = {"dtype": "bfloat16", "new_tokens": args.new_tokens, "repeats": args.repeats} | settings
        return latency.measure(preset(model), **shared) | {"settings": {"model": model, "weights": "random"} | shared}

    return Part(name, seconds, run, latency.write)


def parts(args: argparse.Namespace, with_peers: bool) -> list[Part]:
    """In order of what would be missed most."""
    small, middle, large = ("tiny",) * 3 if args.tiny else ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
    batch, length = (2, 64) if args.tiny else (8, 2048)
    case = training.Case(small, "bfloat16", 16, batch, length)
    return [
        latency_part("latency-1b", small, 150, args, methods=("lora", FUSED, "zflora-uniform"), peers=with_peers),
        Part("train-1b", 120, lambda: training.measure([case], ("lora", FUSED), repeats=3, with_peft=with_peers), training.write),
        latency_part("latency-7b", large, 100, args, methods=(FUSED,)),
        latency_part("latency-3b", middle, 90, args, methods=(FUSED,)),
        latency_part("latency-1b-ranks", small, 90, args, methods=(FUSED,), ranks=(8, 64)),
    ]


def reached(found: dict[str, dict[str, Any]], peak: float) -> list[dict[str, str]]:
    """The targets that the parts in `found` speak to, as rows."""
    rows = []
    for part, share in (("latency-1b", 0.6), ("latency-3b", 0.7), ("latency-7b", 0.8)):
        for row in found.get(part, {}).get("rows", []):
            if row["label"] == latency.BASE:
                what = f"{part}, base: share of the measured bandwidth floor"
                rows.append({"what": what, "target": f">= {share}", "measured": f"{row['floor_share']:.2f} ({row['tpot_ms']:.3f} ms)"})
            if row["label"] == FUSED:
                what = f"{part}, r={row['rank']}: TPOT / base (bytes x {row['bytes_ratio']:.3f})"
                rows.append({"what": what, "target": f"<= {row['bytes_ratio'] + 0.01:.3f}", "measured": f"{row['tpot_ratio']:.3f}"})
    for row in found.get("train-1b", {}).get("rows", []):
        share = 4 * count_base(preset(row["case"].model)) * row["tokens_per_s"] / peak
        measured = f"{share:.1%} MFU, {row['tokens_per_s']:.0f} tokens/s, peak {row['peak_bytes'] / 2**30:.1f} GiB"
        if "step_ratio" in row:
            measured += f", {1 / row['step_ratio']:.2f} x PEFT's tokens/s, {row['memory_ratio']:.2f} x its memory"
        target = "-" if row["label"] == training.PEFT else ">= 40% MFU by 4N, >= 1.3 x PEFT's tokens/s, less memory"
        rows.append({"what": f"train-1b, {row['label']}", "target": target, "measured": measured})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=570, metavar="SECONDS", help="for all parts (default: 570)")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of the GPU in bfloat16, for MFU (default: 989, an H100)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave transformers and PEFT out")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script on any machine")
    parser.add_argument("--out", default="results/gpu", metavar="DIR")
    args = parser.parse_args()
    started, out, env = time.perf_counter(), Path(args.out), environment()
    out.mkdir(parents=True, exist_ok=True)
    without: dict[str, str] = {}
    if args.peers:
        try:
            peers.imports()
        except ConfigError as error:
            args.peers, without["transformers and PEFT"] = False, str(error)
    found: dict[str, dict[str, Any]] = {}
    for part in parts(args, args.peers):
        left = args.budget - (time.perf_counter() - started)
        if not args.tiny and part.seconds > left:
            without[part.name] = f"it takes up to {part.seconds:.0f} s, and {left:.0f} s were left of the budget"
            continue
        try:
            with compile_cache(out / "compile_cache"):
                found[part.name] = part.run()
            part.write(found[part.name] | {"environment": env}, out / part.name, f"{part.name}, {jax.devices()[0].device_kind}")
        except Exception as error:  # a kernel that this GPU lacks, or no memory left: the other parts still tell something
            without[part.name] = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{part.name}: {without.get(part.name, 'done')}, {time.perf_counter() - started:.0f} s since the start", flush=True)
    rows = reached(found, args.peak_tflops * 1e12)
    write_json(out / "gpu.json", {"targets": rows, "left_out": without, "environment": env})
    text = f"# {jax.devices()[0].device_kind}\n\nbfloat16, random weights. MFU by 4N FLOPs a token, of {args.peak_tflops:g} TFLOP/s.\n\n"
    text += (markdown_table(rows, list(rows[0])) if rows else "Nothing was measured.") + "\n\n"
    text += "".join(f"Left out: {name}: {why}\n\n" for name, why in without.items())
    text += f"Command: `{env['command']}`; commit {env['commit']}; device {env['device']}; jax {env['jax']}; {env['date']}.\n"
    atomic_write(out / "gpu.md", text.encode())
    print(text)
    if not found:
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
