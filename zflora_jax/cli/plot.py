"""`zflora plot`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import CommandParser
from zflora_jax.core.fields import require
from zflora_jax.core.storage import as_path, output_path

SUMMARY = "Draw loss, learning rate, tokens/s and gradient norm of runs, several over each other."


def add_options(parser: CommandParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of runs, finished or not")
    text = "PATH.png and PATH.svg are written (default: curves in the only run; needed for several)"
    parser.option("--out", "PATH", text)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.reporting.metrics import METRICS_FILE
    from zflora_jax.reporting.plots import training_curves

    runs = {run: as_path(run) for run in args.runs}
    for folder in runs.values():
        require(
            (folder / METRICS_FILE).is_file(),
            f"{folder} has no {METRICS_FILE}: give the workdir of a training run.",
        )
    require(
        args.out is not None or len(runs) == 1,
        f"--out PATH says where a figure of {len(runs)} runs goes.",
    )
    out = args.out or str(as_path(args.runs[0]) / "curves")
    out = out.removesuffix(".png").removesuffix(".svg")
    output_path(f"{out}.png", "--out")
    title = args.runs[0] if len(runs) == 1 else f"{len(runs)} runs"
    training_curves({name: path / METRICS_FILE for name, path in runs.items()}, out, title)
    print(f"written: {out}.png, {out}.svg")
