"""Sharding: one mesh of three axes, one table from parameter names to the axes of their dimensions, for base and adapters alike.

data: copies of the model, each with its own rows of the batch. fsdp: rows of the batch too, and the base is stored in slices: the compiler gathers a
layer's kernels where they are used, one layer at a time, because the rows are divided over the same axis (a constraint that asks for the gather
would make the backward pass keep the gathered kernels of all layers). tensor: heads, MLP units and the vocabulary are divided, as in Megatron-LM
(arXiv 1909.08053). Adapter blocks stay apart from their kernels while they are trained, so an adapter's width needs to divide nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zflora_jax import trees
from zflora_jax.config import MeshConfig
from zflora_jax.fields import ConfigError, require

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what the rows of a batch are divided over

# Name of a leaf, without its layer -> the mesh axis of each dimension. The first match counts; every leaf must have one.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(.*/)?scale", (None,)),
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"attn/[qkv]/(kernel|forward)", ("fsdp", "tensor", None)),
    (r"attn/[qkv]/(backward|cross)", (None, "tensor", None)),
    (r"attn/o/(kernel|backward)", ("tensor", None, "fsdp")),
    (r"attn/o/(forward|cross)", ("tensor", None, None)),
    (r"mlp/(gate|up)/kernel", ("fsdp", "tensor")),
    (r"mlp/(gate|up)/forward", ("fsdp", None)),
    (r"mlp/(gate|up)/backward", (None, "tensor")),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    (r"mlp/down/forward", ("tensor", None)),
    (r"mlp/down/backward", (None, "fsdp")),
    (r"mlp/(gate|up|down)/cross", (None, None)),
    (r"(attn/[qkv]|mlp/(gate|up))/(lora_a|ffa_a)", ("fsdp", None)),
    (r"(attn/[qkv]|mlp/(gate|up))/lora_b", (None, "tensor")),
    (r"(attn/o|mlp/down)/(lora_a|ffa_a)", ("tensor", None)),
    (r"(attn/o|mlp/down)/lora_b", (None, "fsdp")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over the first data * fsdp * tensor of `devices` (None: all that there are). ConfigError if there are fewer."""
    need, have = config.data * config.fsdp * config.tensor, jax.devices() if devices is None else list(devices)
    require(
        need <= len(have),
        f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor} needs {need} devices; there are {len(have)}. "
        "Lower one of them, or start on more devices.",
    )
    require(
        need == len(have) or jax.process_count() == 1,
        f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor} is {need} devices of {len(have)} in "
        f"{jax.process_count()} processes: a run of several processes uses all of them. Raise mesh.data or mesh.fsdp.",
    )
    return Mesh(np.asarray(have[:need]).reshape(config.data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def axes_of(name: str) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of the leaf `name` ("layers/attn/q/kernel": ("fsdp", "tensor", None)), without the stacked layer axis."""
    bare = re.sub(r"^layers(_\d+)?/", "", name)
    try:
        return trees.first_match(RULES, bare)
    except KeyError:
        raise ConfigError(f"no sharding rule covers the parameter {name!r}: add one to RULES in zflora_jax/sharding.py.") from None


def spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of a leaf. ConfigError naming it where an axis of the mesh does not divide its dimension."""
    axes = axes_of(name)
    axes = (None,) * (len(shape) - len(axes)) + axes  # stacked layers stay whole: scan takes one at a time
    for axis, size in zip(axes, shape, strict=True):
        count = mesh.shape[axis] if axis else 1
        if size % count:
            fits = [n for n in range(1, count) if size % n == 0]
            raise ConfigError(
                f"mesh.{axis}={count} does not divide {name}, shape {shape}, at the dimension of {size}. "
                f"Choose a mesh.{axis} that does, e.g. {max(fits)}."
            )
    return P(*axes)


def shardings(tree: Mapping[str, Any], mesh: Mesh) -> trees.Tree:
    """The NamedSharding of every leaf of a parameter or adapter tree (arrays or ShapeDtypeStructs)."""
    return trees.map_with_names(lambda name, leaf: NamedSharding(mesh, spec(name, tuple(leaf.shape), mesh)), tree)


def shard(tree: Mapping[str, Any], mesh: Mesh) -> trees.Tree:
    """`tree` on the devices of `mesh`. Where they belong to several processes, each must have the whole tree, or have loaded it on this mesh."""

    def place(leaf: Any, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(leaf, jax.Array) and leaf.sharding == where):
            return jax.device_put(leaf, where)
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, where, value.__getitem__)

    return jax.tree.map(place, dict(tree), shardings(tree, mesh))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings for a TrainState of arrays or ShapeDtypeStructs: adapters and their optimizer moments by the rules, scalars on all devices."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return NamedSharding(mesh, spec("/".join(names), tuple(leaf.shape), mesh) if leaf.shape else P())

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's arrays [B, T]: rows over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def own_rows(rows: int, mesh: Mesh) -> list[int]:
    """Which of the `rows` rows of a batch lie on this process's devices."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index is not None for row in range(*index[0].indices(rows))})


def put_rows(batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch of `rows` rows on `mesh`, of which `batch` holds those that `own_rows` names, in that order."""
    at = {row: position for position, row in enumerate(own_rows(rows, mesh))}

    def put(own: np.ndarray) -> jax.Array:
        def held(index: tuple[slice, ...] | None) -> np.ndarray:
            return own if index is None else own[[at[row] for row in range(*index[0].indices(rows))]]

        return jax.make_array_from_callback((rows, *own.shape[1:]), batch_sharding(mesh), held)

    return {name: put(own) for name, own in batch.items()}


def batch_shards() -> int:
    """Into how many parts the mesh in use divides the rows of a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


def divide_embeddings(x: jax.Array) -> jax.Array:
    """Embeddings [B, T, d] with their rows over data and fsdp, from a lookup in a table whose d is divided over fsdp; as they are without a mesh.

    In two steps, an all-to-all along fsdp being the second: asked for the last alone, XLA replicates the embeddings of the whole batch on meshes of
    several axes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return divide_rows(jax.lax.with_sharding_constraint(x, P("data", None, "fsdp")))


def divide_rows(x: jax.Array) -> jax.Array:
    """`x` [B, ...] with its rows over data and fsdp and nothing else divided; as it is without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH))
