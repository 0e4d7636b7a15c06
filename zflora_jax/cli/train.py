"""`zflora train`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.inputs import changes, run_config
from zflora_jax.cli.options import CommandParser, add_processes, add_settings, add_workdir, join
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import ConfigError, override

SUMMARY = "Train an adapter, or resume the run that the workdir holds."


def add_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a Python file with get_config() -> RunConfig, e.g. configs/quickstart.py",
    )
    add_workdir(
        parser,
        "directory, or s3:// or gs:// URL, of the run: config, checkpoints, metrics, report",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=(
            "go on with the run in the workdir, or fail if there is none; --config may be left out"
        ),
    )
    add_processes(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.train import train
    from zflora_jax.training.workdir import read_config

    main = join(args)
    if args.config:
        config = run_config(args)
    elif args.resume:
        config = override(read_config(args.workdir), changes(args))
    else:
        raise ConfigError(
            "train needs --config FILE, or --resume to go on with the run in --workdir."
        )
    report = train(config, args.workdir, resume=args.resume, console=main).report
    if main:
        print_table(report, f"trained in {args.workdir}")
