"""Loads checkpoints of a run."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from jax.sharding import Mesh

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import split_base
from zflora_jax.adapters.packing import split_layers
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model, fingerprint
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.setup import state_like
from zflora_jax.nn.quantize_model import dequantize_model, is_quantized
from zflora_jax.parallel.distributed import from_process_0, require_equal
from zflora_jax.parallel.mesh import mesh_if_there, mesh_of
from zflora_jax.training.checkpoint import Checkpoints, require_same
from zflora_jax.training.identity import require_same_settings
from zflora_jax.training.workdir import read_config, saved_steps

log = logging.getLogger(__name__)


def load_run(
    workdir: str | Path, step: int | str | None = None, *, mesh: Mesh | None = None
) -> tuple[RunConfig, Model, Tree, int]:
    """Loads a checkpoint of a run.

    Processes that share the model call this together; each reads its devices' parts.

    Args:
      workdir: The run's directory or URL.
      step: Number of the checkpoint, "best" (train.keep_best), or None for the newest.
      mesh: The mesh that base and adapters are divided over (`sharding.make_mesh`). None: the mesh
        of the run if its devices are there, else one device. Several processes always need a mesh
        of all their devices.

    Returns:
      (config, base model that the adapters were trained next to, adapters, finished steps).

    Raises:
      ConfigError: There is no such checkpoint, or it was trained on another base.
    """
    run = read_config(workdir)
    require_same_settings(run)
    require(bool(saved_steps(workdir)), f"{workdir} has no checkpoint yet; train it first.")
    mesh = mesh_if_there(run.mesh) if mesh is None else mesh
    model = load_base(run, mesh)
    with Checkpoints(workdir, create=False) as checkpoints:
        # From process 0: while the run trains on, each process could find another newest one.
        number = from_process_0(_number(workdir, checkpoints, step))
        base, start = split_base(model, run.adapter)
        state, saved = checkpoints.restore(state_like(run, base, start, mesh), number)
    require_same(saved, "base", fingerprint(model), workdir)
    files = hashlib.sha256(repr(sorted(saved["files"].items())).encode()).hexdigest()
    require_equal({f"checkpoint of step {number}": files})  # they may have read other directories
    return run, base, state.adapters, int(state.step)


def _number(workdir: str | Path, checkpoints: Checkpoints, step: int | str | None) -> int | None:
    """The number of the checkpoint that `step` names."""
    if step is None:
        return checkpoints.latest
    if step == "best":
        best, advice = checkpoints.best, "train with train.keep_best=True, or name a step"
        require(best is not None, f"{workdir} has no best checkpoint: {advice}.")
        return best
    require(str(step).isdigit(), f"checkpoint {step!r}: expected a number of steps, or 'best'.")
    return int(step)


def fuse_trained(
    model: Model, adapter: AdapterConfig, adapters: Tree, *, donate: bool = True
) -> Model:
    """Fuses trained adapters into the base. For a method that merges by addition, a quantised base
    is dequantised first, as in training.

    Args:
      model: The base model.
      adapter: The config of the adapters.
      adapters: The trained adapters.
      donate: Whether the base's arrays are freed.
    """
    if is_quantized(model) and not METHODS[adapter.method].keeps_codes:
        log.warning(
            "%s is added to the dequantised base, so the model takes the memory of %s weights",
            adapter.method,
            model.config.execution.dtype,
        )
        model = dequantize_model(model)
    return fuse(model, adapter, adapters, donate=donate)


def load_fused(
    workdir: str | Path,
    step: int | str | None = None,
    *,
    mesh: Mesh | None = None,
    decode: bool = False,
) -> tuple[Model, str]:
    """Loads a checkpoint of a run (see `load_run`), fused. Memory never holds two bases.

    Args:
      workdir, step, mesh: Arguments of `load_run`.
      decode: On a mesh, give the model the layout for decoding, which would be a second copy next
        to stacked layers.

    Returns:
      (Fused model, a label for result files, e.g. "step120").
    """
    run, model, adapters, number = load_run(workdir, step, mesh=mesh)
    fused = fuse_trained(model, run.adapter, adapters)
    if decode and mesh_of(fused.params) is not None:
        fused = split_layers(fused)
    return fused, f"step{number}"
