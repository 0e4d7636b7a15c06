"""`zflora plot`."""

from __future__ import annotations

import argparse
import os

from zflora_jax.cli.inputs import damage_is_input
from zflora_jax.cli.options import CommandParser
from zflora_jax.core.fields import require
from zflora_jax.core.storage import as_path

SUMMARY = "Draw loss, learning rate, tokens/s and gradient norm of runs, several over each other."


def add_options(parser: CommandParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of runs, finished or not")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help=(
            "PATH.png and PATH.svg are written (default: curves in the only run; needed for"
            " several)"
        ),
    )
    parser.add_argument(
        "--title", metavar="TEXT", help="above the figure (default: the runs' names)"
    )


def run(args: argparse.Namespace) -> None:
    from zflora_jax.reporting.metrics import METRICS_FILE
    from zflora_jax.reporting.plots import training_curves

    folders = [as_path(os.path.normpath(as_path(run).absolute())) for run in args.runs]
    paths = [os.path.join(*folder.parts) for folder in folders]  # of a URL /s3/BUCKET/...
    # What all have in common says nothing in a legend, unless it is only the root.
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    within = shared != "/"
    names = [os.path.relpath(path, shared) for path in paths] if within else map(str, folders)
    runs = {name: f / METRICS_FILE for name, f in zip(names, folders, strict=True)}
    for path in runs.values():
        require(
            path.is_file(),
            f"{path.parent} has no {METRICS_FILE}: give the workdir of a training run.",
        )
    require(
        args.out is not None or len(runs) == 1,
        f"--out PATH says where a figure of {len(runs)} runs goes.",
    )
    out = (args.out or str(as_path(args.runs[0]) / "curves")).removesuffix(".png")
    out = out.removesuffix(".svg")
    several = f"{len(runs)} runs of {os.path.basename(shared)}" if within else f"{len(runs)} runs"
    of = next(iter(runs)) if len(runs) == 1 else several
    with damage_is_input():
        training_curves(runs, out, args.title or of)
    print(f"written: {out}.png, {out}.svg")
