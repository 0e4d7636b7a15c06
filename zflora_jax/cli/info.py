"""`zflora info`."""

from __future__ import annotations

import argparse
import json

from zflora_jax.cli.options import CommandParser
from zflora_jax.cli.output import print_table

SUMMARY = (
    "Say what a run, adapter, export or model is: method, widths, parameters, base, fingerprint,"
    " metrics."
)


def add_options(parser: CommandParser) -> None:
    text = "a workdir, a PEFT or export or Hugging Face directory, a .gguf file, or a preset's name"
    parser.add_argument("path", metavar="PATH", help=text)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.info import describe

    facts = describe(args.path)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_table(facts, str(args.path))
