"""`zflora quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path

from zflora_jax.cli.options import CommandParser, add_config, add_settings, run_config
from zflora_jax.cli.output import print_table

SUMMARY = "The whole path on SmolLM2-135M: train, evaluate, fuse, check, decode, export, report."


def add_options(parser: CommandParser) -> None:
    text = "directory for run, export and report"
    parser.option("--workdir", "DIR", text, default="runs/quickstart")
    add_config(parser, required=False, default="quickstart")
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args)  # a wrong setting is refused before jax is imported
    from zflora_jax.experiments.quickstart import SWITCHES, quickstart
    from zflora_jax.parallel.compile_cache import compile_cache

    with compile_cache(Path(args.workdir) / "compile_cache"):
        report = quickstart(config, args.workdir)
    print_table(report, f"quickstart, written to {args.workdir}/quickstart.json")
    if "switch_ms" in report:
        same = "bit for bit" if report["base_bit_for_bit"] else "but NOT bit for bit: report this"
        print(f"the adapter changed in the live model: {report['switch_ms']:.3g} ms")
        print(f"unfused after {SWITCHES} changes, the base is back, {same}")
    if "accuracy_on_blocks" in report:
        accuracy = f"{report['accuracy_on_blocks']:.2f} ({report['accuracy_after']:.2f} on floats)"
        print(f"the same adapter on the file's unchanged quantised blocks: accuracy {accuracy}")
