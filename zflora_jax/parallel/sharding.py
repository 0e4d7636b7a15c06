"""One mesh of three axes, one table from parameter names to its axes, and divided activations.

data: copies of the model, each with its rows of the batch. fsdp: rows too, and the weights are
stored in parts, which layers gather in training. tensor: heads, MLP units and the vocabulary
are divided, as in Megatron-LM (arXiv 1909.08053). A slice is a group of devices with fast links;
slices follow each other along data.

Shapes: B rows of a batch, T tokens, d residual width.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from zflora_jax.core import trees
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import MeshConfig

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that divide the rows of a batch

VOCABULARY = {("embed/embedding", 0), ("lm_head/kernel", 1)}  # leaf, dimension

# Name of a leaf, without its layer -> the mesh axis of each dimension. The first match counts;
# every leaf must have one.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(.*/)?scale", (None,)),
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"attn/[qkv]/(kernel|forward)", ("fsdp", "tensor", None)),
    (r"attn/[qkv]/bias", ("tensor", None)),
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
    (r"(attn/[qkv]|mlp/(gate|up))/magnitude", ("tensor",)),
    (r"(attn/o|mlp/down)/(lora_a|ffa_a)", ("tensor", None)),
    (r"(attn/o|mlp/down)/lora_b", (None, "fsdp")),
    (r"(attn/o|mlp/down)/magnitude", ("fsdp",)),
)


Axes = str | tuple[str, ...] | None  # axes of the mesh that divide one dimension of an array


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of a run.

    Args:
      config: Number of devices along data, fsdp and tensor.
      devices: Devices, of which the first are used; None for all devices. Idle ones are logged.

    Raises:
      ConfigError: There are fewer devices.
    """
    need, have = config.devices, jax.devices() if devices is None else list(devices)
    axes = f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor}"
    require(
        need == len(have) or (need < len(have) and jax.process_count() == 1),
        f"{axes} needs {need} devices; there are {len(have)} in {jax.process_count()} processes"
        " (several use all of them). Change mesh.*, or start on other devices.",
    )
    if devices is None and need < len(have):
        _warn(
            f"the mesh uses {need} of {len(have)} devices, {len(have) - need} stay idle: raise"
            " mesh.data or mesh.fsdp to use more of them"
        )
    return Mesh(arrange(config, have[:need]), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices of a mesh as [data, fsdp, tensor]. Slices follow each other along data, so that
    weights are gathered within one slice; logs a warning if mesh.data does not allow that.
    """
    slices: dict[Any, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None), []).append(device)
    groups, shape = [*slices.values()], (config.data, config.fsdp, config.tensor)
    copies, rest = divmod(config.data, len(groups))
    if not rest and len({len(group) for group in groups}) == 1:
        return np.concatenate([_neighbours((copies, *shape[1:]), group) for group in groups])
    if shape[1:] != (1, 1):
        log.warning(
            "the devices are in %d slices of %s, and mesh.data=%d puts no whole copies of the"
            " model in each: weights are gathered over the network between them. Use equally many"
            " devices of each, and a multiple of the number of slices for mesh.data",
            *(len(groups), ", ".join(str(len(group)) for group in groups), config.data),
        )
    return np.asarray(devices).reshape(shape)


def _neighbours(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices linked along each axis; in the given order if they fill no box of the torus."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError):
        return np.asarray(devices).reshape(shape)


def parts(mesh: Any, axes: Axes) -> int:
    """The number of parts that axes of a mesh divide a dimension into."""
    return math.prod(
        mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
    )


def _dividing(mesh: Any, axes: Iterable[Axes], shape: Sequence[int]) -> P:
    """The axes of an array's dimensions, without axes that do not divide their dimension."""
    sizes = zip(axes, shape, strict=False)
    return P(*(at if size % parts(mesh, at) == 0 else None for at, size in sizes))


def in_layer(name: str) -> str:
    """ "attn/q/kernel" of "layers/attn/q/kernel" or "layers_3/attn/q/kernel"."""
    return re.sub(r"^layers(_\d+)?/", "", name)


def axes_of(name: str) -> tuple[str | None, ...]:
    """The mesh axes of a leaf "layers/attn/q/kernel": ("fsdp", "tensor", None), stacked or not."""
    try:
        return trees.first_match(RULES, in_layer(name))
    except KeyError:
        raise ConfigError(
            f"no sharding rule covers the parameter {name!r}: add one to RULES in"
            " zflora_jax/parallel/sharding.py."
        ) from None


def spec(name: str, shape: tuple[int, ...], mesh: Any, *, fused: bool = False) -> P:
    """The PartitionSpec of a leaf; ConfigError if an axis of the mesh does not divide its dimension
    (except the vocabulary, which every device along that axis then holds whole).

    Args:
      name: The leaf's name, as in `axes_of`.
      shape: The leaf's shape; layers may be stacked on a leading axis.
      mesh: A Mesh or an AbstractMesh.
      fused: Whether the leaf belongs to a fused model. Its widths depend on the adapter, so an axis
        of the mesh that does not divide its dimension moves to another dimension of the leaf.
    """
    axes = axes_of(name)
    first = len(shape) - len(axes)  # stacked layers stay whole: scan takes one at a time
    found: list[tuple[str, ...]] = [()] * first + [(axis,) if axis else () for axis in axes]
    for at, axis in enumerate(axes, first):
        count = parts(mesh, axis)
        if axis is None or shape[at] % count == 0:
            continue
        found[at] = ()
        if (name, at) in VOCABULARY:
            _warn(
                f"mesh.{axis}={count} does not divide the vocabulary of {shape[at]}: every device"
                f" along {axis} holds all rows of {name} and computes all logits, not 1/{count} of"
                f" them. Train on mesh.{axis}=1, or on a model whose vocabulary is padded."
            )
            continue
        fits = max(n for n in range(1, count) if shape[at] % n == 0)
        require(
            fused,
            f"mesh.{axis}={count} does not divide {name}, shape {shape}, at the dimension of"
            f" {shape[at]}. Choose a mesh.{axis} that does, e.g. {fits}.",
        )
        others = [
            i
            for i in range(first, len(shape))
            if i != at and shape[i] % (count * parts(mesh, found[i])) == 0
        ]
        if others:  # one that is divided already, so that heads and units stay in one piece
            to = max(others, key=lambda i: (len(found[i]), shape[i]))
            found[to] = (*found[to], axis)
        else:
            _warn(  # once for all layers
                f"mesh.{axis}={count} divides no dimension of {in_layer(name)}, shape"
                f" {shape[first:]}: every device along {axis} holds it whole. Train with an adapter"
                f" that widens the stream of {shape[at]} by {-shape[at] % count} more (rank,"
                " extra_head_dim or extra_mlp_units)."
            )
    return P(*(part[0] if len(part) == 1 else part or None for part in found))


def specs(name: str, leaf: Any, mesh: Any, *, fused: bool = False) -> Any:
    """The PartitionSpecs of a leaf's arrays, as a tree of the leaf's structure: one, or those of
    codes and scales. A scale is divided like its codes if the axis divides it.
    """
    whole = spec(name, tuple(leaf.shape), mesh, fused=fused)

    def of_part(part: Any) -> P:
        same = tuple(part.shape) == tuple(leaf.shape)
        return whole if same else _dividing(mesh, whole, part.shape)

    return jax.tree.map(of_part, leaf)


@functools.cache
def _warn(text: str) -> None:
    """Warns in the log, once per process."""
    log.warning("%s", text)


def _tree_specs(tree: Mapping[str, Any], mesh: Any, fused: bool) -> trees.Tree:
    return trees.map_with_names(lambda name, leaf: specs(name, leaf, mesh, fused=fused), tree)


def shardings(tree: Mapping[str, Any], mesh: Mesh, *, fused: bool = False) -> trees.Tree:
    """The sharding of every leaf of a tree of arrays or ShapeDtypeStructs; fused: see `spec`."""
    return jax.tree.map(partial(NamedSharding, mesh), _tree_specs(tree, mesh, fused))


def active_mesh() -> Any:
    """The mesh in use (`jax.set_mesh`) if it has the axes of `make_mesh`; otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(mesh.axis_names) == set(AXES) else None


def constrain(tree: Mapping[str, Any], *, fused: bool = False) -> trees.Tree:
    """Divides parameters or adapters over the mesh in use, in a compiled function; without a mesh
    they stay. fused: see `spec`.
    """
    if (mesh := active_mesh()) is None:
        return dict(tree)
    return jax.lax.with_sharding_constraint(dict(tree), _tree_specs(tree, mesh, fused))


def shard(tree: Mapping[str, Any], mesh: Mesh, *, fused: bool = False) -> trees.Tree:
    """Places parameters or adapters on the devices of a mesh, divided by `spec`. Each of several
    processes has the whole tree, or has loaded it on this mesh.
    """

    def place(leaf: Any, where: NamedSharding) -> jax.Array:
        shared = isinstance(leaf, jax.Array) and leaf.sharding.device_set == where.device_set
        if where.is_fully_addressable or shared:
            return jax.device_put(leaf, where)
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, where, value.__getitem__)

    return jax.tree.map(place, dict(tree), shardings(tree, mesh, fused=fused))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings for a TrainState of arrays or ShapeDtypeStructs. Adapters, and optimizer state of
    their shapes, are divided by the rules; other leaves (scalars, Adafactor's sums over rows and
    columns) are whole on all devices.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.flatten(state.adapters).items()}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        divided = tuple(leaf.shape) == shapes.get(name)
        return NamedSharding(mesh, spec(name, shapes[name], mesh) if divided else P())

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays [B, T]: rows over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def own_rows(rows: int, mesh: Mesh) -> list[int]:
    """The indices of the rows of a batch of `rows` rows that lie on this process's devices."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index for row in range(*index[0].indices(rows))})


def put_rows(batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Makes a batch of `rows` rows, arrays [B, T], on a mesh, from arrays [own, T] of the rows of
    `own_rows`, in that order.
    """
    shapes = {name: (rows, *own.shape[1:]) for name, own in batch.items()}
    return jax.make_array_from_process_local_data(batch_sharding(mesh), dict(batch), shapes)


def batch_shards() -> int:
    """The number of parts that the mesh in use divides a batch's rows into; 1 without a mesh."""
    mesh = active_mesh()
    return 1 if mesh is None else parts(mesh, BATCH)


def gather_fsdp(variables: Mapping[str, trees.Tree]) -> trees.Tree:
    """Gathers parameters, of one layer or of none, along fsdp in a compiled function."""
    # Else XLA loops over parts of each product: 1.4 times a LoRA step's cycles on a TPU v5e-8.
    if active_mesh() is None:
        return dict(variables)
    return {key: trees.map_with_names(_gather_leaf, tree) for key, tree in variables.items()}


def _gather_leaf(name: str, leaf: Any) -> Any:
    return jax.tree.map(partial(_gathered, axes_of(name)), leaf)


def _whole(axes: tuple[Axes, ...], x: jax.Array) -> jax.Array:
    return divide(x, *(None if axis == "fsdp" else axis for axis in axes))


_gathered = jax.custom_vjp(_whole, nondiff_argnums=(0,))
# Gradients are summed where their leaves are stored.
_gathered.defvjp(lambda axes, x: (_whole(axes, x), None), lambda axes, _, dx: (divide(dx, *axes),))


def divide_embeddings(x: jax.Array, *, rows: bool) -> jax.Array:
    """Divides embeddings [B, T, d] for the layers, by rows or, as their table, by d: kernels then
    stay in place and products are summed, which moves less data for few tokens, as in decode.
    """
    # In two steps, of which the second is an all-to-all: in one step XLA would replicate the
    # embeddings of the whole batch on meshes of several axes.
    x = divide(x, "data", None, "fsdp")
    return divide(x, BATCH) if rows else x


def divide(x: jax.Array, *axes: Axes) -> jax.Array:
    """Divides an array's first dimensions over axes of the mesh in use, in a compiled function;
    axes that do not divide their dimension are left out.
    """
    if (mesh := active_mesh()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, _dividing(mesh, axes, x.shape))
