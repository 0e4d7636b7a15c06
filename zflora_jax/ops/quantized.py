"""Quantised kernels and tables: codes and scales in place of floats.

A type of codes is a row of `KINDS`. A scale is shared by a group of inputs, along the axis that a
product sums over. A fused adapter's inputs have separate groups, so the base's codes stay. Every
operation here equals the one on the floats of `dequantize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from zflora_jax.core import trees
from zflora_jax.core.fields import require, require_in

Array = jax.Array

# The quantiles of a normal distribution in QLoRA's NF4 (arXiv 2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Kind:
    """A type of codes.

    Attributes:
      codes: Data type of the codes, with 8 or 4 bits.
      group: Default number of inputs that share a scale; 0 for all.
      groups: Allowed values of group.
      scales: Data type of the scales.
      has_mins: Whether a float is code x scale + min, not code x scale.
      table: Value of each code; None if it is the code itself.
    """

    codes: str
    group: int
    groups: tuple[int, ...]
    scales: str
    has_mins: bool = False
    table: tuple[float, ...] | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.codes[-1])


_GROUPS = (32, 64, 128)
KINDS = {
    "int8": Kind("int8", 0, (0, *_GROUPS), "float32"),
    "int4": Kind("int4", 64, _GROUPS, "bfloat16"),
    "nf4": Kind("uint4", 64, _GROUPS, "bfloat16", table=NF4),
    # GGUF's blocks (llama.cpp), as a file has them.
    "q8_0": Kind("int8", 32, (32,), "float16"),
    "q4_0": Kind("int4", 32, (32,), "float16"),
    "q4_1": Kind("uint4", 32, (32,), "float16", has_mins=True),
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "mins"],
    meta_fields=["kind", "reads", "writes", "group", "base", "inner"],
)
@dataclass(frozen=True)
class QuantizedArray:
    """A kernel or table as codes and scales, in place of a float leaf of a parameter tree.

    Attributes:
      codes: [*layers, *inputs, *outputs], of jax or numpy; a table [V, d] has its inputs last.
      scales: Scales on the same axes, with groups along the last input axis. If all inputs are one
        group, the other input axes have size 1.
      mins: Minima in the form of the scales; None if the type has none.
      kind: A key of `KINDS`.
      reads: Number of input axes.
      writes: Number of output axes.
      group: Inputs of a group; 0 for one group of all, and a second for a fused adapter's.
      base: Inputs of the last input axis that are the base's; no group mixes them with others.
      inner: Size of the last input axis if several are flattened, as packed heads are; else 0.
    """

    codes: Any
    scales: Any
    mins: Any
    kind: str
    reads: int = 1
    writes: int = 1
    group: int = 0
    base: int = 0
    inner: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the floats."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the codes."""
        return len(self.codes.shape)

    @property
    def dtype(self) -> str:
        """The type of codes, in place of a float leaf's dtype."""
        return self.kind

    @property
    def nbytes(self) -> int:
        """Bytes on a GPU or TPU."""
        return bytes_of(self)

    @property
    def axis(self) -> int:
        """The axis that groups run along, negative."""
        return -self.writes - 1

    @property
    def one_scale(self) -> bool:
        """True if an output has one scale for all inputs of the base, times plain integers."""
        return not self.group and KINDS[self.kind].table is None

    @property
    def inputs(self) -> int:
        """Number of inputs that an output sums."""
        end = self.ndim - self.writes
        return math.prod(self.shape[end - self.reads : end])

    def astype(self, dtype: DTypeLike) -> Array:
        """The floats, as `dequantize` computes them."""
        return dequantize(self, dtype)

    def map(
        self, codes: Callable[..., Any], scales: Callable[..., Any], *others: Any, **changes: Any
    ) -> QuantizedArray:
        """Applies `codes` to the codes and `scales` to the scales and the mins, together with
        those of `others`, and changes fields.
        """
        every = (self, *others)
        return replace(
            self,
            codes=codes(*(w.codes for w in every)),
            scales=scales(*(w.scales for w in every)),
            mins=None if self.mins is None else scales(*(w.mins for w in every)),
            **changes,
        )


def bytes_of(leaf: Any) -> int:
    """Bytes of a leaf on a GPU or TPU, where two codes of 4 bits share a byte."""
    parts = jax.tree.leaves(leaf)
    bits = (math.prod(x.shape) * jax.dtypes.itemsize_bits(np.dtype(x.dtype)) for x in parts)
    return sum(-(-count // 8) for count in bits)


def check_kind(kind: str, group: int | None) -> int:
    """The group size, `group` or the type's default; ConfigError for an unknown type or size."""
    require_in(KINDS, kind, f"quantised type {kind!r}")
    row = KINDS[kind]
    require(
        group is None or group in row.groups,
        f"groups of {group} inputs: {kind} allows {', '.join(map(str, row.groups))}"
        f"{' (0: all inputs)' if 0 in row.groups else ''}.",
    )
    return row.group if group is None else group


def group_count(size: int, group: int) -> int:
    """Number of groups of `size` inputs."""
    return -(-size // (group or size)) if size else 0


def dequantize(w: QuantizedArray, dtype: DTypeLike = jnp.float32) -> Array:
    """The floats of a quantised array, computed in float32 and cast once."""
    values = code_values(w.kind, w.codes) * spread(w, w.scales)
    return (values if w.mins is None else values + spread(w, w.mins)).astype(dtype)


def code_values(kind: str, codes: Array) -> Array:
    """The values of codes before they are scaled, float32."""
    table = KINDS[kind].table
    if table is None:
        return codes.astype(jnp.float32)

    def looked_up(codes: Array) -> Array:
        return jnp.take(jnp.asarray(table, jnp.float32), codes, mode="clip")

    def chosen(codes: Array) -> Array:
        values = jnp.full(codes.shape, table[0], jnp.float32)
        for code, value in enumerate(table[1:], 1):
            values = jnp.where(codes == code, jnp.float32(value), values)
        return values

    # XLA's TPU compiler cannot fuse a lookup into the product that reads it, nor its GPU compiler
    # a chain of choices.
    return jax.lax.platform_dependent(codes.astype(jnp.int32), tpu=chosen, default=looked_up)


def base_inputs(w: QuantizedArray) -> np.ndarray:
    """A bool for each input, True for the base's."""
    # A constant: otherwise XLA's GPU compiler would run a kernel for it in every token.
    width = w.shape[w.axis]
    return np.arange(width) % (w.inner or width) < w.base


def spread(w: QuantizedArray, scales: Array) -> Array:
    """`scales` of groups repeated for each code, float32; broadcasts against the codes."""
    scales, width, axis = scales.astype(jnp.float32), w.shape[w.axis], w.ndim + w.axis
    if scales.shape[axis] == 1:
        return scales
    if not w.group:  # the base's inputs, and an adapter's
        is_base = base_inputs(w).reshape([-1 if a == axis else 1 for a in range(w.ndim)])
        first, second = jnp.split(scales, 2, axis=axis)
        return jnp.where(is_base, first, second)
    each, own = w.group, -(-w.base // w.group)

    def repeated(part: Array, each: int, size: int) -> Array:
        wide = (*part.shape[: axis + 1], each, *part.shape[axis + 1 :])
        flat = jnp.broadcast_to(jnp.expand_dims(part, axis + 1), wide)
        flat = flat.reshape(*part.shape[:axis], -1, *part.shape[axis + 1 :])
        return jax.lax.slice_in_dim(flat, 0, size, axis=axis)

    if own == scales.shape[axis] or each * scales.shape[axis] == width:
        return repeated(scales, each, width)
    base, rest = jnp.split(scales, [own], axis=axis)
    extra = width - w.base
    parts = repeated(base, each, w.base), repeated(rest, each, extra)
    return jnp.concatenate(parts, axis=axis)


def quantize(
    x: Array, kind: str, *, reads: int = 1, writes: int = 1, group: int | None = None
) -> QuantizedArray:
    """Quantises a kernel or table [*layers, *inputs, *outputs], each group separately: int8, int4
    and nf4 as qwix does, GGUF's blocks as llama.cpp does. The arguments are fields of the result.
    ConfigError for an unknown type or group size, or groups that do not divide the inputs.
    """
    group, axis = check_kind(kind, group), x.ndim - writes - 1
    width = x.shape[axis]
    require(
        not group or width % group == 0,
        f"groups of {group} do not divide an axis of {width} inputs; {kind} has groups of"
        f" {KINDS[kind].groups}.",
    )
    x = x.astype(jnp.float32)
    if kind.startswith("q"):
        codes, scales, mins = _gguf_blocks(x, kind, group, axis)
    else:
        import qwix

        shared = (axis,) if group else range(axis - reads + 1, axis + 1)
        found = qwix.quantize(
            x,
            kind if KINDS[kind].table else KINDS[kind].codes,
            channelwise_axes=[a for a in range(x.ndim) if a not in shared],
            tiled_axes={axis: group} if group else {},
        )
        codes, scales, mins = found.qvalue, found.scale, None
    scales = scales.astype(KINDS[kind].scales)
    return QuantizedArray(codes, scales, mins, kind, reads, writes, group, width)


def _gguf_blocks(x: Array, kind: str, group: int, axis: int) -> tuple[Array, Array, Array | None]:
    """Codes, scales and mins of x in blocks along `axis`."""
    blocks = x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])
    inside = axis + 1
    largest, mins = jnp.max(jnp.abs(blocks), inside, keepdims=True), None
    half = partial(jax.lax.convert_element_type, new_dtype=jnp.float16)
    if kind == "q8_0":
        scale, high = largest / 127, 127
    elif kind == "q4_0":  # the value furthest from zero becomes -8 times the scale
        first = jnp.argmax(jnp.abs(blocks), inside, keepdims=True)
        scale, high = jnp.take_along_axis(blocks, first, inside) / -8, 7
    else:
        least = jnp.min(blocks, inside, keepdims=True)
        scale, high = (jnp.max(blocks, inside, keepdims=True) - least) / 15, 15
        blocks, mins = blocks - least, half(jnp.squeeze(least, inside))
    codes = blocks * jnp.where(scale != 0, 1 / jnp.where(scale != 0, scale, 1.0), 0.0)
    # Halves go away from zero, as C rounds them; 4-bit ones go up, as codes are counted from -8.
    half_up = jnp.copysign(jnp.float32(0.5), codes)
    codes = jnp.trunc(codes + half_up) if kind == "q8_0" else jnp.floor(codes + 0.5)
    codes = jnp.minimum(codes, high).reshape(x.shape).astype(KINDS[kind].codes)
    return codes, half(jnp.squeeze(scale, inside)), mins


# --- leaves, float or quantised -------------------------------------------------------------------

# (array, values, {axis: span}) -> the array with the values written there.
Write = Callable[[Array, Array, dict[int, slice]], Array]


def is_finite(leaf: Any) -> Array:
    """True if all floats of a leaf are finite; for codes, if their scales and minima are."""
    parts = [part for part in jax.tree.leaves(leaf) if jnp.issubdtype(part.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(part).all() for part in parts]).all()


def quantized_names(params: trees.Tree) -> list[str]:
    """The names of a tree's leaves that are stored as codes."""
    leaves = trees.flatten(params).items()
    return [name for name, leaf in leaves if isinstance(leaf, QuantizedArray)]


def each_part(change: Callable[..., Array], leaf: Any, *others: Any) -> Any:
    """A leaf with `change(part, each, *parts of others)` in place of each part: its floats or codes
    (each = 1), its scales and its minima (each: the inputs of a group, 0 for all).
    """
    if not isinstance(leaf, QuantizedArray):
        return change(leaf, 1, *others)

    def of(each: int) -> Callable[..., Array]:
        return lambda part, *more: change(part, each, *more)

    return leaf.map(of(1), of(leaf.group), *others)


def padded(part: Array, pads: dict[int, int], value: float = 0) -> Array:
    """An array with `value` at the end of axes, {axis: count}."""
    widths = [(0, pads.get(a, 0)) for a in range(-part.ndim, 0)]
    return jnp.pad(part, widths, constant_values=value)


def widen(leaf: Any, axis: int, inputs: int, outputs: int) -> Any:
    """A kernel with zeros added: inputs along `axis`, in new groups, and outputs along the last
    axis. axis: Its last input axis, negative.
    """
    return each_part(
        lambda part, each: padded(part, {axis: group_count(inputs, each), -1: outputs}), leaf
    )


def _spans(axis: int, reads: slice, writes: slice, each: int) -> dict[int, slice]:
    """{axis: span} of inputs and outputs in a part; inputs are all the base's or an adapter's."""
    stop = None if reads.stop is None else group_count(reads.stop, each)
    inputs = {axis: slice(group_count(reads.start or 0, each), stop)}
    return inputs | ({-1: writes} if axis != -1 else {})


def cut(leaf: Any, axis: int, reads: slice, writes: slice = slice(None)) -> Any:
    """Cuts the inputs `reads` along `axis`, all the base's or all an adapter's, and the outputs
    `writes` from a kernel.
    """

    def taken(part: Array, each: int) -> Array:
        spans = _spans(axis, reads, writes, each)
        return part[tuple(spans.get(a, slice(None)) for a in range(-part.ndim, 0))]

    found = each_part(taken, leaf)
    return replace(found, base=found.shape[axis]) if isinstance(leaf, QuantizedArray) else found


def write_part(leaf: Any, values: Array, axis: int, reads: slice, writes: slice, do: Write) -> Any:
    """A kernel with float32 `values` written where `cut` reads, quantised like the kernel."""
    new = quantize_block(values, leaf) if isinstance(leaf, QuantizedArray) else values
    return each_part(
        lambda part, each, new: do(part, new, _spans(axis, reads, writes, each)), leaf, new
    )


def corner(leaf: Any, shape: tuple[int, ...]) -> Any:
    """The base's part of a widened leaf, of this shape."""
    if isinstance(leaf, QuantizedArray):
        return cut(leaf, leaf.axis, slice(0, leaf.base), slice(0, shape[-1]))
    return leaf[tuple(slice(0, n) for n in shape)]


def scaled_outputs(leaf: Any, scale: Array) -> Any:
    """A leaf with its last axis times `scale`, powers of two: exact, and codes stay."""
    scale = scale.reshape((1,) * (leaf.ndim - 1) + scale.shape)
    if not isinstance(leaf, QuantizedArray):
        return leaf * scale.astype(leaf.dtype)
    # The range of float16 is too small for them.
    wide = jnp.float32 if leaf.scales.dtype == jnp.float16 else leaf.scales.dtype
    return leaf.map(lambda codes: codes, lambda part: part.astype(wide) * scale.astype(wide))


def filled(leaf: Any, shape: Sequence[int]) -> Any:
    """A leaf with zeros behind it along every axis, up to `shape`, and up to whole groups."""

    def fill(part: Array, each: int) -> Array:
        wanted = list(shape)
        if isinstance(leaf, QuantizedArray):
            axis = leaf.ndim + leaf.axis
            wanted[axis] += -wanted[axis] % (leaf.group or 1)
            if each != 1:  # inputs before the groups' axis get no padding
                groups = wanted[axis] // each if each else part.shape[axis]
                wanted[: axis + 1] = *part.shape[:axis], groups
        return jnp.pad(part, [(0, b - a) for a, b in zip(part.shape, wanted, strict=True)])

    return each_part(fill, leaf)


def quantize_block(block: Array, like: QuantizedArray) -> QuantizedArray:
    """Quantises an adapter's block [*layers, *inputs, *outputs] float32, or any part of it, like
    the kernel `like`. Its inputs begin a group, and zeros fill the last group.
    """
    axis, width = block.ndim + like.axis, block.shape[like.axis]
    whole = padded(block, {like.axis: -width % like.group if like.group else 0})
    wide = quantize(whole, like.kind, reads=like.reads, writes=like.writes, group=like.group)
    codes = jax.lax.slice_in_dim(wide.codes, 0, width, axis=axis)
    return replace(wide, codes=codes, base=width)
