"""The command line: its commands, a module each, and their exit codes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from zflora_jax import __version__
from zflora_jax.cli import (
    bench,
    data,
    eval,
    export,
    generate,
    init,
    plan,
    quickstart,
    sweep,
    train,
)
from zflora_jax.cli.options import CommandParser
from zflora_jax.cli.output import silence
from zflora_jax.core.errors import CheckpointError, NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError, first_line, require
from zflora_jax.core.storage import as_path, is_store_error
from zflora_jax.reporting.files import local_path

# Each is named after its module, which has SUMMARY, add_options(parser) and run(args).
COMMANDS = (train, eval, generate, data, export, plan, sweep, bench, quickstart, init)
LOCAL_ONLY = (data, init, sweep, bench, quickstart)  # their outputs are local files
EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_STOPPED = 2, 3, 75  # 75: sysexits' EX_TEMPFAIL, "try again"
EXIT_INTERRUPTED = 128 + signal.SIGINT
_MAY_BE_EMPTY = ("prompt", "system")  # texts

_SMALLER = (
    "To use less: train.remat=block, a smaller train.loss_chunk, more data.grad_accum_steps for"
    " the same batch, a smaller batch_size of eval or generate, bfloat16, quantize.kernels, or a"
    " mesh over more devices; `zflora plan` estimates each without a device."
)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Runs a command.

    Args:
      argv: Words of the command line; None for those of the process.
      command: Name of the command, for a script like `train.py`; None if `argv` begins with it.

    Returns:
      The exit code: 0; 2 for input that cannot be used, files that cannot be written or a device
      without the memory (the message says what to change); 3 for a non-finite loss; 75 for a
      training run that a signal stopped and that the same command resumes.
    """
    args = _parser(command).parse_args(argv)
    silence()
    handler, logger = logging.StreamHandler(), logging.getLogger("zflora_jax")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        for name, value in vars(args).items():
            require(
                name in _MAY_BE_EMPTY or "" not in (value if isinstance(value, list) else [value]),
                f"{name.replace('_', '-')} is empty (''): give a value, or leave it out.",
            )
        for name in ("workdir", "out"):
            if getattr(args, name, None) is not None:
                args.as_path(getattr(args, name), f"--{name}")
        args.run(args)
    except Exception as error:
        return _ended_by(error)
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED)
        # Python ends the process by the signal itself, which also ends a loop of the shell.
        sys.excepthook = _without_interrupts
        raise
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return 0


def _without_interrupts(kind: type[BaseException], *of: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *of)


def _ended_by(error: Exception) -> int:
    """Prints an error of the input or of the run, and returns its exit code. Any other error is a
    bug, so it is raised again with its traceback.
    """
    if isinstance(error, Preempted):
        if threading.current_thread() is threading.main_thread():
            # The process ends now; another signal must not change its exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(error, file=sys.stderr)
        return EXIT_STOPPED  # all processes stop together
    said = first_line(error)
    full = said.startswith("RESOURCE_EXHAUSTED") and "memory" in said.lower()
    if full and type(error).__name__ == "JaxRuntimeError":
        error = ConfigError(f"out of memory on the device: {said} {_SMALLER}")
    of_input = isinstance(error, ConfigError | CheckpointError | NonFiniteError | OSError)
    if not of_input and not is_store_error(error):
        _leave(1, error)
        raise error
    print(f"error: {error}", file=sys.stderr)
    code = EXIT_NON_FINITE if isinstance(error, NonFiniteError) else EXIT_BAD_INPUT
    _leave(code)
    return code


def _leave(code: int, error: Exception | None = None) -> None:
    """Ends this process if others might wait for it, see `distributed.leave`."""
    if "zflora_jax.parallel.distributed" in sys.modules:
        from zflora_jax.parallel.distributed import leave

        leave(code, error)


def _parser(alone: str | None = None) -> CommandParser:
    """The parser of all commands, or only of the one that a script runs."""
    modules = {command.__name__.rpartition(".")[2]: command for command in COMMANDS}
    if alone is not None:
        script = CommandParser(prog=f"{alone}.py", description=modules[alone].SUMMARY)
        return _filled(script, modules[alone])
    parser = CommandParser(
        prog="zflora", description="zFLoRA in JAX: train adapters, fuse them, decode, export."
    )
    parser.add_argument("--version", action="version", version=f"zflora {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in modules.items():
        sub = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        _filled(sub, command)
    return parser


def _filled(parser: CommandParser, command: Any) -> CommandParser:
    command.add_options(parser)
    parser.set_defaults(run=command.run, as_path=local_path if command in LOCAL_ONLY else as_path)
    return parser
