"""`zflora init`."""

from __future__ import annotations

import argparse

from zflora_jax.cli.options import CONFIGS, CommandParser, named_configs
from zflora_jax.core.fields import require, require_in
from zflora_jax.core.storage import output_path
from zflora_jax.reporting.files import atomic_write

SUMMARY = "Copy a config of the package to a new file, to edit and to train with."


def add_options(parser: CommandParser) -> None:
    text = f"{', '.join(named_configs())} (default: quickstart)"
    parser.add_argument("name", nargs="?", default="quickstart", metavar="NAME", help=text)
    parser.option("--out", "FILE", "a new file (default: NAME.py)")


def run(args: argparse.Namespace) -> None:
    names = named_configs()
    require_in(names, args.name, f"no config {args.name!r}")
    out = output_path(args.out or f"{args.name}.py", "--out")
    require(out.suffix == ".py", f"--out {out}: give the name of a Python file, such as {out}.py.")
    require(not out.exists(), f"{out} exists: edit it, or give --out another file.")
    text = (CONFIGS / f"{args.name}.py").read_text("utf-8")
    atomic_write(out, text.encode())
    command = "sweep" if "def get_sweep" in text else "train"
    print(f"{out} is yours to edit: zflora {command} --config {out} --workdir runs/{out.stem}")
