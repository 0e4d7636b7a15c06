"""`zflora data`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.inputs import run_config
from zflora_jax.cli.options import CommandParser, add_config, add_settings
from zflora_jax.cli.output import print_table

SUMMARY = (
    "Show what a run will train on: counts, lengths and padding, and rows with the trained tokens"
    " marked. No weights are read."
)


def add_options(parser: CommandParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)"
    )
    parser.add_argument("--out", metavar="PATH", help="also write the counts to PATH.json")
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
    begin, end = ("", "") if console.is_terminal else ("[[", "]]")
    how = "bold and green" if console.is_terminal else "in [[ ]]"
    for number, row in enumerate(view.rows, 1):
        text = Text()
        for part, trained in row:
            text.append(
                f"{begin}{part}{end}" if trained else part, "bold green" if trained else "dim"
            )
        console.print(f"row {number}, trained tokens {how}:", style="cyan")
        console.print(text, end="\n\n")
    if args.out:
        facts = {"facts": view.facts, "histogram": view.histogram}
        write_json(f"{args.out}.json", facts | {"config": to_dict(config)})
