"""`zflora export`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.inputs import changes, mesh_asked
from zflora_jax.cli.options import (
    CommandParser,
    add_checkpoint,
    add_mesh,
    add_processes,
    add_workdir,
    join,
)
from zflora_jax.cli.output import print_table
from zflora_jax.cli.stopping import terminated
from zflora_jax.experiments.export import DEFAULT, EXPORTERS

SUMMARY = (
    "Write a trained run for other software: a fused Hugging Face directory, a GGUF file, or a PEFT"
    " adapter directory (LoRA)."
)


def add_options(parser: CommandParser) -> None:
    add_workdir(parser, "the run to export")
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="a new directory or s3:// or gs:// URL (gguf: a new .gguf file), or an earlier export"
        " to replace",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--format",
        choices=list(EXPORTERS),
        default=DEFAULT,
        help="; ".join(
            f"{name}: {exporter.text}{' (default)' if name == DEFAULT else ''}"
            for name, exporter in EXPORTERS.items()
        ),
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the exported weights (default: as trained)",
    )
    parser.add_argument(
        "--quant",
        metavar="TYPE",
        help="gguf: type of the weights, f32, f16, bf16, q8_0 (default), q4_0, q4_1, or"
        " keep: the base's own blocks, of a run with quantize.kernels=keep; hf: kernels as codes"
        " for vLLM and transformers (compressed-tensors), int8 (W8A16), w8a8, int4 (W4A16, groups"
        " of 64), int4-g32, int4-g64 or int4-g128 (default: as numbers)",
    )
    parser.add_argument(
        "--eps",
        type=float,
        metavar="E",
        help=(
            "scale of the residual state, a power of two in 2^-10..1 (default: chosen from the"
            " weights for --dtype or --quant); 0.0625 for software that makes int8 of an export by"
            " itself"
        ),
    )
    add_mesh(parser)
    add_processes(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.export import export_run
    from zflora_jax.training.workdir import read_config

    main = join(args)
    mesh = mesh_asked(changes(args), read_config(args.workdir))
    with terminated():  # which leaves no half of a model beside --out
        report = export_run(
            args.workdir,
            args.out,
            format=args.format,
            dtype=args.dtype,
            quant=args.quant,
            checkpoint=args.checkpoint,
            eps_z=args.eps,
            mesh=mesh,
        )
    if main:
        print_table(report, f"exported to {args.out}")
