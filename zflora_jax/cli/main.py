"""The command line: what every command takes, and how it ends. What a command does is in
`commands`.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from zflora_jax.cli import commands
from zflora_jax.cli.generate_command import generate
from zflora_jax.core.fields import ConfigError
from zflora_jax.reporting.files import local_path

EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_STOPPED = 2, 3, 75  # 75: sysexits' EX_TEMPFAIL, "try again"


def main(argv: Sequence[str] | None = None, prog: str = "zflora") -> int:
    """Run a command. Returns 0, 2 for input that cannot be used or files that cannot be written
    (the message says what to change), 3 for a non-finite loss, 75 for a training run that a signal
    stopped and that the same command resumes.
    """
    args = _parser(prog).parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("zflora_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        for name in ("workdir", "out"):
            if getattr(args, name, None) is not None:
                local_path(getattr(args, name), f"--{name}")
        args.run(args)
    except Exception as error:
        from zflora_jax.hf.keys import CheckpointError
        from zflora_jax.parallel.distributed import Preempted, leave
        from zflora_jax.training.trainer import NonFiniteError

        if not isinstance(
            error, ConfigError | CheckpointError | NonFiniteError | Preempted | OSError
        ):
            raise  # a bug, not an input: its traceback is needed
        if isinstance(error, Preempted) and threading.current_thread() is threading.main_thread():
            # The process ends now; another signal must not change its exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(str(error) if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        code = (
            EXIT_STOPPED
            if isinstance(error, Preempted)
            else EXIT_NON_FINITE
            if isinstance(error, NonFiniteError)
            else EXIT_BAD_INPUT
        )
        if not isinstance(error, Preempted):  # all stop together
            leave(code)
        return code
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="zFLoRA in JAX: train adapters, fuse them, decode, export."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="change settings, e.g. --set train.steps=50 adapter.rank=16",
        )

    def mesh(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="mesh.AXIS=N",
            help=(
                "devices to divide the model over, e.g. --set mesh.fsdp=2 mesh.tensor=2 (default:"
                " as a run was trained)"
            ),
        )

    def source(sub: argparse.ArgumentParser, verb: str) -> None:
        either = sub.add_mutually_exclusive_group(required=True)
        either.add_argument(
            "--workdir", metavar="DIR", help=f"{verb} what this run has trained, fused"
        )
        either.add_argument(
            "--model",
            metavar="MODEL",
            help=(
                f"{verb} a model: a Hugging Face directory, an export, hub id, .gguf file or"
                " smollm2-135m"
            ),
        )
        sub.add_argument(
            "--checkpoint",
            metavar="STEP",
            help="of a run: a number of steps, or best (default: the newest)",
        )

    sub = command(
        "train", commands.train, "Train an adapter, or resume the run that the workdir holds."
    )
    sub.add_argument(
        "--config",
        metavar="FILE",
        help="a Python file with get_config() -> RunConfig, e.g. configs/quickstart.py",
    )
    sub.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where the run lives: config, checkpoints, metrics, report",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help=(
            "go on with the run in the workdir, or fail if there is none; --config may be left out"
        ),
    )
    processes = sub.add_argument_group(
        "several processes (every one runs this command, with a workdir that they share)"
    )
    processes.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by SLURM, Open MPI, Kubernetes or Cloud TPU",
    )
    processes.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 (or ZFLORA_COORDINATOR)"
    )
    processes.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="how many there are (or ZFLORA_NUM_PROCESSES)",
    )
    processes.add_argument(
        "--process-id",
        type=int,
        metavar="I",
        help="which one this is, from 0 (or ZFLORA_PROCESS_ID)",
    )
    overrides(sub)

    sub = command(
        "eval",
        commands.eval,
        "Score a run or a model on tasks: loss, generated answers, likelihoods, ROUGE; one record"
        " per example is kept.",
    )
    source(sub, "evaluate")
    sub.add_argument(
        "--tasks",
        metavar="A,B",
        help=(
            "tasks, or groups of tasks (commonsense, math, summary), to evaluate (default: the"
            " run's own)"
        ),
    )
    sub.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the tasks' files are (the same as --set data.data_dir=DIR)",
    )
    sub.add_argument(
        "--trained-on",
        metavar="TASK",
        help=(
            "training data of the model, to mark test questions found in it (what a --workdir"
            " trained on is looked at anyway)"
        ),
    )
    sub.add_argument(
        "--limit", type=int, metavar="N", help="examples per task (default: the run's eval.limit)"
    )
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="where to write results (default: WORKDIR/eval, or runs/eval with --model)",
    )
    overrides(sub)

    sub = command(
        "generate",
        generate,
        "Answer prompts: one, those of a file, or a conversation on the terminal; text is shown as"
        " it comes.",
    )
    source(sub, "use")
    sub.add_argument("--adapter", metavar="DIR", help="a PEFT LoRA directory to fuse into --model")
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of --model (default: float32; a run has its own)",
    )
    prompts = sub.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="answer this")
    prompts.add_argument(
        "--file",
        metavar="FILE",
        help="answer every line of FILE, in batches; one JSON line each on stdout (- reads stdin)",
    )
    sub.add_argument(
        "--plain",
        action="store_true",
        help="continue the text as it is, without the tokenizer's chat template",
    )
    sub.add_argument("--system", metavar="TEXT", help="the system's turn of a conversation")
    sub.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="at most so many tokens an answer (default: 256)",
    )
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time (default), above 0 draws",
    )
    sub.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sub.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P",
    )
    sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)"
    )
    sub.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="B",
        help="lines of --file at one time (default: 16)",
    )
    mesh(sub)

    sub = command(
        "info",
        commands.info,
        "Say what a run, adapter, export or model is: method, widths, parameters, base,"
        " fingerprint, metrics.",
    )
    sub.add_argument(
        "path",
        metavar="PATH",
        help=(
            "a workdir, a PEFT or export or Hugging Face directory, a .gguf file, or a preset's"
            " name"
        ),
    )
    sub.add_argument("--json", action="store_true", help="as JSON, for programs")

    sub = command(
        "plot",
        commands.plot,
        "Draw loss, learning rate, tokens/s and gradient norm of runs, several over each other.",
    )
    sub.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of runs, finished or not")
    sub.add_argument(
        "--out",
        metavar="PATH",
        help=(
            "PATH.png and PATH.svg are written (default: curves in the only run; needed for"
            " several)"
        ),
    )
    sub.add_argument("--title", metavar="TEXT", help="above the figure (default: the runs' names)")

    sub = command(
        "export",
        commands.export,
        "Write a trained run for other software: a fused Hugging Face directory, or a PEFT adapter"
        " directory (LoRA).",
    )
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run to export")
    sub.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="a new directory, or an earlier export to replace",
    )
    sub.add_argument(
        "--checkpoint", metavar="STEP", help="a number of steps, or best (default: the newest)"
    )
    sub.add_argument(
        "--format",
        choices=["hf", "peft"],
        default="hf",
        help="hf: the fused model (default); peft: LoRA adapters beside their base",
    )
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the exported weights (default: as trained)",
    )
    sub.add_argument(
        "--eps",
        type=float,
        metavar="E",
        help=(
            "scale of the residual state, a power of two in 2^-10..1 (default: chosen from the"
            " weights for --dtype); 0.0625 for int8 consumers"
        ),
    )
    mesh(sub)

    sub = command(
        "plan",
        commands.plan,
        "Say what a run needs before anything runs: parameters, memory per device, steps, tokens."
        " No weights are read.",
    )
    sub.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a Python file with get_config() -> RunConfig",
    )
    sub.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="what one device has, in GiB: says whether the run fits and what to change",
    )
    sub.add_argument(
        "--compile",
        action="store_true",
        help="also compile the train step, for as many virtual CPU devices as the mesh has",
    )
    sub.add_argument("--out", metavar="FILE", help="write the plan as JSON too")
    overrides(sub)

    sub = command(
        "sweep",
        commands.sweep,
        "Run every combination of a grid of settings, or compare methods at their best rates."
        " Finished runs are not repeated.",
    )
    sub.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a Python file with get_sweep() -> Grid or Comparison",
    )
    sub.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the runs live, one directory each"
    )
    sub.add_argument(
        "--out",
        default="results",
        metavar="DIR",
        help="where the table and its JSON go (default: results)",
    )
    sub.add_argument(
        "--only",
        metavar="NAME",
        help=(
            "of a config with several sweeps, the one of this name (several processes can share the"
            " work)"
        ),
    )
    overrides(sub)

    bench = command("bench", commands.bench, "Measure on this machine what the project claims.")
    kinds = bench.add_subparsers(
        dest="kind",
        required=True,
        metavar="WHAT",
        help="which measurement; each has its own --help",
    )

    def benchmark(name: str, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--model",
            default="smollm2-135m",
            metavar="MODEL",
            help="a preset's shape with random weights, or a model as for eval",
        )
        sub.add_argument(
            "--dtype",
            default="float32",
            choices=["float32", "bfloat16"],
            help="of weights and activations (default: float32)",
        )
        sub.add_argument("--repeats", type=int, default=7, metavar="N", help="turns (default: 7)")
        sub.add_argument(
            "--out",
            default=f"results/{name}",
            metavar="PATH",
            help=f"PATH.json, .md and .png are written (default: results/{name})",
        )
        return sub

    sub = benchmark(
        "latency", "TTFT and TPOT of the base, LoRA beside it and fused models, by turns."
    )
    sub.add_argument("--methods", nargs="+", metavar="M", help="methods to fuse (default: all)")
    sub.add_argument(
        "--ranks",
        nargs="+",
        type=int,
        default=[16],
        metavar="R",
        help="all at the first batch and prompt length (default: 16)",
    )
    sub.add_argument(
        "--batches",
        nargs="+",
        type=int,
        default=[1],
        metavar="B",
        help="all at the first rank (default: 1)",
    )
    sub.add_argument(
        "--prompts",
        nargs="+",
        type=int,
        default=[32],
        metavar="T",
        help="prompt lengths, all at the first rank (default: 32)",
    )
    sub.add_argument(
        "--new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="generated after each prompt (default: 32)",
    )
    sub.add_argument(
        "--real",
        action="store_true",
        help="load the weights of --model even if it names a preset (smollm2-135m)",
    )
    sub.add_argument(
        "--peers",
        action="store_true",
        help="transformers and PEFT take turns too (they come with the test extra)",
    )

    sub = benchmark(
        "train",
        "Time and memory of a training step, beside PEFT's on the same weights and batch (it comes"
        " with the test extra).",
    )
    sub.add_argument(
        "--methods",
        nargs="+",
        default=["lora", "zflora-minimal"],
        metavar="M",
        help="methods (default: lora zflora-minimal)",
    )
    sub.add_argument(
        "--rank", type=int, default=16, metavar="R", help="of all of them (default: 16)"
    )
    sub.add_argument(
        "--batch", type=int, default=8, metavar="B", help="sequences a step (default: 8)"
    )
    sub.add_argument(
        "--length", type=int, default=128, metavar="T", help="tokens a sequence (default: 128)"
    )
    sub.add_argument(
        "--masked",
        nargs="+",
        type=float,
        default=[0.0, 0.5, 0.8],
        metavar="SHARE",
        help="of positions without loss: 0 0.5 0.8",
    )
    sub.add_argument("--no-peft", dest="with_peft", action="store_false", help="measure ours alone")

    sub = command(
        "quickstart",
        commands.quickstart,
        "The whole path on SmolLM2-135M: train, evaluate, fuse, check, decode, export, report.",
    )
    sub.add_argument(
        "--workdir",
        default="runs/quickstart",
        metavar="DIR",
        help="where run, export and report go (default: runs/quickstart)",
    )
    sub.add_argument(
        "--config",
        default="configs/quickstart.py",
        metavar="FILE",
        help="a file with get_config() (default: configs/quickstart.py)",
    )
    overrides(sub)
    return parser
