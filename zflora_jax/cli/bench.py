"""`zflora bench latency`."""

from __future__ import annotations

import argparse
import os

from zflora_jax.cli.options import CommandParser
from zflora_jax.core.fields import require
from zflora_jax.core.presets import PRESETS, preset

SUMMARY = "Measure decode latency on this machine. benchmarks/ has more measurements."
_LATENCY = "TTFT and TPOT of the base, unmerged LoRA and fused models, by turns."
_COUNTS = (
    ("--rank", 16, "R", "rank of every adapter"),
    ("--batch", 1, "B", "number of prompts"),
    ("--prompt", 32, "T", "tokens of a prompt"),
    ("--new-tokens", 32, "N", "tokens generated after each prompt"),
    ("--repeats", 7, "N", "turns"),
)


def add_options(parser: CommandParser) -> None:
    commands = parser.add_subparsers(
        dest="measurement", required=True, metavar="MEASUREMENT", help="it has its own --help"
    )
    latency = commands.add_parser("latency", help=_LATENCY, description=_LATENCY)
    text = "a preset's shape with random weights, or a model directory"
    latency.option("--model", "MODEL", text, default="smollm2-135m")
    text, dtypes = "data type of weights and activations", ["float32", "bfloat16"]
    latency.option("--dtype", None, text, default="float32", choices=dtypes)
    latency.option("--methods", "M", "methods to fuse (default: all)", nargs="+")
    for name, default, metavar, text in _COUNTS:
        latency.option(name, metavar, text, int, default=default)
    latency.option("--out", "FILE", "write the rows as JSON too")


def run(args: argparse.Namespace) -> None:
    free = not (args.out and os.path.isdir(args.out))
    require(free, f"out={args.out!r} is a directory: name a file, such as latency.json.")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile times are reported
    from zflora_jax.experiments.latency import FUSED, method_latency, random_base
    from zflora_jax.hf.load import load_model
    from zflora_jax.reporting.files import write_json
    from zflora_jax.reporting.provenance import environment
    from zflora_jax.reporting.tables import markdown_table

    rows = method_latency(
        random_base(preset(args.model), args.dtype)
        if args.model in PRESETS
        else load_model(args.model, dtype=args.dtype),
        args.methods or FUSED,
        rank=args.rank,
        batch=args.batch,
        prompt_length=args.prompt,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
    )
    print(markdown_table(rows, [key for key in rows[0] if not key.endswith(("_min", "_max"))]))
    if args.out:
        names = ("model", "dtype", "rank", "batch", "prompt", "new_tokens", "repeats")
        settings = {name: getattr(args, name) for name in names}
        write_json(args.out, {"settings": settings, "rows": rows, "environment": environment()})
