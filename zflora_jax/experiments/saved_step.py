"""Files of compiled train steps, which `zflora plan --save` writes for devices that may be absent.

Such a file is a zip archive: key.json, and a program for each of data.bucket_lengths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from zflora_jax.core.fields import ConfigError, require, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path, whole_file
from zflora_jax.core.trees import Tree, flatten
from zflora_jax.experiments.step_shapes import program_bytes
from zflora_jax.reporting.files import plain
from zflora_jax.reporting.provenance import cpu_model
from zflora_jax.training.objective import Batch
from zflora_jax.training.trainer import Metrics, StepFn, TrainState

KEY, _COMPILERS = "key.json", {"tpu": ["libtpu"], "gpu": ["jax-cuda13-pjrt", "jax-cuda12-pjrt"]}


def each_length(run: RunConfig) -> Iterator[tuple[int, RunConfig]]:
    """Yields each of data.bucket_lengths, and `run` with only that one."""
    for length in run.data.bucket_lengths:
        yield length, replace(run, data=replace(run.data, bucket_lengths=(length,)))


def with_memory(step: StepFn, compiled: Any) -> StepFn:
    """Adds to metrics step_memory_bytes, the memory that `compiled` plans for a device."""
    planned: Any = {"step_memory_bytes": program_bytes(compiled)["total"]}

    def made(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = step(params, state, batch)
        return state, metrics | planned

    return made


def save_steps(
    path: str | Path, run: RunConfig, mesh: Mesh, steps: Mapping[int, tuple[Any, Any]]
) -> None:
    """Writes steps, (lowered, compiled) by length of rows; ConfigError for a base in 4 bits."""
    taken = jax.tree.leaves(steps[run.data.bucket_lengths[0]][0].args_info)
    require(
        not any(str(x.dtype) in ("int4", "uint4") for x in taken),
        f"{path} is not written: JAX does not run a step from a file on codes of 4 bits. Set"
        " quantize.kernels to int8 or none, or leave out --save.",
    )
    key = _key(run, mesh, {length: lowered for length, (lowered, _) in steps.items()})
    with whole_file(as_path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(KEY, json.dumps(key))
        for length, (_, compiled) in steps.items():
            out.writestr(str(length), serialize(compiled)[0])


def load_steps(
    path: str | Path, run: RunConfig, mesh: Mesh, lowered: Mapping[int, Any]
) -> dict[int, Any]:
    """Loads a run's steps onto its devices.

    Args:
      path: A file of `save_steps`. Its programs run here: load only files that you trust.
      run: The run's settings.
      mesh: The run's devices.
      lowered: Length of rows -> the run's step, lowered for `mesh`.

    Returns:
      Length of rows -> the compiled step.

    Raises:
      ConfigError: The file holds no steps, or those of another program, device or version.
    """
    try:
        with zipfile.ZipFile(as_path(path)) as file:
            found = {name: file.read(name) for name in file.namelist()}
        there = json.loads(found[KEY])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} holds no steps of `zflora plan --save`: {error}.") from None
    _require_same(path, there, _key(run, mesh, lowered))
    load = partial(deserialize_and_load, execution_devices=[*mesh.devices.flat])
    return {n: load(found[str(n)], x.in_tree, x.out_tree) for n, x in lowered.items()}


def _key(run: RunConfig, mesh: Mesh, lowered: Mapping[int, Any]) -> dict[str, Any]:
    """Returns the "facts" that a program depends on, and the "settings" that explain them."""
    device = mesh.devices.flat[0]
    facts: dict[str, Any] = {"devices": mesh.size, "device": device.device_kind}
    facts |= {"cpu": cpu_model()} if device.platform == "cpu" else {}
    for package in ("jax", "jaxlib", *_COMPILERS.get(device.platform, ())):
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    for length, step in lowered.items():
        digest = hashlib.sha256(step.as_text().encode()).hexdigest()[:16]
        facts[f"program for rows of {length} tokens"] = digest
    settings = plain(flatten(to_dict(run)))
    del settings["data/date"]  # it is the day on which the run starts
    return {"facts": facts, "settings": settings}


def _require_same(path: str | Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises a ConfigError that names the facts that differ, and the settings."""
    changed = [
        f"\n  {name.replace('/', '.')}: {there[part].get(name)} there, {value} here"
        for part in ("facts", "settings")
        for name, value in here[part].items()
        if there[part].get(name) != value
    ]
    require(
        there["facts"] == here["facts"],
        f"{path} was compiled for another run:{''.join(changed)}\nWrite it again with this run's"
        " settings and versions: `zflora plan --save`.",
    )
