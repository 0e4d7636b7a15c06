"""Tensors of Hugging Face's models and leaves of the native tree: names, layouts, strict checks.

Hugging Face stores a linear layer as [out, in] over flattened axes; a native kernel is [*in, *out]
with an axis for heads.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from zflora_jax.core.architecture import QK_NORMS, layer_shapes, param_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.trees import difference
from zflora_jax.nn.quantize_model import check_tables, group_of, kernel_axes, stored_as
from zflora_jax.ops.quantized import QuantizedArray, quantize
from zflora_jax.parallel.devices import on_cpu
from zflora_jax.parallel.sharding import specs

# One layer: native name -> Hugging Face name. PEFT uses the same module names.
LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attn/{kernel}/kernel": f"self_attn.{kernel}_proj.weight" for kernel in "qkvo"},
    **{f"attn/{kernel}/bias": f"self_attn.{kernel}_proj.bias" for kernel in "qkv"},
    **{f"attn/{norm}/scale": f"self_attn.{norm}.weight" for norm in QK_NORMS},
    **{f"mlp/{kernel}/kernel": f"mlp.{kernel}_proj.weight" for kernel in ("gate", "up", "down")},
}
TOP_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}

# Buffers in old files; transformers computes them from the config and never reads them.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")  # the start of a layer's tensors, with its index


@dataclass(frozen=True)
class Place:
    """The place of a Hugging Face tensor in the native tree."""

    leaf: str  # name of the native leaf
    layer: int | None  # index in a stacked leaf ("layers/..."), else None
    shape: tuple[int, ...]  # native, without the layer axis
    # Number of leading input axes of a kernel; 0 for a bias; None for norm gains and the embedding,
    # which have the same layout in both.
    in_axes: int | None = None
    tensor: str = ""  # name of the tensor

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        if self.in_axes is None:
            return self.shape
        writes = math.prod(self.shape[self.in_axes :])
        return (writes, math.prod(self.shape[: self.in_axes])) if self.in_axes else (writes,)

    def to_native(self, array: np.ndarray) -> np.ndarray:
        """A view of the tensor in native layout."""
        return array if self.in_axes is None else array.T.reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_native`; a view if the axes allow it."""
        return array if self.in_axes is None else array.reshape(self.hf_shape[::-1]).T


@functools.lru_cache(maxsize=16)
def hf_table(config: LlamaConfig) -> Mapping[str, Place]:
    """Hugging Face name -> Place, for every parameter of an unpacked model."""
    shapes = param_shapes(config)
    table = {
        name: Place(leaf, None, shapes[leaf], 1 if leaf == "lm_head/kernel" else None, name)
        for leaf, name in TOP_NAMES.items()
        if leaf in shapes
    }
    for layer in range(config.num_layers):
        for native, (shape, in_axes) in layer_shapes(config).items():
            stacked = config.execution.scan_layers
            leaf = f"layers/{native}" if stacked else f"layers_{layer}/{native}"
            name = f"model.layers.{layer}.{LAYER_NAMES[native]}"
            table[name] = Place(leaf, layer if stacked else None, shape, in_axes, name)
    return table


def hf_shapes(table: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, of all tensors of a table."""
    return {name: place.hf_shape for name, place in table.items()}


def check_layer_count(names: Iterable[str], num_layers: int, what: str) -> None:
    """Raises CheckpointError if the tensors of the file `what` have fewer layers than its config.
    This is checked before a table of so many layers is built.
    """
    found = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    if num_layers > len(found):
        raise CheckpointError(
            f"{what}: its config says {num_layers} layers, its tensors belong to {len(found)}."
        )


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    what: str,
    source: str,
) -> None:
    """Raises CheckpointError for missing, unexpected and misshapen tensors of the file `what`."""
    if diff := difference(wanted, given):
        raise CheckpointError(f"{what} does not hold the tensors of {source}:\n{diff}")
    pairs = ((name, tuple(given[name]), shape) for name, shape in wanted.items())
    wrong = [f"{name}: {found}, expected {shape}" for name, found, shape in pairs if found != shape]
    if wrong:
        more = f"\n... and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise CheckpointError(
            f"{what}: tensors of the wrong shape for {source}:\n" + "\n".join(wrong[:12]) + more
        )


def as_finite(array: np.ndarray, dtype: Any, name: str, what: str) -> np.ndarray:
    """Casts the tensor `name` of the file `what`; CheckpointError if it is not floating point, or a
    value is not finite in `dtype`.
    """
    if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise CheckpointError(
            f"{what}: {name} has dtype {array.dtype.name}; expected floating point. Quantised"
            " checkpoints have to be dequantised first."
        )
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        finite = np.isfinite(array).all()
        wrong = f"values beyond the range of {np.dtype(dtype).name}"
        wrong = wrong if finite else "NaN or infinite values"
        raise CheckpointError(f"{what}: {name} holds {wrong}.")
    return cast


Members = list[tuple[str, Place]]  # names and places of a leaf's tensors
Read = Callable[[str, Place], Any]
"""(Hugging Face name, place) -> the part of the native leaf, as floats or codes."""


def gather(
    table: Mapping[str, Place],
    read: Read,
    mesh: Any = None,
    codes: Callable[[str, Members], Read | None] | None = None,
    *,
    fused: bool = False,
) -> dict[str, Any]:
    """Assembles the native leaves of a model, so that only the largest is in memory twice.

    Args:
      table: Hugging Face name -> Place.
      read: Reader of floats, in the data type of the leaf.
      mesh: Mesh to divide the leaves over; a process keeps only the blocks of its devices. None:
        whole, on the first device.
      codes: Function (leaf name, its places by name) -> reader of codes, or None for floats.
      fused: Whether the model is fused.
    """
    by_leaf: dict[str, Members] = {}
    for name, place in table.items():
        by_leaf.setdefault(place.leaf, []).append((name, place))

    leaves = {}
    for leaf, members in sorted(by_leaf.items()):
        reader = None if codes is None else codes(leaf, members)
        leaves[leaf] = _assembled(leaf, members, reader or read, mesh, fused)
    return leaves


def _assembled(leaf: str, members: Members, read: Read, mesh: Any, fused: bool) -> Any:
    """Makes one leaf of its tensors, each of which is read once and whole."""
    layers = () if members[0][1].layer is None else (len(members),)
    parts: list[_Blocks] = []
    for name, place in members:
        rows, tree = jax.tree.flatten(read(name, place))
        if not parts:
            whole = [jax.ShapeDtypeStruct((*layers, *row.shape), row.dtype) for row in rows]
            where: list[Any] = [None] * len(rows)
            if mesh is not None:
                found = specs(leaf, jax.tree.unflatten(tree, whole), mesh, fused=fused)
                where = [NamedSharding(mesh, spec) for spec in jax.tree.leaves(found)]
            parts = [_Blocks(x.shape, x.dtype, at) for x, at in zip(whole, where, strict=True)]
        for part, row in zip(parts, rows, strict=True):
            part.fill(place.layer, np.asarray(row))
    return jax.tree.unflatten(tree, [part.array() for part in parts])


class _Blocks:
    """An array in blocks; a process has those of its devices in the sharding `where`."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, where: Any) -> None:
        self._shape, self._where = shape, where
        indices = [(slice(None),) * len(shape)]
        if where is not None:
            indices = where.addressable_devices_indices_map(shape).values()
        bounds = set(map(self._bounds, indices))
        self._blocks = {b: np.empty([stop - start for start, stop in b], dtype) for b in bounds}

    def _bounds(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(cut.indices(n)[:2] for cut, n in zip(index, self._shape, strict=True))

    def fill(self, layer: int | None, row: np.ndarray) -> None:
        """Writes a layer of a stacked array, or all of an array without layers."""
        for bounds, block in self._blocks.items():
            part = row[tuple(slice(*pair) for pair in bounds[-row.ndim :])]
            if layer is None:
                block[...] = part
            elif bounds[0][0] <= layer < bounds[0][1]:
                block[layer - bounds[0][0]] = part

    def array(self) -> jax.Array:
        """The jax array."""
        if self._where is None:
            return jax.device_put(*self._blocks.values())
        at = lambda index: self._blocks[self._bounds(index)]  # noqa: E731
        return jax.make_array_from_callback(self._shape, self._where, at)


# --- quantised leaves -----------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedLeaves:
    """The readers of the leaves that a loader stores as codes: `codes` of `gather`."""

    config: LlamaConfig
    how: QuantizeConfig  # types of the leaves
    read: Read  # reader of floats
    # A tensor's type in the file, and the reason not to keep its blocks: "" if the type is the
    # reason, None if they can be kept.
    in_file: Callable[[str, Place], tuple[str, str | None]] = lambda *_: ("numbers", "")
    blocks: Callable[[str, Place], QuantizedArray] | None = None  # their reader, in native layout
    # Leaves to keep that are read as floats instead -> reasons
    left: dict[str, str] = field(default_factory=dict)

    @property
    def left_text(self) -> str:
        """The modules in `left`, by reason."""
        modules: dict[str, dict[str, None]] = {}
        for leaf, reason in self.left.items():
            modules.setdefault(reason, {})[leaf.split("/")[-2]] = None
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in modules.items())

    def __post_init__(self) -> None:
        check_tables(self.config, self.how)

    def __call__(self, leaf: str, members: Members) -> Read | None:
        kind = stored_as(leaf, self.how)
        if kind == "none":
            return None
        if kind == "keep":
            reason = self._why_not_kept(members)
            if reason is not None:
                self.left[leaf] = reason
            return self.blocks if reason is None else None
        axes = kernel_axes(self.config, leaf)
        group = group_of(leaf, kind, self.how, members[0][1].shape[-axes["writes"] - 1])
        return lambda name, place: quantized(self.read(name, place), kind, group=group, **axes)

    def _why_not_kept(self, members: Members) -> str | None:
        """The types of a leaf's tensors with the reasons not to keep them; None if they can be."""
        found = dict(self.in_file(name, place) for name, place in members)
        reasons = {why for why in found.values() if why}
        if set(found.values()) == {None}:
            if len(found) == 1:
                return None
            reasons = {", each in some of the layers, which are one array"}
        return ", ".join(sorted(found)) + "".join(sorted(reasons))


_quantize = jax.jit(quantize, static_argnames=("kind", "reads", "writes", "group"))


def quantized(x: np.ndarray, kind: str, *, reads: int, writes: int, group: int) -> QuantizedArray:
    """`quantize` on the CPU: GPUs may round differently, and codes identify the base of a run."""
    with on_cpu():
        return _quantize(x, kind, reads=reads, writes=writes, group=group)


def whole_groups(place: Place, group: int) -> bool:
    """True if no group of a tensor holds values of two heads."""
    return place.in_axes is None or place.shape[place.in_axes - 1] % group == 0


def native_blocks(blocks: QuantizedArray, place: Place) -> QuantizedArray:
    """Converts codes and scales [out, in], grouped along the last axis, to a kernel [*in, *out],
    for a place with `whole_groups`; a table stays as it is.
    """
    reads = place.in_axes
    if reads is None:
        return blocks
    inner = place.shape[reads - 1]  # the last of the input axes

    def native(part: np.ndarray, each: int) -> np.ndarray:
        inputs = (*place.shape[: reads - 1], inner // each)
        return part.T.reshape(*inputs, *place.shape[reads:])

    axes = {"reads": reads, "writes": len(place.shape) - reads, "base": inner}
    return blocks.map(lambda codes: native(codes, 1), lambda x: native(x, blocks.group), **axes)
