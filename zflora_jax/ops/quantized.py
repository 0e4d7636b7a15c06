"""Quantised kernels and tables: codes and scales in place of floats.

A type of codes is a row of `KINDS`. Groups of codes share a scale; they run along the axis that a
product sums over, so that a fused adapter's inputs have their own groups and a base's codes stay as
they are. The plain operation of everything here is `dequantize`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from zflora_jax.core.fields import nearest, require

Array = jax.Array

# The quantiles of a normal distribution that QLoRA's NF4 takes (arXiv 2305.14314, appendix E).
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
      codes: Data type of the codes, of 8 or 4 bits.
      group: Default number of inputs that share a scale; 0 for all.
      groups: Allowed values of group.
      scales: Data type of the scales.
      has_mins: A float is code x scale + min, else code x scale.
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
    """A kernel or table as codes and scales: a node of a parameter tree where a float one is a
    leaf. It stands for the floats of `dequantize`.

    Attributes:
      codes: [*layers, *inputs, *outputs], of jax or numpy; the inputs of a table [V, d] are its
        last axis.
      scales: The same axes, with the groups of the last input axis in place of that axis. If one
        group is all inputs, the other input axes have size 1.
      mins: As scales; None if the type has none.
      kind: A key of `KINDS`.
      reads: Number of input axes.
      writes: Number of output axes.
      group: Inputs of a group; 0 for one group of all, and a second one of a fused adapter's.
      base: Inputs of the last input axis that are the base's. No group holds both the base's and an
        adapter's.
      inner: Size of the last input axis if several are flattened, as heads are when packed; else 0.
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
        """Bytes on a GPU or TPU; see `bytes_of`."""
        return sum(bytes_of(part) for part in jax.tree.leaves(self))

    @property
    def axis(self) -> int:
        """The axis that groups run along, negative."""
        return -self.writes - 1

    @property
    def one_scale(self) -> bool:
        """Whether an output has one scale for all inputs of the base, times plain integers."""
        return not self.group and KINDS[self.kind].table is None

    @property
    def inputs(self) -> int:
        """Number of inputs that an output sums."""
        return math.prod(self.shape[self.ndim - self.writes - self.reads : self.ndim - self.writes])


def bytes_of(leaf: Any) -> int:
    """Bytes of a leaf on a GPU or TPU, where two codes of 4 bits share a byte (on a CPU they do
    not).
    """
    if isinstance(leaf, QuantizedArray):
        return leaf.nbytes
    count = math.prod(leaf.shape)
    if str(leaf.dtype) in ("int4", "uint4"):
        return -(-count // 2)
    return count * int(np.dtype(leaf.dtype).itemsize)


def check_kind(kind: str, group: int | None) -> int:
    """The group size, `group` or the type's default; ConfigError for an unknown type or size."""
    require(kind in KINDS, f"quantised kind {kind!r}: {nearest(kind, KINDS)}.")
    row = KINDS[kind]
    require(
        group is None or group in row.groups,
        f"groups of {group} inputs: {kind} has {', '.join(map(str, row.groups))}"
        f"{' (0: all inputs)' if 0 in row.groups else ''}.",
    )
    return row.group if group is None else group


def group_counts(width: int, base: int, group: int) -> list[int]:
    """Number of inputs in each group, of `width` inputs whose first `base` are the base's."""

    def counts(size: int) -> list[int]:
        each = group or size
        return [min(each, size - start) for start in range(0, size, each)] if size else []

    return counts(base) + counts(width - base)


def dequantize(w: QuantizedArray, dtype: DTypeLike = jnp.float32) -> Array:
    """The floats of a quantised array, computed in float32 and cast once."""
    values = code_values(w.kind, w.codes) * spread(w, w.scales)
    return (values if w.mins is None else values + spread(w, w.mins)).astype(dtype)


def float_values(leaf: Any) -> Array:
    """The floats of a leaf: itself, or what a quantised one stands for."""
    return dequantize(leaf) if isinstance(leaf, QuantizedArray) else leaf


def code_values(kind: str, codes: Array) -> Array:
    """The values of codes before they are scaled, float32."""
    table = KINDS[kind].table
    if table is None:
        return codes.astype(jnp.float32)

    def looked_up(codes: Array) -> Array:
        return jnp.take(jnp.asarray(table, jnp.float32), codes, mode="clip")

    # On a TPU a lookup is not fused into the product that reads it, on a GPU a chain of choices is
    # not (docs/models.md).
    return jax.lax.platform_dependent(
        codes.astype(jnp.int32), tpu=partial(_chosen, table), default=looked_up
    )


def _chosen(table: tuple[float, ...], codes: Array) -> Array:
    """The value of each code, by a chain of choices."""
    values = jnp.full(codes.shape, table[0], jnp.float32)
    for code, value in enumerate(table[1:], 1):
        values = jnp.where(codes == code, jnp.float32(value), values)
    return values


def base_inputs(w: QuantizedArray) -> np.ndarray:
    """A bool for each input, True for the base's; a constant, because XLA's GPU compiler would make
    a kernel of it in every token.
    """
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
    """Quantises a kernel or table, each group separately.

    int8, int4 and nf4 are qwix's; GGUF's blocks are rounded as llama.cpp rounds them.

    Args:
      x: [*layers, *inputs, *outputs], float.
      kind: A key of `KINDS`.
      reads: Number of input axes.
      writes: Number of output axes.
      group: Inputs of a group, along the last input axis; None for the default.

    Returns:
      A `QuantizedArray` whose inputs are all the base's.

    Raises:
      ConfigError: no such type or group size, or groups that do not divide the axis.
    """
    group, axis = check_kind(kind, group), x.ndim - writes - 1
    width = x.shape[axis]
    require(
        not group or width % group == 0,
        f"groups of {group} do not divide an axis of {width} inputs: choose"
        f" {', '.join(str(g) for g in KINDS[kind].groups if not g or width % g == 0) or 'another'}"
        f" for {kind}.",
    )
    inputs = range(axis - reads + 1, axis + 1)
    x = x.astype(jnp.float32)
    if kind.startswith("q"):
        codes, scales, mins = _gguf_blocks(x, kind, group, axis)
    else:
        import qwix

        whole = [a for a in range(x.ndim) if a not in inputs] if not group else None
        channels = [a for a in range(x.ndim) if a != axis] if whole is None else whole
        found = qwix.quantize(
            x,
            kind if KINDS[kind].table else KINDS[kind].codes,
            channelwise_axes=channels,
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
    elif kind == "q4_0":  # the number that is furthest from zero becomes -8 times the scale
        first = jnp.argmax(jnp.abs(blocks), inside, keepdims=True)
        scale, high = jnp.take_along_axis(blocks, first, inside) / -8, 7
    else:
        least = jnp.min(blocks, inside, keepdims=True)
        scale, high = (jnp.max(blocks, inside, keepdims=True) - least) / 15, 15
        blocks, mins = blocks - least, half(jnp.squeeze(least, inside))
    codes = blocks * jnp.where(scale != 0, 1 / jnp.where(scale != 0, scale, 1.0), 0.0)
    # Halves go away from zero, as C rounds them; of 4 bits up, as codes are counted from -8.
    half_up = jnp.copysign(jnp.float32(0.5), codes)
    codes = jnp.trunc(codes + half_up) if kind == "q8_0" else jnp.floor(codes + 0.5)
    codes = jnp.minimum(codes, high).reshape(x.shape).astype(KINDS[kind].codes)
    return codes, half(jnp.squeeze(scale, inside)), mins
