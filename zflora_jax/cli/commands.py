"""What the commands do. Only wiring: each calls one function of the package and prints what it
returns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax import config as config_module
from zflora_jax.core.fields import ConfigError, nearest, override, require, to_dict
from zflora_jax.core.run_config import MeshConfig, RunConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh


def load_config(path: str, function: str) -> Any:
    """Call `function` of the Python file at `path`. ConfigError if the file or the function is
    missing.
    """
    file = Path(path)
    if not file.is_file():
        found = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ConfigError(
            f"config file {path} does not exist."
            f" {f'{nearest(path, found)}.' if found else 'Give the path of a Python file.'}"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"config file {path} is not a Python file; give a .py file with a function"
            f" {function}()."
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ConfigError(f"{path} has no function {function}().")
        return getattr(module, function)()
    except ConfigError:
        raise
    except Exception as error:  # the file is the user's: say where in it, as for any other input
        lines = [
            f.lineno
            for f in traceback.extract_tb(error.__traceback__)
            if Path(f.filename).resolve() == file.resolve()
        ]
        where = f", line {lines[-1]}" if lines else ""
        unknown = re.search(
            r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)
        )
        if unknown and dataclasses.is_dataclass(kind := getattr(config_module, unknown[1], None)):
            known = nearest(unknown[2], [f.name for f in dataclasses.fields(kind)])
            raise ConfigError(
                f"config file {path}{where}: unknown key {unknown[2]!r} of {unknown[1]}: {known}."
            ) from error
        raise ConfigError(f"config file {path}{where}: {type(error).__name__}: {error}.") from error


def _changes(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, e.g. train.steps=50.")
    return dict(pair.split("=", 1) for pair in pairs)


def _run_config(args: argparse.Namespace) -> RunConfig:
    run = load_config(args.config, "get_config")
    if not isinstance(run, RunConfig):
        raise ConfigError(
            f"get_config() of {args.config} returns {type(run).__name__}; it must return a"
            " zflora_jax.RunConfig."
        )
    return override(run, _changes(args.set))


def mesh_asked(settings: list[str] | dict[str, str], run: RunConfig | None) -> Mesh | None:
    """The mesh that `--set mesh.*` asks for, in place of the run's; None where nothing is asked."""
    from zflora_jax.parallel.sharding import make_mesh

    changes = settings if isinstance(settings, dict) else _changes(settings)
    other = [key for key in changes if not key.startswith("mesh.")]
    if other:
        raise ConfigError(
            f"--set {other[0]}: what has been trained cannot be changed here; mesh.* can, e.g. "
            "mesh.fsdp=2, the devices that the model is divided over."
        )
    if not changes:
        return None
    asked = {key.removeprefix("mesh."): value for key, value in changes.items()}
    return make_mesh(override(run.mesh if run else MeshConfig(), asked))


def print_table(values: dict[str, Any], title: str) -> None:
    """Print the scalars of `values` as two columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in values.items():
        if isinstance(value, str | int | float) or value is None:
            shown = (
                f"{value:,}"
                if isinstance(value, int) and not isinstance(value, bool)
                else f"{value:.6g}"
                if isinstance(value, float)
                else str(value)
            )
            table.add_row(key, shown)
    Console().print(table)


def train(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.run import train
    from zflora_jax.parallel import distributed
    from zflora_jax.training.checkpoint import read_config

    distributed.start(
        args.coordinator, args.num_processes, args.process_id, detect=args.distributed
    )
    if args.config:
        run = _run_config(args)
    elif args.resume:
        run = override(read_config(args.workdir), _changes(args.set))
    else:
        raise ConfigError(
            "train needs --config FILE, or --resume to go on with the run in --workdir."
        )
    report = train(run, args.workdir, resume=args.resume, console=distributed.is_main()).report
    if distributed.is_main():
        print_table(report, f"trained in {args.workdir}")


def eval(args: argparse.Namespace) -> None:
    from zflora_jax.data.mixture import TrainedOn, parse_mixture, source_splits
    from zflora_jax.data.tasks import GROUPS
    from zflora_jax.evaluation.suite import check_tasks, evaluate_tasks
    from zflora_jax.evaluation.summary import summary_page
    from zflora_jax.experiments.run import load_fused
    from zflora_jax.hf.load import load_model
    from zflora_jax.parallel.compile_cache import compile_cache
    from zflora_jax.training.checkpoint import read_config

    given = {"eval.limit": args.limit, "data.data_dir": args.data_dir}
    changes: dict[str, Any] = _changes(args.set) | {
        key: value for key, value in given.items() if value is not None
    }
    meshed = {key: changes.pop(key) for key in list(changes) if key.startswith("mesh.")}
    trained = [key for key in changes if not key.startswith(("eval.", "data."))]
    if args.workdir and trained:
        raise ConfigError(
            f"--set {trained[0]}: what a run has trained cannot be changed when it is evaluated;"
            " eval.*, data.* and mesh.* can."
        )
    base = read_config(args.workdir) if args.workdir else RunConfig(model=args.model)
    run = override(base, changes)
    named = args.tasks.split(",") if args.tasks else parse_mixture(run.data.task)[0]
    tasks = list(dict.fromkeys(task for name in named for task in GROUPS.get(name, (name,))))
    check_tasks(run, tasks)
    trained_on = (
        [TrainedOn(override(run, {"data.task": args.trained_on}).data, here=False)]
        if args.trained_on
        else []
    )
    for elsewhere in trained_on:
        source_splits(elsewhere.data)  # what is not there is said before anything slow
    if args.workdir:  # in its own data_dir, unless that has been moved
        moved = (
            run.data.data_dir
            and base.data.data_dir
            and not Path(base.data.data_dir).expanduser().exists()
        )
        own = TrainedOn(
            dataclasses.replace(base.data, data_dir=run.data.data_dir) if moved else base.data
        )
        try:
            source_splits(own.data)
            trained_on.append(own)
        except ConfigError as error:
            print(
                "the run's training data is not there, so no test question is compared with it:"
                f" {error}",
                file=sys.stderr,
            )
    mesh = mesh_asked(meshed, base)
    out = Path(args.out or (Path(args.workdir) / "eval" if args.workdir else "runs/eval"))
    with compile_cache(Path(args.workdir or out) / "compile_cache"):
        if args.workdir:
            model, label = load_fused(args.workdir, args.checkpoint, mesh=mesh)
        else:
            model, label = (
                load_model(args.model, dtype=run.train.dtype, mesh=mesh),
                Path(args.model).name,
            )
            if "train.matmul_precision" in changes:  # else the one that an export was trained with
                model.config = model.config.replace(matmul_precision=run.train.matmul_precision)
        summary = evaluate_tasks(run, model, tasks, out, label, trained_on=trained_on or None)
    for result in summary["tasks"]:
        print_table(result, f"{result['task']} ({result['split']})")
    print(summary_page(summary))
    print(
        f"written to {out}: summary-{run.eval.split}-{label}.md, and for each task one line per"
        f" example in <task>-{run.eval.split}-{label}.jsonl"
    )


@contextlib.contextmanager
def _damage_is_input() -> Iterator[None]:
    """A file of metrics that is damaged, or holds nothing yet, is input that cannot be used."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def info(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.info import describe

    with _damage_is_input():
        facts = describe(args.path)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_table(facts, str(args.path))


def plot(args: argparse.Namespace) -> None:
    from zflora_jax.reporting.metrics import METRICS_FILE
    from zflora_jax.reporting.plots import training_curves

    folders = [os.path.abspath(run) for run in args.runs]
    # What all have in common says nothing in a legend.
    shared = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    runs = {os.path.relpath(folder, shared): Path(folder) / METRICS_FILE for folder in folders}
    for path in runs.values():
        require(
            path.is_file(),
            f"{path.parent} has no {METRICS_FILE}: give the workdir of a training run.",
        )
    require(
        args.out is not None or len(runs) == 1,
        f"--out PATH says where a figure of {len(runs)} runs goes.",
    )
    out = args.out or str(Path(args.runs[0]) / "curves")
    of = next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs of {os.path.basename(shared)}"
    with _damage_is_input():
        training_curves(runs, out, args.title or of)
    print(f"written: {out}.png, {out}.svg")


def export(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.run import export_run
    from zflora_jax.training.checkpoint import read_config

    require(
        args.eps is None or args.format == "hf",
        "--eps goes with --format hf: LoRA adapters have no state to scale.",
    )
    mesh = mesh_asked(args.set, read_config(args.workdir))
    settings: Any = {
        "format": args.format,
        "dtype": args.dtype,
        "checkpoint": args.checkpoint,
        "eps_z": args.eps,
    }
    report = export_run(args.workdir, args.out, mesh=mesh, **settings)
    print_table(report, f"exported to {args.out}")


def plan(args: argparse.Namespace) -> None:
    run = _run_config(args)
    if args.compile:  # before anything touches a device
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", run.mesh.data * run.mesh.fsdp * run.mesh.tensor)
    from zflora_jax.experiments.planner import compiled, lines_of as plan_lines, memory_plan
    from zflora_jax.hf.load import model_config
    from zflora_jax.reporting.files import write_json
    from zflora_jax.reporting.provenance import environment

    config = model_config(run.model)
    plan = memory_plan(run, config, args.memory)
    if args.compile:
        plan["compiled"] = compiled(run, config)
    print_table(plan, f"{args.config}: {run.model}, {run.adapter.method}")
    print("\n".join(["bytes per device", *plan_lines(plan)]))
    if args.out:
        write_json(args.out, plan | {"config": to_dict(run), "environment": environment()})


def sweep(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.compare import compare_methods, overview
    from zflora_jax.experiments.comparison import Comparison
    from zflora_jax.experiments.grid import Grid, run_grid
    from zflora_jax.experiments.store import FINISHED
    from zflora_jax.parallel.compile_cache import compile_cache

    plans = load_config(args.config, "get_sweep")
    plans = list(plans) if isinstance(plans, list | tuple) else [plans]
    for plan in plans:
        if not isinstance(plan, Comparison | Grid):
            raise ConfigError(
                f"get_sweep() of {args.config} returns {type(plan).__name__}; it must return a"
                " zflora_jax.Grid or Comparison, or a list."
            )
    names = [plan.name for plan in plans]
    if args.only is not None and args.only not in names:
        raise ConfigError(
            f"--only {args.only}: no sweep of {args.config} has that name."
            f" {nearest(args.only, names)}."
        )

    def changed(plan: Comparison) -> Comparison:
        rates_from = changed(plan.rates_from) if plan.rates_from else None
        return dataclasses.replace(
            plan, base=override(plan.base, _changes(args.set)), rates_from=rates_from
        )

    with compile_cache(Path(args.workdir) / "compile_cache"):  # one for all runs
        for plan in (plan for plan in plans if args.only in (None, plan.name)):
            workdir = Path(args.workdir) / plan.name if len(plans) > 1 else Path(args.workdir)
            if isinstance(plan, Grid):
                rows = run_grid(
                    override(plan.base, _changes(args.set)),
                    plan.settings,
                    workdir,
                    page=Path(args.out) / f"{plan.name}.md",
                )
                for row in rows:
                    print_table(row, f"{plan.name}: {row['run']}")
                require(
                    any(row["status"] == FINISHED for row in rows),
                    f"no run of {plan.name} has finished: {rows[0]['status']}",
                )
                continue
            for row in compare_methods(changed(plan), workdir, args.out)["rows"]:
                print_table(row, f"{plan.name}: {row['method']}")
    compared = [plan for plan in plans if isinstance(plan, Comparison)]
    if len(compared) > 1 and (page := overview(compared, args.out)):
        print(f"all of them in {page}")


def bench(args: argparse.Namespace) -> None:
    from zflora_jax.bench import latency, training
    from zflora_jax.hf.load import load_model
    from zflora_jax.reporting.provenance import environment

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    # Torch needs room on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # times to compile are reported
    title = f"{args.model}, {args.dtype}"
    if args.kind == "train":
        cases = [
            training.Case(args.model, args.dtype, args.rank, args.batch, args.length, masked)
            for masked in args.masked
        ]
        result = training.measure(cases, **given("methods", "repeats", "with_peft"))
        training.write(
            result | {"environment": environment()}, args.out, f"A training step: {title}"
        )
        return
    shape = args.model in config_module.PRESETS and not args.real
    source = config_module.preset(args.model) if shape else load_model(args.model, dtype=args.dtype)
    settings = given(
        "dtype", "methods", "ranks", "batches", "prompts", "new_tokens", "repeats", "peers"
    )
    result = latency.measure(source, **settings)
    result |= {
        "settings": {"model": args.model, "weights": "random" if shape else "real"} | settings,
        "environment": environment(),
    }
    latency.write(result, args.out, f"Decode latency: {title}")


def quickstart(args: argparse.Namespace) -> None:
    from zflora_jax.experiments.quickstart import quickstart
    from zflora_jax.parallel.compile_cache import compile_cache

    run = _run_config(args)
    with compile_cache(Path(args.workdir) / "compile_cache"):
        print_table(
            quickstart(run, args.workdir), f"quickstart, written to {args.workdir}/quickstart.json"
        )
