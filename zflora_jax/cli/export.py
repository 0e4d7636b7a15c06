"""`zflora export`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import CommandParser, add_mesh, add_processes, changes, join, mesh_asked
from zflora_jax.cli.output import print_table
from zflora_jax.cli.stopping import terminated
from zflora_jax.experiments.export import DEFAULT, EXPORTERS

SUMMARY = (
    "Write a trained run for other software: a fused Hugging Face directory, a GGUF file, a PEFT"
    " adapter directory (LoRA), or slices of a task for a server."
)


def add_options(parser: CommandParser) -> None:
    parser.option("--workdir", "DIR", "the run to export", required=True)
    parser.option(
        "--out",
        "PATH",
        "a new directory or s3:// or gs:// URL (gguf: a new .gguf file), or an earlier export to"
        " replace",
        required=True,
    )
    text = "a number of steps, or best (default: the newest)"
    parser.option("--checkpoint", "STEP", text)
    text = "; ".join(f"{name}: {exporter.text}" for name, exporter in EXPORTERS.items())
    parser.option("--format", None, text, choices=list(EXPORTERS), default=DEFAULT)
    text = "data type of the exported weights (default: as trained)"
    parser.option("--dtype", None, text, choices=["float32", "bfloat16", "float16"])
    parser.option(
        "--quant",
        "TYPE",
        "gguf: type of the weights, f32, f16, bf16, q8_0 (default), q4_0, q4_1, or"
        " keep: the base's quantised blocks, of a run with quantize.kernels=keep; hf: kernels as"
        " codes for vLLM and transformers (compressed-tensors), int8 (W8A16), w8a8 or int4 (W4A16,"
        " in the groups of the base's codes, else of 64) (default: as floats)",
    )
    parser.option(
        "--eps",
        "E",
        "scale of the residual state, a power of two in 2^-10..1 (default: chosen from the weights"
        " for --dtype or --quant); 0.0625 for software that quantises an export to int8 itself",
        float,
    )
    add_mesh(parser)
    add_processes(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.export import export_run
    from zflora_jax.training.workdir import read_config

    main = join(args)
    mesh = mesh_asked(changes(args), read_config(args.workdir))
    given = {"format": args.format, "dtype": args.dtype, "quant": args.quant, "eps_z": args.eps}
    with terminated():  # it leaves no half-written model next to --out
        report = export_run(args.workdir, args.out, checkpoint=args.checkpoint, mesh=mesh, **given)
    if main:
        print_table(report, f"exported to {args.out}")
