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
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    from zflora_jax.experiments.data_view import data_view
    from zflora_jax.hf.load import model_config, model_tokenizer

    config = run_config(args)
    model = model_config(config.model)
    view = data_view(config, model_tokenizer(config.model), model, args.rows)
    print_table(view.facts, f"{args.config}: training rows")
    most = max(view.histogram.values())
    bars = {k: f"{'█' * round(30 * n / most):30} {n:,}" for k, n in view.histogram.items()}
    print_table(bars, "sequences by length in tokens")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for number, row in enumerate(view.rows, 1):
        console.print(f"\nrow {number}, trained tokens in [[ ]]:", style="bold cyan")
        for i in range(1, row[-1][0] + 1):
            parts = [span for span in row if span[0] == i]
            size = sum(tokens for *_, tokens in parts)
            console.print(f"-- sequence {i} of {row[-1][0]}, {size:,} tokens", style="cyan")
            texts = [(f"[[{x}]]", "bold green") if trained else x for _, x, trained, _ in parts]
            console.print(Text.assemble(*texts, style="dim"))
