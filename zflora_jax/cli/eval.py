"""`zflora eval`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.cli.options import (
    CommandParser,
    add_processes,
    add_settings,
    add_source,
    changes,
    join,
    mesh_asked,
)
from zflora_jax.cli.output import print_table
from zflora_jax.core.fields import ConfigError, override, require
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path, output_path
from zflora_jax.core.textfile import lines_of

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from zflora_jax.core.model import Model
    from zflora_jax.data.mixture import TrainedOn

SUMMARY = (
    "Score a run or a model on tasks: loss, generated answers, likelihoods, ROUGE; one record per"
    " example is kept."
)
# Settings only for --model.
OF_MODEL = ("train.dtype", "train.matmul_precision", "quantize.")


def add_options(parser: CommandParser) -> None:
    add_source(parser, "evaluate")
    parser.option(
        "--tasks",
        "A,B",
        "tasks, or groups of tasks (commonsense, math, summary), to evaluate (default: the run's"
        " task)",
    )
    text = "directory of the tasks' files (the same as --set data.data_dir=DIR)"
    parser.option("--data-dir", "DIR", text)
    parser.option(
        "--trained-on",
        "TASK",
        "training data of the model, to mark test questions found in it (the training data of a"
        " --workdir is always searched)",
    )
    parser.option("--limit", "N", "examples per task (default: the run's eval.limit)", int)
    text = "directory of the results (default: WORKDIR/eval, or runs/eval with --model)"
    parser.option("--out", "DIR", text)
    add_settings(
        parser,
        ("data.", "eval.", "mesh.", *OF_MODEL),
        "change settings of data, eval and mesh, and for a --model those of train and quantize that"
        " are listed below, e.g. --set data.prompt_style=alpaca. A .gguf file is scored as floats,"
        " or with quantize.kernels=keep as its quantised blocks",
    )
    add_processes(parser)


def run(args: argparse.Namespace) -> None:
    from zflora_jax.data.mixture import parse_mixture
    from zflora_jax.data.tasks import GROUPS, get_task
    from zflora_jax.evaluation.summary import summary_page
    from zflora_jax.evaluation.task import check_tasks, evaluate_tasks
    from zflora_jax.parallel.compile_cache import compile_cache
    from zflora_jax.parallel.distributed import on_main
    from zflora_jax.training.workdir import read_config

    main = join(args)
    base = read_config(args.workdir) if args.workdir else RunConfig(model=args.model)
    config, meshed = _settings(args, base)
    named = args.tasks.split(",") if args.tasks else parse_mixture(config.data.task)[0]
    tasks = list(dict.fromkeys(task for name in named for task in GROUPS.get(name, (name,))))
    check_tasks(config, tasks)
    seen = _trained_on(args, base, config) or None
    mesh = mesh_asked(meshed, base if args.workdir else None)
    out = as_path(args.out or as_path(args.workdir or "runs") / "eval")
    on_main(lambda: output_path(out, "--out", folder=True))
    with compile_cache(as_path(args.workdir or out) / "compile_cache"):
        model, label = _model(args, config, mesh)
        summary = evaluate_tasks(config, model, tasks, out, label, trained_on=seen, donate=True)
    if not main:
        return
    for result in summary["tasks"]:
        print_table(result, f"{result['task']} ({result['split']})")
        if config.eval.generate and get_task(result["task"]).own:  # which often has no score
            file = out / f"{result['task']}-{config.eval.split}-{label}.jsonl"
            for line in lines_of(file.read_text("utf-8"))[:2]:
                found = ((name, json.loads(line)[name]) for name in ("prompt", "output", "answer"))
                print(*(f"{name}: {' '.join(text.split())}" for name, text in found), "", sep="\n")
    print(summary_page(summary))
    print(
        f"written to {out}: summary-{config.eval.split}-{label}.md and, a line per example,"
        f" <task>-{config.eval.split}-{label}.jsonl"
    )


def _settings(args: argparse.Namespace, base: RunConfig) -> tuple[RunConfig, dict[str, Any]]:
    """The run as it is evaluated, and the settings of the mesh."""
    asked: dict[str, Any] = changes(args)
    asked |= {"eval.limit": args.limit} if args.limit is not None else {}
    asked |= {"data.data_dir": args.data_dir} if args.data_dir else {}
    meshed = {key: asked.pop(key) for key in list(asked) if key.startswith("mesh.")}
    for key in asked:
        require(
            not args.workdir or key.startswith(("eval.", "data.")),
            f"--set {key}: an evaluation cannot change how a run was trained; eval.*, data.* and"
            " mesh.* can be set.",
        )
        require(
            bool(args.workdir) or key.startswith(("eval.", "data.", *OF_MODEL)),
            f"--set {key}: an evaluation does not use it; with --model eval.*, data.*, mesh.*,"
            f" {', '.join(OF_MODEL)}* can be set.",
        )
    return override(base, asked), meshed


def _trained_on(args: argparse.Namespace, base: RunConfig, config: RunConfig) -> list[TrainedOn]:
    """The training data to search for test questions: of --trained-on and of the run."""
    from zflora_jax.data.builders.public import NAMED
    from zflora_jax.data.mixture import TrainedOn, source_splits

    found = []
    if args.trained_on:  # all rows of it
        of = override(config, {"data.task": args.trained_on, "data.train_limit": None})
        source_splits(of.data)  # missing files are reported before anything slow
        found.append(TrainedOn(of.data, here=False))
    if args.workdir:
        data, folder = base.data, base.data.data_dir
        if folder and not folder.startswith(NAMED) and not Path(folder).expanduser().exists():
            data = replace(data, data_dir=config.data.data_dir or folder)  # it has been moved
        try:
            source_splits(data)
            found.append(TrainedOn(data))
        except ConfigError as error:
            text = "the run's training data is missing, so no test question is compared with it"
            print(f"{text}: {error}", file=sys.stderr)
    return found


def _model(args: argparse.Namespace, config: RunConfig, mesh: Mesh | None) -> tuple[Model, str]:
    """The model to score, and its label in the names of files."""
    from zflora_jax.experiments.restore import load_fused
    from zflora_jax.hf.load import load_model

    if args.workdir:
        return load_fused(args.workdir, args.checkpoint, mesh=mesh, decode=True)
    require(not args.checkpoint, "--checkpoint chooses a saved step of a run: give its --workdir.")
    # On a mesh in the layout for decoding, so that there is no second copy.
    dtype, how = config.train.dtype, config.quantize
    model = load_model(args.model, dtype, scan_layers=mesh is None, mesh=mesh, quantize=how)
    if "train.matmul_precision" in changes(args):  # else the one that an export was trained with
        model.config = model.config.replace(matmul_precision=config.train.matmul_precision)
    return model, Path(args.model).name or Path(args.model).resolve().name  # "."
