"""`zflora plan`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.inputs import run_config
from zflora_jax.cli.options import CommandParser, add_config, add_settings
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import require, to_dict

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
    parser.add_argument(
        "--target",
        metavar="DEVICES",
        help="compile the train step for devices that are absent, such as tpu:v5e:2x4 or"
        " cuda:h100:8: memory, collectives, kernels, a roofline",
    )
    parser.add_argument("--out", metavar="FILE", help="write the plan as JSON too")
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args)
    require(
        args.target is None or (args.memory is None and not args.compile),
        "--target has a memory and a compiler of its own: leave out --memory and --compile.",
    )
    if args.compile or args.target:  # before anything touches a device
        import jax

        jax.config.update("jax_platforms", "cpu")
        if args.compile:
            jax.config.update("jax_num_cpu_devices", config.mesh.devices)
    from zflora_jax.experiments.compiled_plan import compiled
    from zflora_jax.experiments.planner import memory_plan, plan_lines
    from zflora_jax.experiments.target_plan import target_lines, target_plan
    from zflora_jax.hf.load import model_config
    from zflora_jax.parallel.targets import target
    from zflora_jax.reporting.files import write_json
    from zflora_jax.reporting.provenance import environment

    model = model_config(config.model)
    if args.target:
        plan = target_plan(config, model, target(args.target))
    else:
        plan = memory_plan(config, model, args.memory)
    if args.compile:
        plan["compiled"] = {"bytes": compiled(config, model)}
    print_table(plan, f"{args.config}: {config.model}, {config.adapter.method}")
    if args.target:
        print("\n".join(target_lines(plan)), end="\n\n")
    print("\n".join(["bytes per device, by formula", *plan_lines(plan)]))
    if args.out:
        write_json(args.out, plan | {"config": to_dict(config), "environment": environment()})
