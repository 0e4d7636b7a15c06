"""Parts of a kernel, float or quantised: written and read in place, so that no number of the base
is computed anew. A quantised adapter block has its own groups next to the base's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core import trees
from zflora_jax.ops.quantized import Array, QuantizedArray, dequantize, group_counts, quantize

# (array, values, {axis: span}) -> the array with the values written there.
Write = Callable[[Array, Array, dict[int, slice]], Array]


def quantized_names(params: trees.Tree) -> list[str]:
    """The names of a tree's leaves that are stored as codes."""
    leaves = trees.flatten(params).items()
    return [name for name, leaf in leaves if isinstance(leaf, QuantizedArray)]


def padded(part: Array, pads: dict[int, int], value: float = 0) -> Array:
    """An array with `value` at the end of axes, {axis: count}."""
    widths = [(0, pads.get(a, 0)) for a in range(-part.ndim, 0)]
    return jnp.pad(part, widths, constant_values=value)


def widen(leaf: Any, axis: int, inputs: int, outputs: int) -> Any:
    """A kernel with more inputs and outputs, all zero; a quantised one's inputs in new groups.

    Args:
      leaf: The kernel, float or quantised.
      axis: Its input axis, negative; outputs are added to the last axis.
      inputs: Number of added inputs.
      outputs: Number of added outputs.
    """
    if not isinstance(leaf, QuantizedArray):
        return padded(leaf, {axis: inputs, -1: outputs})
    groups = {axis: len(group_counts(inputs, 0, leaf.group)), -1: outputs}
    return replace(
        leaf,
        codes=padded(leaf.codes, {axis: inputs, -1: outputs}),
        scales=padded(leaf.scales, groups),
        mins=None if leaf.mins is None else padded(leaf.mins, groups),
    )


def read_part(leaf: Any, axis: int, reads: slice, writes: slice) -> Array:
    """The inputs `reads` along `axis` and outputs `writes` of a kernel, float32. The inputs are all
    of the base's or all of an adapter's.
    """
    if isinstance(leaf, QuantizedArray):
        return dequantize(cut(leaf, extra=bool(reads.start), outputs=writes))
    found: Array = leaf[_index({axis: reads, -1: writes}, leaf.ndim)].astype(jnp.float32)
    return found


def write_part(leaf: Any, values: Array, axis: int, reads: slice, writes: slice, do: Write) -> Any:
    """A kernel with float32 `values` written by `do` where `read_part` reads; quantised first if
    the kernel is.
    """
    if not isinstance(leaf, QuantizedArray):
        return do(leaf, values, {axis: reads, -1: writes})
    return paste(leaf, quantize_block(values, leaf), do, extra=bool(reads.start), outputs=writes)


def corner(leaf: Any, shape: tuple[int, ...]) -> Any:
    """The base's part of a widened leaf, of this shape."""
    if isinstance(leaf, QuantizedArray):
        outputs = slice(0, shape[-1]) if leaf.writes else slice(None)
        return cut(leaf, extra=False, outputs=outputs)
    return leaf[tuple(slice(0, n) for n in shape)]


def scaled_outputs(leaf: Any, scale: Array) -> Any:
    """A leaf, float or quantised, with its last axis times `scale`, powers of two: exact, and codes
    stay as they are.
    """
    scale = scale.reshape((1,) * (leaf.ndim - 1) + scale.shape)
    if not isinstance(leaf, QuantizedArray):
        return leaf * scale.astype(leaf.dtype)
    # The range of float16 is too small for them.
    wide = jnp.float32 if leaf.scales.dtype == jnp.float16 else leaf.scales.dtype
    mins = None if leaf.mins is None else leaf.mins.astype(wide) * scale.astype(wide)
    return replace(leaf, scales=leaf.scales.astype(wide) * scale.astype(wide), mins=mins)


def filled(leaf: Any, shape: tuple[int, ...]) -> Any:
    """A leaf with zeros behind it along every axis, up to `shape`; a quantised kernel also with
    zeros up to whole groups.
    """
    if not isinstance(leaf, QuantizedArray):
        return _filled(leaf, shape)
    axis, whole = leaf.ndim + leaf.axis, list(shape)
    if leaf.group:
        whole[axis] += -whole[axis] % leaf.group

    def scales(part: Array) -> Array:
        groups = whole[axis] // leaf.group if leaf.group else part.shape[axis]
        # Inputs before the groups' axis have nothing behind them.
        return _filled(part, (*part.shape[:axis], groups, *whole[axis + 1 :]))

    mins = None if leaf.mins is None else scales(leaf.mins)
    return replace(leaf, codes=_filled(leaf.codes, whole), scales=scales(leaf.scales), mins=mins)


def _filled(part: Array, shape: Any) -> Array:
    pads = [(0, want - have) for want, have in zip(shape, part.shape, strict=True)]
    return jnp.pad(part, pads)


def quantize_block(block: Array, like: QuantizedArray) -> QuantizedArray:
    """Quantises an adapter's block of a kernel as the kernel is.

    Args:
      block: [*layers, *inputs, *outputs] float32; its inputs begin a group, and zeros fill the last
        one up.
      like: The kernel, or any part of it.
    """
    axis, width = block.ndim + like.axis, block.shape[like.axis]
    whole = padded(block, {like.axis: -width % like.group if like.group else 0})
    wide = quantize(whole, like.kind, reads=like.reads, writes=like.writes, group=like.group)
    codes = jax.lax.slice_in_dim(wide.codes, 0, width, axis=axis)
    return replace(wide, codes=codes, base=width)


def group_span(w: QuantizedArray, extra: bool) -> slice:
    """The groups along `axis` that hold the base's inputs, or an adapter's."""
    own = len(group_counts(w.base, w.base, w.group))
    return slice(own, None) if extra else slice(own)


def _regions(w: QuantizedArray, extra: bool, outputs: slice) -> tuple[dict[int, slice], ...]:
    """{axis: span} of the base's inputs, or an adapter's, in the codes and in the scales."""
    spans = slice(w.base, None) if extra else slice(w.base), group_span(w, extra)
    return tuple({w.axis: span, **({-1: outputs} if w.writes else {})} for span in spans)


def _index(spans: dict[int, slice], ndim: int) -> tuple[slice, ...]:
    return tuple(spans.get(a, slice(None)) for a in range(-ndim, 0))


def cut(w: QuantizedArray, *, extra: bool, outputs: slice = slice(None)) -> QuantizedArray:
    """A block of a kernel.

    Args:
      w: The kernel.
      extra: Whether the block's inputs are an adapter's, else the base's.
      outputs: The block's outputs, of the last axis.
    """
    codes, scales = (_index(spans, w.ndim) for spans in _regions(w, extra, outputs))
    found = w.codes[codes]
    mins = None if w.mins is None else w.mins[scales]
    return replace(w, codes=found, scales=w.scales[scales], mins=mins, base=found.shape[w.axis])


def paste(
    w: QuantizedArray, block: QuantizedArray, write: Write, *, extra: bool, outputs: slice
) -> QuantizedArray:
    """`w` with a block written in; the inverse of `cut`.

    Args:
      w: The kernel.
      block: The block, of `quantize_block`.
      write: How arrays are written, such as `ops.copies.write_divided`.
      extra: As in `cut`, as is outputs.
    """
    codes, scales = _regions(w, extra, outputs)
    mins = None if w.mins is None or block.mins is None else write(w.mins, block.mins, scales)
    return replace(
        w,
        codes=write(w.codes, block.codes, codes),
        scales=write(w.scales, block.scales, scales),
        mins=mins,
    )
