"""`zflora sweep`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from zflora_jax.cli.inputs import changes, load_config
from zflora_jax.cli.options import CommandParser, add_config, add_settings, add_workdir
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import ConfigError, nearest, override, require

if TYPE_CHECKING:
    from zflora_jax.experiments.comparison import Comparison
    from zflora_jax.experiments.grid import Grid

log = logging.getLogger(__name__)

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
    from zflora_jax.experiments.comparison import Comparison
    from zflora_jax.experiments.grid import Grid
    from zflora_jax.experiments.jobs import FAILURES
    from zflora_jax.experiments.overview import overview, page_name
    from zflora_jax.parallel.compile_cache import compile_cache

    plans = load_config(args.config, "get_sweep")
    plans = list(plans) if isinstance(plans, list | tuple) else [plans]
    require(bool(plans), f"get_sweep() of {args.config} returns no sweep.")
    for plan in plans:
        if not isinstance(plan, Comparison | Grid):
            raise ConfigError(
                f"get_sweep() of {args.config} returns {type(plan).__name__}; it must return a"
                " zflora_jax.Grid or Comparison, or a list."
            )
    compared = [plan for plan in plans if isinstance(plan, Comparison)]
    _check(args, [plan.name for plan in plans], len(compared) < len(plans))
    if len(compared) > 1:
        page_name(compared, [plan.name for plan in plans])
    chosen = [plan for plan in plans if args.only in (None, plan.name)]
    some = [p.only(args.methods) if isinstance(p, Comparison) else p for p in chosen]
    some = [_changed(plan, changes(args), args.config) for plan in some]
    if args.workers != 1:
        _share(args)
    with compile_cache(Path(args.workdir) / "compile_cache"):  # one for all runs
        failed = []
        for plan in some:
            workdir = Path(args.workdir) / plan.name if len(plans) > 1 else Path(args.workdir)
            try:
                if isinstance(plan, Grid):
                    _run_grid(args, plan, workdir)
                else:
                    _compare(args, plan, workdir, len(some) > 1)
            except FAILURES as error:  # the others do not depend on it
                if len(some) == 1:
                    raise
                failed.append(str(error))
    if len(compared) > 1 and not args.worker and (page := overview(compared, args.out)):
        print(f"all of them in {page}")
    require(not failed, "\n".join(failed))


def _run_grid(args: argparse.Namespace, plan: Grid, workdir: Path) -> None:
    from zflora_jax.experiments.grid import run_grid
    from zflora_jax.experiments.store import FINISHED

    rows = run_grid(
        plan.base,
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


def _compare(args: argparse.Namespace, plan: Comparison, workdir: Path, several: bool) -> None:
    from zflora_jax.experiments.compare import compare_methods, has_runs

    if args.tables and several and not has_runs(plan, workdir, args.out):
        print(f"{plan.name}: no run with these settings is there; no table is written")
        return
    found = compare_methods(plan, workdir, args.out, console=not args.worker, run=not args.tables)
    for row in () if args.worker else found["rows"]:
        print_table(row, f"{plan.name}: {row['method']}")


def _check(args: argparse.Namespace, names: list[str], has_grid: bool) -> None:
    """Refuse two sweeps of one name among `names`, and options that they do not have."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"{args.config}: two sweeps are called {twice[0]!r}; their pages would be one. Rename"
            " one of them."
        )
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
      SystemExit: a worker was stopped or broke down, with its exit code; it has said why.
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
    codes = run_pinned(command, args.workers)
    if lost := codes.count(128 + signal.SIGKILL):
        log.warning(
            "%d of %d workers were killed, perhaps for want of memory: what is left runs in one"
            " process. Fewer --workers need less memory.",
            lost,
            args.workers,
        )
    # What a killed worker left, or could not make (2), the caller tries; it says what is missing.
    if ended := [code for code in codes if code not in (0, 2, 128 + signal.SIGKILL)]:
        if max(ended) > 128:
            log.error("a worker was ended by signal %d.", max(ended) - 128)
        raise SystemExit(max(ended))


_Plan = TypeVar("_Plan", "Comparison", "Grid")
# What a comparison gives to each of its runs: of the method, the chosen rate, the seed.
_OF_RUNS = ("adapter", "optim.learning_rate", "train.seed", "data.seed", "eval.split")


def _changed(plan: _Plan, settings: dict[str, str], config: str) -> _Plan:
    """A sweep with other settings of its base.

    Raises:
      ConfigError: the sweep gives one of these settings to each of its runs.
    """
    from zflora_jax.experiments.grid import Grid, combinations
    from zflora_jax.training.identity import same_numbers

    own = set(_OF_RUNS)
    if isinstance(plan, Grid):
        runs = [set(changes) for _, changes in combinations(plan.base, plan.settings)]
        own = set.intersection(*runs)
    if given := [key for key in settings if {key, key.partition(".")[0]} & own]:
        raise ConfigError(
            f"--set {given[0]}: {plan.name} gives it to each of its runs, so this would change"
            f" nothing. Change get_sweep() in {config}."
        )
    base = override(plan.base, settings)
    if not isinstance(plan, Grid) and not same_numbers(plan.base, base):
        plan = plan.unread()
    return dataclasses.replace(plan, base=base)
