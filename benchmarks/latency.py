"""Decode latency of the base, unmerged LoRA and fused models by rank, batch and prompt length, with
the time to read the weights; next to transformers and PEFT with --baselines (extra: test).

Command: python benchmarks/latency.py --real --baselines --ranks 16 64 --batches 1 8
(about 20 minutes on 2 CPU cores)
Writes results/latency.json, .md and -ratio.png. Every rank is measured at the first batch and
prompt length, every batch and prompt length at the first rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping
from typing import Any

from harness import arguments, at_least, bandwidth_meter

from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row per case and contender.

    Rows are those of `latency.latency_rows` with rank, batch and prompt; read_bytes per token and
    bytes_ratio to the base's; floor_ms = read_bytes / the bandwidth measured just before the
    contender, and floor_share = floor_ms / tpot_ms (medians over turns).
    """
    from decode_programs import read_bytes

    from zflora_jax.experiments import latency
    from zflora_jax.hf.load import load_model

    base = (
        load_model(args.model, dtype=args.dtype)
        if args.real or args.model not in PRESETS
        else latency.random_base(preset(args.model), args.dtype)
    )
    meter, rows = bandwidth_meter(), list[dict[str, Any]]()
    cases = dict.fromkeys(
        [(rank, args.batches[0], args.prompts[0]) for rank in args.ranks]
        + [(args.ranks[0], b, p) for b in args.batches for p in args.prompts]
    )
    for rank, batch, prompt in cases:
        ready = latency.contenders(base, args.methods, rank, (batch, prompt, args.new_tokens))
        if args.baselines:
            from peft_baselines import decode_baselines

            ready |= decode_baselines(base.config, args.dtype, rank, batch, prompt)
        rates: dict[str, list[float]] = {label: [] for label in ready}
        found = latency.decode_turns(
            ready, args.new_tokens, args.repeats, lambda label, to=rates: to[label].append(meter())
        )
        sizes = {
            label: read_bytes(
                {"params": one.model.params} | ({"adapters": one.adapters} if one.adapters else {}),
                one.model.config,
                batch,
                prompt + args.new_tokens // 2,
            )
            for label, one in ready.items()
            if one.model is not None
        }
        for row in latency.latency_rows(ready, found):
            row = {"rank": rank, "batch": batch, "prompt": prompt} | row
            if size := sizes.get(label := row["label"]):
                floors = [1e3 * size / rate for rate in rates[label]]
                row |= {"read_bytes": size, "bytes_ratio": size / sizes[latency.BASE]}
                row["floor_ms"] = statistics.median(floors)
                row["floor_share"] = latency.ratio(floors, found[label]["tpot_ms"])
            rows.append(row)
            print(row, flush=True)
    return rows


def page(result: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    settings = result["settings"]
    rates = [r["read_bytes"] / r["floor_ms"] / 1e6 for r in result["rows"] if "floor_ms" in r]
    shown = [_line(row) for row in result["rows"]]
    return f"""# Decode latency: {settings["model"]}, {settings["dtype"]}

**{_finding(result["rows"])}.**

![TPOT relative to the base's](latency-ratio.png)

{markdown_table(shown, list(shown[0]))}

- {settings["weights"]} weights, {settings["new_tokens"]} new tokens, greedy. Medians of
  {settings["repeats"]} turns [minimum, maximum]; all rows of a case take turns in one process.
- x base: median over turns of the ratio within a turn. bytes: weights and half-filled cache that a
  token reads. of floor: time to read them over TPOT (at {min(rates):.1f} to {max(rates):.1f} GB/s,
  measured in the same turns).
- lora unmerged: LoRA's products next to packed base weights. lora merged has the base's shapes, so
  its difference from the base is noise. idle: the adapter is disabled.

{origin_line(result["environment"])}
"""


def _finding(rows: list[dict[str, Any]]) -> str:
    ratios = {row["label"]: row["tpot_ratio"] for row in reversed(rows)}  # of the first case
    found = [f"{name} {ratios[name]:.2f}" for name in ("zflora-minimal", "lora unmerged")]
    return f"Time per token relative to the base's: {', '.join(found)}"


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    def text(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    spread = f"[{row['tpot_ms_min']:.2f}, {row['tpot_ms_max']:.2f}]"
    return {
        "rank": row["rank"],
        "batch": row["batch"],
        "prompt": row["prompt"],
        "": row["label"],
        "TTFT, ms": text("ttft_ms", ".1f"),
        "x base": text("ttft_ratio", ".3f"),
        "TPOT, ms": f"{row['tpot_ms']:.2f} {spread}",
        "x base ": text("tpot_ratio", ".3f"),
        "bytes x base": text("bytes_ratio", ".3f"),
        "of floor": text("floor_share", ".2f"),
        "compile, s": text("compile_s", ".1f"),
        "memory, MB": text("memory_mb", ".0f"),
    }


def draw(result: Mapping[str, Any], out: object) -> None:
    """Draws TPOT relative to the base's in the first case."""
    from plots import bars

    rows = result["rows"]
    first = [r for r in rows if all(r[k] == rows[0][k] for k in ("rank", "batch", "prompt"))]
    first = [r for r in first if "idle" not in r["label"] and "transformers" not in r["label"]]
    spread = {
        r["label"]: abs((r["tpot_ms_max"] - r["tpot_ms_min"]) / 2 / r["tpot_ms"] * r["tpot_ratio"])
        for r in first
    }
    bars(
        {row["label"]: row["tpot_ratio"] for row in first},
        f"{out}-ratio",
        _finding(rows),
        spread=spread,
        label=f"TPOT / base's TPOT: {result['settings']['model']}, {result['settings']['dtype']},"
        f" rank {rows[0]['rank']}, batch {rows[0]['batch']}; whiskers: half the range",
    )


def main() -> None:
    from zflora_jax.core.adapter_config import METHODS

    fused = [method for method in METHODS if method != "full"]
    parser = arguments(__doc__, "latency")
    parser.add_argument("--model", default="smollm2-135m", help="a preset, or a model directory")
    parser.add_argument("--real", action="store_true", help="load the weights of a preset")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", default=fused, choices=fused)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--prompts", nargs="+", type=int, default=[32], help="prompt lengths")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--baselines", action="store_true", help="transformers and PEFT, too")
    args = parser.parse_args()
    at_least(parser, args, ranks=1, batches=1, prompts=1, new_tokens=2, repeats=1)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch uses the same GPU
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile times are reported
    real = args.real or args.model not in PRESETS
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "real")}
    result = {
        "rows": measure(args),
        "settings": settings | {"weights": "real" if real else "random"},
        "environment": environment(),
    }
    write_result(args.out, result, page(result))
    draw(result, args.out)


if __name__ == "__main__":
    main()
