"""Options of several commands, and the run, mesh and processes that their values name."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import textwrap
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zflora_jax.core.fields import ConfigError, meaning_of, nearest, override, require
from zflora_jax.core.run_config import MeshConfig, RunConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh


class CommandParser(argparse.ArgumentParser):
    """The options of a command. Its help ends with the settings that --set changes."""

    settings: tuple[str, ...] = ()  # prefixes of their dotted names; "" is that of all

    def option(
        self, name: str, metavar: str | None, text: str, type: Any = str, **more: Any
    ) -> None:
        """Adds an option with a value; the help ends with its default if there is one."""
        if more.get("default") is not None:
            text += f" (default: {more['default']})"
        self.add_argument(name, metavar=metavar, help=text, type=type, **more)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            text = f"invalid choice: {value!r}: {nearest(str(value), map(str, action.choices))}."
            raise argparse.ArgumentError(action, text)

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: --([\w.-]+)", message):
            hint = meaning_of(found[1].replace("-", "_"), RunConfig)
            if not hint.startswith("Allowed"):
                message += f". A setting is changed by --set KEY=VALUE: {hint}."
        super().error(message)

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{settings_help(self.settings)}" if self.settings else text


# --- a run: --config, --set, --workdir ------------------------------------------------------------


CONFIGS = Path(__file__).parents[1] / "configs"


def named_configs(function: str = "") -> list[str]:
    """The names of the configs that come with the package and have a `function`."""
    files = CONFIGS.glob("*.py")
    return sorted(x.stem for x in files if f"def {function}" in x.read_text("utf-8"))


def add_config(
    parser: CommandParser, function: str = "get_config() -> RunConfig", **more: Any
) -> None:
    """Adds --config FILE, a required option unless `more` changes that."""
    names = ", ".join(named_configs(function.partition("(")[0]))
    text = f"a Python file with {function}, or one that comes with the package: {names}"
    parser.option("--config", "FILE", text, **({"required": True} | more))


def load_config(path: str, function: str) -> Any:
    """Calls `function` of the Python file at `path`, or of the package's config of that name.

    Raises:
      ConfigError: The file or the function is missing, or raises.
    """
    file = Path(path)
    if not file.is_file() and path in named_configs():
        file = CONFIGS / f"{path}.py"
    if not file.is_file():
        found = [*map(str, file.parent.glob("*.py")), *named_configs(function)]
        wrong = "is a directory" if file.is_dir() else "does not exist"
        raise ConfigError(f"config file {path} {wrong}. {nearest(path, found)}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"config file {path} is not a Python file; give a .py file with a function"
            f" {function}()."
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(hasattr(module, function), f"it has no function {function}().")
        return getattr(module, function)()
    except Exception as error:  # the file is the user's: say where in it, as for any other input
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
        where = f", line {lines[-1]}" if lines else ""
        known = isinstance(error, ConfigError)
        text = str(error) if known else f"{type(error).__name__}: {error}."
        raise ConfigError(f"config file {path}{where}: {text}") from error


def run_config(args: argparse.Namespace) -> RunConfig:
    """The run of --config, changed by --set."""
    run = load_config(args.config, "get_config")
    require(
        isinstance(run, RunConfig),
        f"get_config() of {args.config} returns {type(run).__name__}; it must return a"
        " zflora_jax.RunConfig.",
    )
    return override(run, changes(args))


def add_settings(
    parser: CommandParser,
    begin: tuple[str, ...] = ("",),
    text: str = "change settings, e.g. --set train.steps=50 adapter.rank=16; all are listed below",
    metavar: str = "KEY=VALUE",
) -> None:
    """Adds --set KEY=VALUE for the settings whose dotted names have a prefix in `begin`."""
    parser.settings = begin
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar=metavar, help=text)


def changes(args: argparse.Namespace) -> dict[str, str]:
    """The values of --set, by dotted name."""
    for pair in args.set:
        require("=" in pair, f"--set {pair!r}: expected KEY=VALUE, e.g. train.steps=50.")
    return dict(pair.split("=", 1) for pair in args.set)


def settings_help(begin: tuple[str, ...]) -> str:
    """The settings with a prefix in `begin`: name, values, default and meaning, by section."""
    from zflora_jax.core.settings import sections  # reads source code: only when help is asked for

    width = max(shutil.get_terminal_size().columns - 2, 40)
    lines = ["settings, changed by --set KEY=VALUE:"]

    def add(text: str, indent: int, hanging: int = 0) -> None:
        wrapper = textwrap.TextWrapper(width, " " * indent, " " * (indent + hanging))
        wrapper.break_on_hyphens = False
        lines.append(wrapper.fill(text))

    for section in sections():
        listed = [s for s in section.settings if s.name.startswith(begin)]
        if listed:
            lines.append("")
            add(f"{section.name}: {section.title}", indent=2)
        for setting in listed:
            add(f"{setting.name} ({setting.allowed}; default {setting.default})", 4, hanging=2)
            add(setting.meaning, indent=8)
    return "\n".join(lines) + "\n"


def add_source(parser: CommandParser, verb: str) -> None:
    """Adds --workdir with --checkpoint, and --model; one of the two is required."""
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--workdir", metavar="DIR", help=f"{verb} this run's trained model, fused")
    text = (
        f"{verb} a model: a Hugging Face directory, an export (or its s3:// or gs:// URL), hub id,"
        " .gguf file or smollm2-135m"
    )
    either.add_argument("--model", metavar="MODEL", help=text)
    text = "checkpoint of a run: a number of steps, or best (default: the newest)"
    parser.option("--checkpoint", "STEP", text)


# --- devices and processes ------------------------------------------------------------------------


def add_mesh(parser: CommandParser) -> None:
    """Adds --set for a trained run, of which only the mesh can be changed."""
    text = (
        "devices to divide the model over, e.g. --set mesh.fsdp=2 mesh.tensor=2 (default: as a run"
        " was trained)"
    )
    add_settings(parser, ("mesh.",), text, metavar="mesh.AXIS=N")


def mesh_asked(settings: dict[str, str], run: RunConfig | None) -> Mesh | None:
    """The mesh of settings `mesh.*`, in place of the run's; None if neither asks for one."""
    from jax import device_count, process_count

    from zflora_jax.parallel.sharding import make_mesh

    for key in settings:
        require(
            key.startswith("mesh."),
            f"--set {key}: a trained run's settings cannot be changed here; only mesh.* can, e.g."
            " mesh.fsdp=2, the devices that the model is divided over.",
        )
    if not settings:
        require(
            run is not None or process_count() == 1,
            f"{process_count()} processes divide a model over a mesh of all their devices: set it,"
            f" e.g. --set mesh.fsdp={device_count()}.",
        )
        return None
    asked = {key.removeprefix("mesh."): value for key, value in settings.items()}
    return make_mesh(override(run.mesh if run else MeshConfig(), asked, "mesh"))


def add_processes(parser: CommandParser) -> None:
    """Adds the options with which several processes find each other."""
    add = parser.add_argument_group(
        "several processes (every one runs this command, with directories that they share)"
    ).add_argument
    text = "find the others by SLURM, Open MPI, Kubernetes or Cloud TPU"
    add("--distributed", action="store_true", help=text)
    text = "address of process 0 (or ZFLORA_COORDINATOR)"
    add("--coordinator", metavar="HOST:PORT", help=text)
    text = "number of processes (or ZFLORA_NUM_PROCESSES)"
    add("--num-processes", type=int, metavar="N", help=text)
    text = "number of this process, from 0 (or ZFLORA_PROCESS_ID)"
    add("--process-id", type=int, metavar="I", help=text)


# Options of one process, options that no user gives, and paths, whose contents are compared: hosts
# may mount one directory at different paths.
_OWN = (
    *("coordinator", "num_processes", "process_id", "distributed", "run", "as_path"),
    *("config", "workdir", "out"),
)


def join(args: argparse.Namespace) -> bool:
    """Joins the processes that the options of `add_processes` name, before a device is touched.
    Raises ConfigError in all of them if their other options differ.

    Returns:
      Whether this process prints the command's results.
    """
    from zflora_jax.parallel import distributed

    distributed.start(
        args.coordinator, args.num_processes, args.process_id, detect=args.distributed
    )
    distributed.require_equal({name: x for name, x in vars(args).items() if name not in _OWN})
    return distributed.is_main()
