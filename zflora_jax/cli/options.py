"""Options that several commands take, and their help, which lists the settings for --set."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """The options of a command. Its help ends with the settings that --set changes.

    Attributes:
      settings: how the dotted names of those settings may begin, e.g. ("eval.", "mesh."); "" is
        the beginning of all.
    """

    settings: tuple[str, ...] = ()

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{settings_help(self.settings)}" if self.settings else text


def settings_help(begin: tuple[str, ...]) -> str:
    """All settings whose dotted name begins so: name, values, default and meaning, by section."""
    from zflora_jax.core.settings import sections  # reads source code: only when help is asked for

    width = max(shutil.get_terminal_size().columns - 2, 40)

    def add(text: str, indent: int, hanging: int = 0) -> None:
        first, rest = " " * indent, " " * (indent + hanging)
        lines.append(
            textwrap.fill(
                text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
            )
        )

    lines = ["settings, changed by --set KEY=VALUE:"]
    for section in sections():
        listed = [s for s in section.settings if s.name.startswith(begin)]
        if listed:
            lines.append("")
            add(f"{section.name}: {section.title}", indent=2)
        for setting in listed:
            add(f"{setting.name} ({setting.allowed}; default {setting.default})", 4, hanging=2)
            add(setting.meaning, indent=8)
    return "\n".join(lines) + "\n"


def add_settings(
    parser: CommandParser,
    begin: tuple[str, ...] = ("",),
    text: str = "change settings, e.g. --set train.steps=50 adapter.rank=16; all are listed below",
    metavar: str = "KEY=VALUE",
) -> None:
    """Add --set KEY=VALUE, for the settings whose dotted names begin as `begin` says."""
    parser.settings = begin
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar=metavar, help=text)


def add_mesh(parser: CommandParser) -> None:
    """Add --set for what has been trained, of which only the mesh can be changed."""
    text = (
        "devices to divide the model over, e.g. --set mesh.fsdp=2 mesh.tensor=2 (default: as a run"
        " was trained)"
    )
    add_settings(parser, ("mesh.",), text, metavar="mesh.AXIS=N")


def add_config(parser: CommandParser, function: str = "get_config() -> RunConfig") -> None:
    """Add --config FILE, which has to be given."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help=f"a Python file with {function}"
    )


def add_workdir(parser: CommandParser, text: str, **settings: Any) -> None:
    """Add --workdir DIR, which has to be given unless it has a default."""
    settings = settings or {"required": True}
    parser.add_argument("--workdir", metavar="DIR", help=text, **settings)


def add_checkpoint(parser: CommandParser, of: str = "") -> None:
    """Add --checkpoint STEP."""
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help=f"{of}a number of steps, or best (default: the newest)",
    )


def add_processes(parser: CommandParser) -> None:
    """Add the options by which several processes find each other."""
    processes = parser.add_argument_group(
        "several processes (every one runs this command, with directories that they share)"
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


def join(args: argparse.Namespace) -> bool:
    """Join the processes that the options of `add_processes` name, before a device is touched.

    Returns:
      Whether this process prints what the command found.
    """
    from zflora_jax.parallel import distributed

    distributed.start(
        args.coordinator, args.num_processes, args.process_id, detect=args.distributed
    )
    return distributed.is_main()


def add_source(parser: CommandParser, verb: str) -> None:
    """Add --workdir with --checkpoint, and --model, of which one has to be given."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--workdir", metavar="DIR", help=f"{verb} what this run has trained, fused")
    either.add_argument(
        "--model",
        metavar="MODEL",
        help=(
            f"{verb} a model: a Hugging Face directory, an export (or its s3:// or gs:// URL), hub"
            " id, .gguf file or smollm2-135m"
        ),
    )
    add_checkpoint(parser, of="of a run: ")
