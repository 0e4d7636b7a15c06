"""The mesh of a model: found from its arrays, entered by the code that runs it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from zflora_jax.core.model import require_there
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.core.trees import Tree
from zflora_jax.parallel.sharding import AXES, BATCH, active_mesh, make_mesh, parts, shard

log = logging.getLogger(__name__)


def mesh_if_there(config: MeshConfig) -> Mesh | None:
    """The mesh that a run was trained on; None for one device and, with a warning, if there are
    fewer devices. ConfigError if it does not use all devices of several processes.
    """
    need, have = config.devices, jax.device_count()
    if 1 < need <= have or jax.process_count() > 1:
        return make_mesh(config)
    if need > 1:
        log.warning(
            "a run of %d devices (mesh.data=%d x mesh.fsdp=%d x mesh.tensor=%d) is loaded onto one:"
            " there are only %d (set mesh.* to divide the model over them)",
            *(need, config.data, config.fsdp, config.tensor, have),
        )
    return None


def mesh_of(tree: Mapping[str, Any]) -> Mesh | None:
    """The mesh that the arrays of `tree` are on; None for one device."""
    leaf = next(iter(jax.tree.leaves(tree)), None)
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return None
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    if not isinstance(mesh, Mesh) or set(mesh.axis_names) != set(AXES) or mesh.size == 1:
        return None
    return mesh


@contextmanager
def mesh_in_use(tree: Mapping[str, Any]) -> Iterator[None]:
    """Context that computes on the mesh of the parameters `tree` (`jax.set_mesh`), if there is one;
    ConfigError if they were donated.
    """
    require_there(tree)
    mesh = mesh_of(tree)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def place_like(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> Tree:
    """Places adapters on the mesh of a model's parameters; on one device they stay."""
    mesh = mesh_of(params)
    return dict(adapters) if mesh is None else shard(adapters, mesh, fused=True)


def several_devices() -> bool:
    """True if the mesh in use has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def batch_axes(rows: int) -> tuple[str, ...] | None:
    """The axes of the mesh in use that divide a batch of `rows`: data and fsdp, as in training,
    else only data, as in decode; None if neither does, or the mesh has other axes.
    """
    if (mesh := active_mesh()) is None:
        return None
    return next((axes for axes in (BATCH, BATCH[:1]) if rows % parts(mesh, axes) == 0), None)


def has_values_here(array: Any) -> bool:
    """True if this process can read the values: they are not traced, nor in other processes."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def fill_rows(rows: int, tree: Mapping[str, Any], axes: tuple[str, ...] = BATCH[:1]) -> int:
    """The smallest number of rows, at least `rows`, that the mesh of `tree` divides by `axes`."""
    mesh = mesh_of(tree)
    count = 1 if mesh is None else parts(mesh, axes)
    return -(-rows // count) * count
