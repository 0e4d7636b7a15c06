"""`zflora plan`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.inputs import run_config
from zflora_jax.cli.options import CommandParser, add_config, add_settings
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import to_dict

SUMMARY = (
    "Say what a run needs before anything runs: parameters, memory per device, steps, tokens. No"
    " weights are read."
)


def add_options(parser: CommandParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="what one device has, in GiB: says whether the run fits and what to change",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also compile the train step, for as many virtual CPU devices as the mesh has",
    )
    parser.add_argument("--out", metavar="FILE", help="write the plan as JSON too")
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args)
    if args.compile:  # before anything touches a device
        import jax

        devices = config.mesh.devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    from zflora_jax.experiments.compiled_plan import compiled
    from zflora_jax.experiments.planner import memory_plan, plan_lines
    from zflora_jax.hf.load import model_config
    from zflora_jax.reporting.files import write_json
    from zflora_jax.reporting.provenance import environment

    model = model_config(config.model)
    plan = memory_plan(config, model, args.memory)
    if args.compile:
        plan["compiled"] = compiled(config, model)
    print_table(plan, f"{args.config}: {config.model}, {config.adapter.method}")
    print("\n".join(["bytes per device", *plan_lines(plan)]))
    if args.out:
        write_json(args.out, plan | {"config": to_dict(config), "environment": environment()})
