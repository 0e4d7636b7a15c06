"""`zflora data`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import CommandParser, add_config, add_settings, run_config
from zflora_jax.cli.output import print_table

SUMMARY = (
    "Show what a run will train on: counts, lengths and padding, and rows with the trained tokens"
    " marked. No weights are read."
)


def add_options(parser: CommandParser) -> None:
    add_config(parser)
    parser.option("--rows", "N", "rows to show", int, default=3)
    parser.option("--out", "PATH", "also write the counts to PATH.json")
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from zflora_jax.core.fields import to_dict
    from zflora_jax.experiments.data_view import data_view
    from zflora_jax.hf.load import model_config, model_tokenizer
    from zflora_jax.reporting.files import write_json

    config = run_config(args)
    vocab_size = model_config(config.model).vocab_size
    view = data_view(config, model_tokenizer(config.model), vocab_size, args.rows)
    print_table(view.facts, f"{args.config}: training rows")
    print_table(view.histogram, "sequences by length in tokens")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for number, row in enumerate(view.rows, 1):
        console.print(f"row {number}, trained tokens in [[ ]]:", style="cyan")
        parts = [(f"[[{part}]]", "bold green") if trained else part for part, trained in row]
        console.print(Text.assemble(*parts, style="dim"), end="\n\n")
    if args.out:
        facts = {"facts": view.facts, "histogram": view.histogram}
        write_json(f"{args.out}.json", facts | {"config": to_dict(config)})
