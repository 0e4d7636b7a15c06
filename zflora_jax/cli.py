"""The commands. Only wiring: every command calls one function of the package and prints what it returns."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zflora_jax import config as config_module
from zflora_jax.config import RunConfig
from zflora_jax.fields import ConfigError, nearest, override, to_dict

EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_STOPPED = 2, 3, 75  # 75: sysexits' EX_TEMPFAIL, "try again"


def main(argv: Sequence[str] | None = None, prog: str = "zflora") -> int:
    """Run a command. Returns 0, 2 for input that cannot be used or files that cannot be written (the message says what to change), 3 for a non-finite
    loss, 75 for a training run that a signal stopped and that the same command resumes."""
    args = _parser(prog).parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("zflora_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        args.run(args)
    except Exception as error:
        from zflora_jax.hf.keys import CheckpointError
        from zflora_jax.hosts import Stopped, leave
        from zflora_jax.trainer import NonFiniteError

        if not isinstance(error, ConfigError | CheckpointError | NonFiniteError | Stopped | OSError):
            raise  # a bug, not an input: its traceback is needed
        if isinstance(error, Stopped) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process ends now; another signal must not change its exit code
        print(str(error) if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        code = EXIT_STOPPED if isinstance(error, Stopped) else EXIT_NON_FINITE if isinstance(error, NonFiniteError) else EXIT_BAD_INPUT
        if not isinstance(error, Stopped):  # all stop together
            leave(code)
        return code
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="zFLoRA in JAX: train adapters, fuse them, decode, export.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings, e.g. --set train.steps=50 adapter.rank=16"
        )

    sub = command("train", _train, "Train an adapter, or resume the run that the workdir holds.")
    sub.add_argument("--config", metavar="FILE", help="a Python file with get_config() -> RunConfig, e.g. configs/quickstart.py")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives: config, checkpoints, metrics, report")
    sub.add_argument("--resume", action="store_true", help="go on with the run in the workdir, or fail if there is none; --config may be left out")
    processes = sub.add_argument_group("several processes (every one runs this command, with a workdir that they share)")
    processes.add_argument("--distributed", action="store_true", help="find the others by SLURM, Open MPI, Kubernetes or Cloud TPU")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (or ZFLORA_COORDINATOR)")
    processes.add_argument("--num-processes", type=int, metavar="N", help="how many there are (or ZFLORA_NUM_PROCESSES)")
    processes.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 (or ZFLORA_PROCESS_ID)")
    overrides(sub)

    sub = command("eval", _eval, "Score a run or a model on tasks: loss, generated answers, likelihoods, ROUGE; one record per example is kept.")
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="evaluate what this run has trained, fused")
    source.add_argument("--model", metavar="MODEL", help="evaluate a model: a Hugging Face directory, hub id, .gguf file or smollm2-135m")
    sub.add_argument("--checkpoint", metavar="STEP", help="of a run: a number of steps, or best (default: the newest)")
    sub.add_argument("--tasks", metavar="A,B", help="tasks, or groups of tasks (commonsense, math, summary), to evaluate (default: the run's own)")
    sub.add_argument("--data-dir", metavar="DIR", help="where the tasks' files are (the same as --set data.data_dir=DIR)")
    sub.add_argument(
        "--trained-on",
        metavar="TASK",
        help="training data of the model, to mark test questions found in it (what a --workdir trained on is looked at anyway)",
    )
    sub.add_argument("--limit", type=int, metavar="N", help="examples per task (default: the run's eval.limit)")
    sub.add_argument("--out", metavar="DIR", help="where to write results (default: WORKDIR/eval, or runs/eval with --model)")
    overrides(sub)

    sub = command("export", _export, "Write a trained run for other software: a fused Hugging Face directory, or a PEFT adapter directory (LoRA).")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run to export")
    sub.add_argument("--out", required=True, metavar="DIR", help="a new directory, or an earlier export to replace")
    sub.add_argument("--checkpoint", metavar="STEP", help="a number of steps, or best (default: the newest)")
    sub.add_argument("--format", choices=["hf", "peft"], default="hf", help="hf: the fused model (default); peft: LoRA adapters beside their base")
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the exported weights (default: as trained)")

    sub = command("plan", _plan, "Say what a run needs before anything runs: parameters, memory per device, steps, tokens. No weights are read.")
    sub.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config() -> RunConfig")
    sub.add_argument("--memory", type=float, metavar="GIB", help="what one device has, in GiB: says whether the run fits and what to change")
    sub.add_argument("--compile", action="store_true", help="also compile the train step, for as many virtual CPU devices as the mesh has")
    sub.add_argument("--out", metavar="FILE", help="write the plan as JSON too")
    overrides(sub)

    sub = command("sweep", _sweep, "Run methods x learning rates x seeds and write a table. Finished runs are not repeated.")
    sub.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_sweep() -> Sweep")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="where the runs live, one directory each")
    sub.add_argument("--out", default="results", metavar="DIR", help="where the table and its JSON go (default: results)")
    sub.add_argument("--only", metavar="NAME", help="of a config with several sweeps, the one of this name (several processes can share the work)")
    overrides(sub)

    bench = command("bench", _bench, "Measure on this machine what the project claims.")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="WHAT", help="which measurement; each has its own --help")

    def benchmark(name: str, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        sub.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="a preset's shape with random weights, or a model as for eval")
        sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and activations (default: float32)")
        sub.add_argument("--repeats", type=int, default=7, metavar="N", help="turns (default: 7)")
        sub.add_argument("--out", default=f"results/{name}", metavar="PATH", help=f"PATH.json, .md and .png are written (default: results/{name})")
        return sub

    sub = benchmark("latency", "TTFT and TPOT of the base, LoRA beside it and fused models, by turns.")
    sub.add_argument("--methods", nargs="+", metavar="M", help="methods to fuse (default: all)")
    sub.add_argument("--ranks", nargs="+", type=int, default=[16], metavar="R", help="all at the first batch and prompt length (default: 16)")
    sub.add_argument("--batches", nargs="+", type=int, default=[1], metavar="B", help="all at the first rank (default: 1)")
    sub.add_argument("--prompts", nargs="+", type=int, default=[32], metavar="T", help="prompt lengths, all at the first rank (default: 32)")
    sub.add_argument("--new-tokens", type=int, default=32, metavar="N", help="generated after each prompt (default: 32)")
    sub.add_argument("--real", action="store_true", help="load the weights of --model even if it names a preset (smollm2-135m)")
    sub.add_argument("--peers", action="store_true", help="transformers and PEFT take turns too (they come with the test extra)")

    sub = benchmark("train", "Time and memory of a training step, beside PEFT's on the same weights and batch (it comes with the test extra).")
    sub.add_argument("--methods", nargs="+", default=["lora", "zflora-minimal"], metavar="M", help="methods (default: lora zflora-minimal)")
    sub.add_argument("--rank", type=int, default=16, metavar="R", help="of all of them (default: 16)")
    sub.add_argument("--batch", type=int, default=8, metavar="B", help="sequences a step (default: 8)")
    sub.add_argument("--length", type=int, default=128, metavar="T", help="tokens a sequence (default: 128)")
    sub.add_argument("--masked", nargs="+", type=float, default=[0.0, 0.5, 0.8], metavar="SHARE", help="of positions without loss: 0 0.5 0.8")
    sub.add_argument("--no-peft", dest="with_peft", action="store_false", help="measure ours alone")

    sub = command("quickstart", _quickstart, "The whole path on SmolLM2-135M: train, evaluate, fuse, check, decode, export, report.")
    sub.add_argument("--workdir", default="runs/quickstart", metavar="DIR", help="where run, export and report go (default: runs/quickstart)")
    sub.add_argument("--config", default="configs/quickstart.py", metavar="FILE", help="a file with get_config() (default: configs/quickstart.py)")
    overrides(sub)
    return parser


def load_config(path: str, function: str) -> Any:
    """Call `function` of the Python file at `path`. ConfigError if the file or the function is missing."""
    file = Path(path)
    if not file.is_file():
        found = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist. {f'{nearest(path, found)}.' if found else 'Give the path of a Python file.'}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {path} is not a Python file; give a .py file with a function {function}().")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ConfigError(f"{path} has no function {function}().")
        return getattr(module, function)()
    except ConfigError:
        raise
    except Exception as error:  # the file is the user's: say where in it, as for any other input
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == file.resolve()]
        where = f", line {lines[-1]}" if lines else ""
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown and dataclasses.is_dataclass(kind := getattr(config_module, unknown[1], None)):
            known = nearest(unknown[2], [f.name for f in dataclasses.fields(kind)])
            raise ConfigError(f"config file {path}{where}: unknown key {unknown[2]!r} of {unknown[1]}: {known}.") from error
        raise ConfigError(f"config file {path}{where}: {type(error).__name__}: {error}.") from error


def _changes(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, e.g. train.steps=50.")
    return dict(pair.split("=", 1) for pair in pairs)


def _run_config(args: argparse.Namespace) -> RunConfig:
    run = load_config(args.config, "get_config")
    if not isinstance(run, RunConfig):
        raise ConfigError(f"get_config() of {args.config} returns {type(run).__name__}; it must return a zflora_jax.RunConfig.")
    return override(run, _changes(args.set))


def print_table(values: dict[str, Any], title: str) -> None:
    """Print the scalars of `values` as two columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in values.items():
        if isinstance(value, str | int | float) or value is None:
            shown = (
                f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)
            )
            table.add_row(key, shown)
    Console().print(table)


def _train(args: argparse.Namespace) -> None:
    from zflora_jax import hosts
    from zflora_jax.checkpoint import read_config
    from zflora_jax.run import train

    hosts.start(args.coordinator, args.num_processes, args.process_id, detect=args.distributed)
    if args.config:
        run = _run_config(args)
    elif args.resume:
        run = override(read_config(args.workdir), _changes(args.set))
    else:
        raise ConfigError("train needs --config FILE, or --resume to go on with the run in --workdir.")
    report = train(run, args.workdir, resume=args.resume, console=hosts.is_main()).report
    if hosts.is_main():
        print_table(report, f"trained in {args.workdir}")


def _eval(args: argparse.Namespace) -> None:
    from zflora_jax.cache import compile_cache
    from zflora_jax.checkpoint import read_config
    from zflora_jax.data.mixture import TrainedOn, parse_mixture, source_splits
    from zflora_jax.data.tasks import GROUPS
    from zflora_jax.hf.load import load_model
    from zflora_jax.run import load_fused
    from zflora_jax.scorecard import check_tasks, evaluate_tasks, summary_page

    given = {"eval.limit": args.limit, "data.data_dir": args.data_dir}
    changes: dict[str, Any] = _changes(args.set) | {key: value for key, value in given.items() if value is not None}
    trained = [key for key in changes if not key.startswith(("eval.", "data."))]
    if args.workdir and trained:
        raise ConfigError(f"--set {trained[0]}: what a run has trained cannot be changed when it is evaluated; eval.* and data.* can.")
    base = read_config(args.workdir) if args.workdir else RunConfig(model=args.model)
    run = override(base, changes)
    named = args.tasks.split(",") if args.tasks else parse_mixture(run.data.task)[0]
    tasks = list(dict.fromkeys(task for name in named for task in GROUPS.get(name, (name,))))
    check_tasks(run, tasks)
    trained_on = [TrainedOn(override(run, {"data.task": args.trained_on}).data, here=False)] if args.trained_on else []
    for elsewhere in trained_on:
        source_splits(elsewhere.data)  # what is not there is said before anything slow
    if args.workdir:  # in its own data_dir, unless that has been moved
        moved = run.data.data_dir and base.data.data_dir and not Path(base.data.data_dir).expanduser().exists()
        own = TrainedOn(dataclasses.replace(base.data, data_dir=run.data.data_dir) if moved else base.data)
        try:
            source_splits(own.data)
            trained_on.append(own)
        except ConfigError as error:
            print(f"the run's training data is not there, so no test question is compared with it: {error}", file=sys.stderr)
    out = Path(args.out or (Path(args.workdir) / "eval" if args.workdir else "runs/eval"))
    with compile_cache(Path(args.workdir or out) / "compile_cache"):
        model, label = (
            load_fused(args.workdir, args.checkpoint) if args.workdir else (load_model(args.model, dtype=run.train.dtype), Path(args.model).name)
        )
        summary = evaluate_tasks(run, model, tasks, out, label, trained_on=trained_on or None)
    for result in summary["tasks"]:
        print_table(result, f"{result['task']} ({result['split']})")
    print(summary_page(summary))
    print(f"written to {out}: summary-{run.eval.split}-{label}.md, and for each task one line per example in <task>-{run.eval.split}-{label}.jsonl")


def _export(args: argparse.Namespace) -> None:
    from zflora_jax.run import export_run

    print_table(export_run(args.workdir, args.out, format=args.format, dtype=args.dtype, checkpoint=args.checkpoint), f"exported to {args.out}")


def _plan(args: argparse.Namespace) -> None:
    run = _run_config(args)
    if args.compile:  # before anything touches a device
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", run.mesh.data * run.mesh.fsdp * run.mesh.tensor)
    from zflora_jax.hf.load import model_config
    from zflora_jax.planner import compiled, lines_of, plan_run
    from zflora_jax.report import environment, write_json

    config = model_config(run.model)
    plan = plan_run(run, config, args.memory)
    if args.compile:
        plan["compiled"] = compiled(run, config)
    print_table(plan, f"{args.config}: {run.model}, {run.adapter.method}")
    print("\n".join(["bytes per device", *lines_of(plan)]))
    if args.out:
        write_json(args.out, plan | {"config": to_dict(run), "environment": environment()})


def _sweep(args: argparse.Namespace) -> None:
    from zflora_jax.cache import compile_cache
    from zflora_jax.sweeps import Sweep, overview, sweep

    plans = load_config(args.config, "get_sweep")
    plans = list(plans) if isinstance(plans, list | tuple) else [plans]
    for plan in plans:
        if not isinstance(plan, Sweep):
            raise ConfigError(f"get_sweep() of {args.config} returns {type(plan).__name__}; it must return a zflora_jax.Sweep, or a list of them.")
    names = [plan.name for plan in plans]
    if args.only is not None and args.only not in names:
        raise ConfigError(f"--only {args.only}: no sweep of {args.config} has that name. {nearest(args.only, names)}.")

    def changed(plan: Sweep) -> Sweep:
        rates_from = changed(plan.rates_from) if plan.rates_from else None
        return dataclasses.replace(plan, base=override(plan.base, _changes(args.set)), rates_from=rates_from)

    with compile_cache(Path(args.workdir) / "compile_cache"):  # one for all runs
        for plan in (changed(plan) for plan in plans if args.only in (None, plan.name)):
            for row in sweep(plan, Path(args.workdir) / plan.name if len(plans) > 1 else args.workdir, args.out)["rows"]:
                print_table(row, f"{plan.name}: {row['method']}")
    if len(plans) > 1 and (page := overview(plans, args.out)):
        print(f"all of them in {page}")


def _bench(args: argparse.Namespace) -> None:
    from zflora_jax.bench import latency, training
    from zflora_jax.hf.load import load_model
    from zflora_jax.report import environment

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # times to compile are reported
    title = f"{args.model}, {args.dtype}"
    if args.kind == "train":
        cases = [training.Case(args.model, args.dtype, args.rank, args.batch, args.length, masked) for masked in args.masked]
        result = training.measure(cases, **given("methods", "repeats", "with_peft"))
        training.write(result | {"environment": environment()}, args.out, f"A training step: {title}")
        return
    shape = args.model in config_module.PRESETS and not args.real
    source = config_module.preset(args.model) if shape else load_model(args.model, dtype=args.dtype)
    settings = given("dtype", "methods", "ranks", "batches", "prompts", "new_tokens", "repeats", "peers")
    result = latency.measure(source, **settings)
    result |= {"settings": {"model": args.model, "weights": "random" if shape else "real"} | settings, "environment": environment()}
    latency.write(result, args.out, f"Decode latency: {title}")


def _quickstart(args: argparse.Namespace) -> None:
    from zflora_jax.cache import compile_cache
    from zflora_jax.quickstart import quickstart

    run = _run_config(args)
    with compile_cache(Path(args.workdir) / "compile_cache"):
        print_table(quickstart(run, args.workdir), f"quickstart, written to {args.workdir}/report.json")


if __name__ == "__main__":
    sys.exit(main())
