"""`zflora train`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import (
    CommandParser,
    add_config,
    add_processes,
    add_settings,
    changes,
    join,
    run_config,
)
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import override, require

SUMMARY = "Train an adapter, or resume the run that the workdir holds."


def add_options(parser: CommandParser) -> None:
    add_config(parser, required=False)
    text = "directory, or s3:// or gs:// URL, of the run: config, checkpoints, metrics, report"
    parser.option("--workdir", "DIR", text, required=True)
    text = "resume the run in the workdir, or fail if there is none; --config may be left out"
    parser.add_argument("--resume", action="store_true", help=text)
    text = "file of `zflora plan --save`, to compile nothing here; it is run, so it must be trusted"
    parser.option("--step", "FILE", text)
    add_processes(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.train import train
    from zflora_jax.training.workdir import read_config

    main = join(args)
    require(
        args.config or args.resume,
        "train needs --config FILE, or --resume to resume the run in --workdir.",
    )
    there = None if args.config else read_config(args.workdir)
    config = run_config(args) if there is None else override(there, changes(args))
    how = {"resume": args.resume, "console": main, "compiled": args.step}
    report = train(config, args.workdir, **how).report
    if main:
        print_table(report, f"trained in {args.workdir}")
