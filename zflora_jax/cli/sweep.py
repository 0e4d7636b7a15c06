"""`zflora sweep`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import CommandParser, add_config, add_settings, changes, load_config
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import override, require
from zflora_jax.core.run_config import RunConfig

SUMMARY = "Train every combination of a grid of settings. Finished runs are not repeated."


def add_options(parser: CommandParser) -> None:
    add_config(parser, "get_sweep() -> (RunConfig, settings), see zf.sweep")
    text = "directory of the runs, one folder each, and of their table, rows.md"
    parser.option("--workdir", "DIR", text, required=True)
    text = "number of runs that train at a time in one program, see zf.sweep"
    parser.option("--together", "N", text, type=int, default=1)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.grid import FINISHED, combinations, run_grid

    found = load_config(args.config, "get_sweep")
    require(
        isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], RunConfig),
        f"get_sweep() of {args.config} returns {type(found).__name__}; it must return (RunConfig,"
        " settings), the first two arguments of zf.sweep.",
    )
    (base, grid), settings = found, changes(args)
    for key in settings:
        require(
            not all(key in changed for _, changed in combinations(base, grid)),
            f"--set {key}: the grid sets it for each of its runs, so this would change nothing."
            f" Change get_sweep() in {args.config}.",
        )
    rows = run_grid(override(base, settings), grid, args.workdir, together=args.together)
    for row in rows:
        print_table(row, row["run"])
    finished = any(row["status"] == FINISHED for row in rows)
    require(finished, f"no run has finished: {rows[0]['status']}")
