"""`zflora train`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.inputs import changes, run_config
from zflora_jax.cli.options import CommandParser, add_settings, add_workdir
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
    processes = parser.add_argument_group(
        "several processes (every one runs this command, with a workdir that they share)"
    )
    processes.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by SLURM, Open MPI, Kubernetes or Cloud TPU",
    )
    processes.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 (or ZFLORA_COORDINATOR)"
    )
    processes.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="how many there are (or ZFLORA_NUM_PROCESSES)",
    )
    processes.add_argument(
        "--process-id",
        type=int,
        metavar="I",
        help="which one this is, from 0 (or ZFLORA_PROCESS_ID)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.train import train
    from zflora_jax.parallel import distributed
    from zflora_jax.training.workdir import read_config

    distributed.start(
        args.coordinator, args.num_processes, args.process_id, detect=args.distributed
    )
    if args.config:
        config = run_config(args)
    elif args.resume:
        config = override(read_config(args.workdir), changes(args))
    else:
        raise ConfigError(
            "train needs --config FILE, or --resume to go on with the run in --workdir."
        )
    report = train(config, args.workdir, resume=args.resume, console=distributed.is_main()).report
    if distributed.is_main():
        print_table(report, f"trained in {args.workdir}")
