"""`zflora bench`: one subcommand per measurement."""

from __future__ import annotations

import argparse
import os
from typing import Any

from zflora_jax.cli.options import CommandParser
from zflora_jax.core.presets import PRESETS, preset

SUMMARY = "Measure on this machine what the project claims."
_MODEL = {
    "latency": "a preset's shape with random weights (see --real), or a model as for eval",
    "train": "a model as for eval; presets other than smollm2-135m get random weights",
}


def add_options(parser: CommandParser) -> None:
    kinds = parser.add_subparsers(
        dest="kind",
        required=True,
        metavar="WHAT",
        help="which measurement; each has its own --help",
    )
    for name, text, add in (
        (
            "latency",
            "TTFT and TPOT of the base, LoRA beside it and fused models, by turns.",
            _add_latency_options,
        ),
        (
            "train",
            "Time and memory of a training step, beside PEFT's on the same weights and batch (it"
            " comes with the test extra).",
            _add_train_options,
        ),
    ):
        sub = kinds.add_parser(name, help=text, description=text)
        _add_shared_options(sub, name)
        add(sub)
    text = (
        "Kernels, copies, memory and estimated cycles of a token, compiled for devices that are"
        " absent."
    )
    _add_compile_options(kinds.add_parser("compile", help=text, description=text))


def _add_shared_options(parser: CommandParser, name: str) -> None:
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="MODEL",
        help=_MODEL[name],
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of weights and activations (default: float32)",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns (default: 7)")
    parser.add_argument(
        "--out",
        default=f"results/{name}",
        metavar="PATH",
        help=f"PATH.json, .md and .png are written (default: results/{name})",
    )


def _add_latency_options(parser: CommandParser) -> None:
    parser.add_argument("--methods", nargs="+", metavar="M", help="methods to fuse (default: all)")
    for option, default, metavar, text in (
        ("--ranks", 16, "R", "all at the first batch and prompt length"),
        ("--batches", 1, "B", "all at the first rank"),
        ("--prompts", 32, "T", "prompt lengths, all at the first rank"),
    ):
        parser.add_argument(
            option,
            nargs="+",
            type=int,
            default=[default],
            metavar=metavar,
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="generated after each prompt (default: 32)",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="load the weights of --model even if it names a preset (smollm2-135m)",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="transformers and PEFT take turns too (they come with the test extra)",
    )
    # The name that it had: commands in results/ have it.
    parser.add_argument("--peers", dest="baselines", action="store_true", help=argparse.SUPPRESS)


def _add_train_options(parser: CommandParser) -> None:
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["lora", "zflora-minimal"],
        metavar="M",
        help="methods (default: lora zflora-minimal)",
    )
    parser.add_argument(
        "--rank", type=int, default=16, metavar="R", help="of all of them (default: 16)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="B", help="sequences a step (default: 8)"
    )
    parser.add_argument(
        "--length", type=int, default=128, metavar="T", help="tokens a sequence (default: 128)"
    )
    parser.add_argument(
        "--masked",
        nargs="+",
        type=float,
        default=[0.0, 0.5, 0.8],
        metavar="SHARE",
        help="of positions without loss: 0 0.5 0.8",
    )
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=["none"],
        metavar="KIND",
        help="how the base's kernels are stored: none, or as codes, e.g. int8 nf4, which PEFT has"
        " of bitsandbytes (default: none)",
    )
    parser.add_argument(
        "--no-peft", dest="with_peft", action="store_false", help="measure ours alone"
    )


def _add_compile_options(parser: CommandParser) -> None:
    for option, default, metavar, text in (
        ("--targets", ["tpu:v5e:1x1", "tpu:v6e:1x1", "cuda:h100"], "T", "devices to compile for"),
        ("--models", ["llama-3.2-1b"], "M", "presets, whose shapes are compiled"),
        ("--methods", None, "M", "methods to fuse; those that widen have a program of their own"),
    ):
        shown = " ".join(default) if default else "all"
        parser.add_argument(
            option,
            nargs="+",
            default=default,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )
    for option, numbers, metavar, text in (
        ("--ranks", [8, 16, 32, 64, 128], "R", "of the adapters"),
        ("--batches", [1, 8], "B", "rows"),
    ):
        shown = " ".join(map(str, numbers))
        parser.add_argument(
            option,
            nargs="+",
            type=int,
            default=numbers,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )
    parser.add_argument(
        "--layers", type=int, default=4, metavar="N", help="compiled; 0: all (default: 4)"
    )
    parser.add_argument(
        "--out",
        default="results/compile",
        metavar="PATH",
        help="PATH.json, .md and .png are written (default: results/compile)",
    )


def run(args: argparse.Namespace) -> None:
    # Torch needs room on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # times to compile are reported
    {"latency": _latency, "train": _train, "compile": _compile}[args.kind](args)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _compile(args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # leaves a device that is there alone
    from zflora_jax.bench import compiled
    from zflora_jax.reporting.provenance import environment

    settings = _given(args, "methods", "ranks", "batches", "layers")
    rows = compiled.measure(args.targets, args.models, **settings)
    compiled.write({"rows": rows, "environment": environment()}, args.out)


def _train(args: argparse.Namespace) -> None:
    from zflora_jax.bench import training
    from zflora_jax.reporting.provenance import environment

    cases = [
        training.Case(args.model, args.dtype, args.rank, args.batch, args.length, masked, kind)
        for masked in args.masked
        for kind in args.quantize
    ]
    result = training.measure(cases, **_given(args, "methods", "repeats", "with_peft"))
    result |= {"environment": environment()}
    training.write(result, args.out, f"A training step: {args.model}, {args.dtype}")


def _latency(args: argparse.Namespace) -> None:
    from zflora_jax.bench import latency
    from zflora_jax.hf.load import load_model
    from zflora_jax.reporting.provenance import environment

    shape = args.model in PRESETS and not args.real
    source = preset(args.model) if shape else load_model(args.model, dtype=args.dtype)
    settings = _given(
        args,
        "dtype",
        "methods",
        "ranks",
        "batches",
        "prompts",
        "new_tokens",
        "repeats",
        "baselines",
    )
    result = latency.measure(source, **settings)
    result |= {
        "settings": {"model": args.model, "weights": "random" if shape else "real"} | settings,
        "environment": environment(),
    }
    latency.write(result, args.out, f"Decode latency: {args.model}, {args.dtype}")
