"""What a user gives: config files, --set, files of metrics. What is wrong with them is said."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax import config as config_module
from zflora_jax.core.fields import ConfigError, nearest, override
from zflora_jax.core.run_config import MeshConfig, RunConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh


def load_config(path: str, function: str) -> Any:
    """Call `function` of the Python file at `path`.

    Raises:
      ConfigError: the file or the function is missing, or raises.
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
        raise ConfigError(_of_file(file, path, error)) from error


def _of_file(file: Path, path: str, error: Exception) -> str:
    """The message for an exception that a config file raises: its line, and an unknown key."""
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
        return f"config file {path}{where}: unknown key {unknown[2]!r} of {unknown[1]}: {known}."
    return f"config file {path}{where}: {type(error).__name__}: {error}."


def changes(args: argparse.Namespace) -> dict[str, str]:
    """The values of --set, by dotted name."""
    for pair in args.set:
        if "=" not in pair:
            raise ConfigError(f"--set {pair!r}: expected KEY=VALUE, e.g. train.steps=50.")
    return dict(pair.split("=", 1) for pair in args.set)


def run_config(args: argparse.Namespace) -> RunConfig:
    """The run of --config, changed by --set."""
    run = load_config(args.config, "get_config")
    if not isinstance(run, RunConfig):
        raise ConfigError(
            f"get_config() of {args.config} returns {type(run).__name__}; it must return a"
            " zflora_jax.RunConfig."
        )
    return override(run, changes(args))


def mesh_asked(settings: dict[str, str], run: RunConfig | None) -> Mesh | None:
    """The mesh that settings `mesh.*` ask for, in place of the run's; None where none is asked."""
    from jax import device_count, process_count

    from zflora_jax.parallel.sharding import make_mesh

    other = [key for key in settings if not key.startswith("mesh.")]
    if other:
        raise ConfigError(
            f"--set {other[0]}: what has been trained cannot be changed here; mesh.* can, e.g. "
            "mesh.fsdp=2, the devices that the model is divided over."
        )
    if not settings:
        if run is None and process_count() > 1:
            raise ConfigError(
                f"{process_count()} processes divide a model over a mesh of all their devices: set"
                f" it, e.g. --set mesh.fsdp={device_count()}."
            )
        return None
    asked = {key.removeprefix("mesh."): value for key, value in settings.items()}
    return make_mesh(override(run.mesh if run else MeshConfig(), asked, "mesh"))


@contextlib.contextmanager
def damage_is_input() -> Iterator[None]:
    """A file of metrics that is damaged, or holds nothing yet, is input that cannot be used."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error
