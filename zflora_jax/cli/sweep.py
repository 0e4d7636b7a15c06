"""`zflora sweep`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zflora_jax.cli.inputs import changes, load_config
from zflora_jax.cli.options import CommandParser, add_config, add_settings, add_workdir
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import ConfigError, nearest, override, require

if TYPE_CHECKING:
    from zflora_jax.experiments.comparison import Comparison

SUMMARY = (
    "Run every combination of a grid of settings, or compare methods at their best rates. Finished"
    " runs are not repeated."
)


def add_options(parser: CommandParser) -> None:
    add_config(parser, "get_sweep() -> Grid or Comparison")
    add_workdir(parser, "where the runs live, one directory each")
    parser.add_argument(
        "--out",
        default="results",
        metavar="DIR",
        help="where the table and its JSON go (default: results)",
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        help=(
            "of a config with several sweeps, the one of this name (several processes can share the"
            " work)"
        ),
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="of every comparison these methods alone; its page then says nothing of the others",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help=(
            "processes that share the runs, each on its own CPU cores (default: 1, on all); one of"
            " one core each gets most done on a CPU"
        ),
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="of comparisons: make no run, and write the tables of those that are there",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.compare import compare_methods, has_runs
    from zflora_jax.experiments.comparison import Comparison
    from zflora_jax.experiments.grid import Grid, run_grid
    from zflora_jax.experiments.overview import overview
    from zflora_jax.experiments.store import FINISHED
    from zflora_jax.parallel.compile_cache import compile_cache

    plans = load_config(args.config, "get_sweep")
    plans = list(plans) if isinstance(plans, list | tuple) else [plans]
    for plan in plans:
        if not isinstance(plan, Comparison | Grid):
            raise ConfigError(
                f"get_sweep() of {args.config} returns {type(plan).__name__}; it must return a"
                " zflora_jax.Grid or Comparison, or a list."
            )
    _check(args, [plan.name for plan in plans], any(isinstance(plan, Grid) for plan in plans))
    chosen = [plan for plan in plans if args.only in (None, plan.name)]
    some = [p.only(args.methods) if isinstance(p, Comparison) else p for p in chosen]
    if args.workers != 1:
        _share(args)
    with compile_cache(Path(args.workdir) / "compile_cache"):  # one for all runs
        for plan in some:
            workdir = Path(args.workdir) / plan.name if len(plans) > 1 else Path(args.workdir)
            if isinstance(plan, Grid):
                rows = run_grid(
                    override(plan.base, changes(args)),
                    plan.settings,
                    workdir,
                    page=Path(args.out) / f"{plan.name}.md",
                    console=not args.worker,
                )
                for row in () if args.worker else rows:
                    print_table(row, f"{plan.name}: {row['run']}")
                require(
                    any(row["status"] == FINISHED for row in rows),
                    f"no run of {plan.name} has finished: {rows[0]['status']}",
                )
                continue
            changed = _changed(plan, changes(args))
            if args.tables and len(some) > 1 and not has_runs(changed, workdir, args.out):
                print(f"{plan.name}: no run with these settings is there; no table is written")
                continue
            found = compare_methods(
                changed, workdir, args.out, console=not args.worker, run=not args.tables
            )
            for row in () if args.worker else found["rows"]:
                print_table(row, f"{plan.name}: {row['method']}")
    compared = [plan for plan in plans if isinstance(plan, Comparison) and not args.worker]
    if len(compared) > 1 and (page := overview(compared, args.out)):
        print(f"all of them in {page}")


def _check(args: argparse.Namespace, names: list[str], has_grid: bool) -> None:
    """Options that the sweeps of a config, `names`, do not have."""
    if args.only is not None and args.only not in names:
        raise ConfigError(
            f"--only {args.only}: no sweep of {args.config} has that name."
            f" {nearest(args.only, names)}."
        )
    require(
        args.workers == 1 or not args.tables,
        f"--workers={args.workers} shares runs, and --tables makes none; leave one of them out.",
    )
    given = [name for name in ("methods", "tables") if getattr(args, name)]
    if given and has_grid:
        raise ConfigError(
            f"--{given[0]} is for comparisons, and {args.config} has a grid. Leave it out."
        )


def _share(args: argparse.Namespace) -> None:
    """Let workers make the runs; the caller then finds them made and writes the tables.

    Raises:
      ConfigError: there are fewer cores than workers.
      SystemExit: a worker failed, with its exit code; it has said why.
    """
    import jax

    from zflora_jax.parallel.workers import run_pinned

    require(
        jax.default_backend() == "cpu",
        f"--workers={args.workers} divides the cores of a CPU, and this machine computes on"
        f" {jax.default_backend()}; leave it out.",
    )
    command = [sys.executable, "-m", "zflora_jax.cli", "sweep", "--worker"]
    for name in ("config", "workdir", "out", "only"):
        if getattr(args, name) is not None:
            command += [f"--{name}", getattr(args, name)]
    for name in ("methods", "set"):
        if getattr(args, name):
            command += [f"--{name}", *getattr(args, name)]
    if any(codes := run_pinned(command, args.workers)):
        raise SystemExit(max(codes, key=abs))


def _changed(plan: Comparison, settings: dict[str, str]) -> Comparison:
    rates_from = _changed(plan.rates_from, settings) if plan.rates_from else None
    return dataclasses.replace(plan, base=override(plan.base, settings), rates_from=rates_from)
