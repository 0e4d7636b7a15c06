"""`zflora sweep`."""

from __future__ import annotations

import argparse
import dataclasses

from zflora_jax.cli.inputs import changes, load_config
from zflora_jax.cli.options import CommandParser, add_config, add_settings, add_workdir
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import override, require

SUMMARY = "Train every combination of a grid of settings. Finished runs are not repeated."


def add_options(parser: CommandParser) -> None:
    add_config(parser, "get_sweep() -> Grid")
    add_workdir(parser, "where the runs live, one directory each, and their table, rows.md")
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.grid import FINISHED, Grid, combinations, run_grid

    grid = load_config(args.config, "get_sweep")
    require(
        isinstance(grid, Grid),
        f"get_sweep() of {args.config} returns {type(grid).__name__}; it must return a zf.Grid.",
    )
    runs, settings = combinations(grid.base, grid.settings), changes(args)
    for key in settings:
        require(
            not all(key in changed for _, changed in runs),
            f"--set {key}: the grid gives it to each of its runs, so this would change nothing."
            f" Change get_sweep() in {args.config}.",
        )
    grid = dataclasses.replace(grid, base=override(grid.base, settings))
    rows = run_grid(grid.base, grid.settings, args.workdir)
    for row in rows:
        print_table(row, row["run"])
    require(
        any(row["status"] == FINISHED for row in rows), f"no run has finished: {rows[0]['status']}"
    )
