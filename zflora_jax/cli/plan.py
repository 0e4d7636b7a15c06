"""`zflora plan`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import CommandParser, add_config, add_settings, run_config
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.storage import output_path

SUMMARY = (
    "Report what a run needs before it starts: parameters, memory per device, steps, tokens. No"
    " weights are read."
)


def add_options(parser: CommandParser) -> None:
    add_config(parser)
    text = "memory of one device in GiB: reports whether the run fits and what to change"
    parser.option("--memory", "GIB", text, float)
    parser.option(
        "--target",
        "DEVICES",
        "compile the train step for devices that may be absent, such as tpu:v5e:2x4 or cuda:h100:8"
        " (default: this machine's CPU, as many virtual devices as the mesh has)",
    )
    parser.option("--out", "FILE", "write the plan as JSON too")
    text = "write the compiled train step, for `zflora train --step FILE` on that device"
    parser.option("--save", "FILE", text)
    add_settings(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args)
    for name in ("out", "save"):
        if getattr(args, name):
            output_path(getattr(args, name), f"--{name}")
    require(
        args.target is None or args.memory is None,
        "--target already has a known memory: leave out --memory.",
    )
    import jax

    jax.config.update("jax_platforms", "cpu")  # before anything touches a device
    if args.target is None and config.mesh.devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.devices)
    from zflora_jax.experiments.plan import memory_plan, plan_table
    from zflora_jax.hf.load import model_config
    from zflora_jax.parallel.targets import target
    from zflora_jax.reporting.files import write_json
    from zflora_jax.reporting.provenance import environment

    where = target(args.target) if args.target is not None else None
    plan = memory_plan(config, model_config(config.model), where, args.memory, args.save)
    print_table(plan_table(plan), f"{args.config}: {config.model}, {config.adapter.method}")
    if args.save:
        print(f"the compiled step is in {args.save}")
    if args.out:
        write_json(args.out, plan | {"config": to_dict(config), "environment": environment()})
