"""Blocks of a quantised kernel: an adapter's beside the base's, each in groups of its own, so that
they are written and taken out without a number being computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core import trees
from zflora_jax.ops.quantized import Array, QuantizedArray, group_counts, quantize


def quantized_names(params: trees.Tree) -> list[str]:
    """The leaves of a tree that are stored as codes, by name."""
    leaves = trees.flatten(params).items()
    return [name for name, leaf in leaves if isinstance(leaf, QuantizedArray)]


def widen(w: QuantizedArray, inputs: int, outputs: int) -> QuantizedArray:
    """`w` with `inputs` more inputs, in groups of their own, and `outputs` more outputs; all zero.

    The added inputs and outputs are an adapter's; the base's codes and scales stay as they are.
    """
    extra = len(group_counts(inputs, 0, w.group))

    def padded(part: Array, more: int) -> Array:
        pads = [(0, 0)] * part.ndim
        pads[w.axis], pads[-1] = (0, more), (0, outputs)
        return jnp.pad(part, pads)

    return replace(
        w,
        codes=padded(w.codes, inputs),
        scales=padded(w.scales, extra),
        mins=None if w.mins is None else padded(w.mins, extra),
    )


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


def quantize_block(block: Array, like: QuantizedArray) -> QuantizedArray:
    """Quantise an adapter's block of a kernel as the kernel is.

    Args:
      block: [*layers, *inputs, *outputs] float32; its inputs begin a group, and zeros fill the last
        one up.
      like: the kernel, or any part of it.
    """
    axis, width = block.ndim + like.axis, block.shape[like.axis]
    pads = [(0, 0)] * block.ndim
    pads[axis] = (0, -width % like.group if like.group else 0)
    wide = quantize(
        jnp.pad(block, pads),
        like.kind,
        reads=like.reads,
        writes=like.writes,
        group=like.group,
    )
    codes = jax.lax.slice_in_dim(wide.codes, 0, width, axis=axis)
    return replace(wide, codes=codes, base=width)


def group_span(w: QuantizedArray, extra: bool) -> slice:
    """Which groups, of those along `axis`, have the base's inputs, or an adapter's."""
    own = len(group_counts(w.base, w.base, w.group))
    return slice(own, None) if extra else slice(own)


def _regions(w: QuantizedArray, extra: bool, outputs: slice) -> tuple[dict[int, slice], ...]:
    """Where the base's inputs, or an adapter's, lie in the codes and in the scales: {axis:
    span}.
    """
    spans = slice(w.base, None) if extra else slice(w.base), group_span(w, extra)
    return tuple({w.axis: span, **({-1: outputs} if w.writes else {})} for span in spans)


def cut(w: QuantizedArray, *, extra: bool, outputs: slice = slice(None)) -> QuantizedArray:
    """A block of a kernel.

    Args:
      w: the kernel.
      extra: whether the block's inputs are an adapter's, else the base's.
      outputs: of the last axis.
    """

    def taken(part: Array, spans: dict[int, slice]) -> Array:
        return part[tuple(spans.get(a, slice(None)) for a in range(-part.ndim, 0))]

    codes, scales = _regions(w, extra, outputs)
    found = taken(w.codes, codes)
    mins = None if w.mins is None else taken(w.mins, scales)
    width = found.shape[w.axis]
    return replace(w, codes=found, scales=taken(w.scales, scales), mins=mins, base=width)


def paste(
    w: QuantizedArray,
    block: QuantizedArray,
    write: Callable[[Array, Array, dict[int, slice]], Array],
    *,
    extra: bool,
    outputs: slice,
) -> QuantizedArray:
    """`w` with a block written in; the inverse of `cut`.

    Args:
      w: the kernel.
      block: of `quantize_block`.
      write: (array, values, {axis: span}) -> the array with the values there, such as
        `ops.copies.write_divided`.
      extra: as in `cut`, as is outputs.
    """
    codes, scales = _regions(w, extra, outputs)
    mins = None if w.mins is None or block.mins is None else write(w.mins, block.mins, scales)
    return replace(
        w,
        codes=write(w.codes, block.codes, codes),
        scales=write(w.scales, block.scales, scales),
        mins=mins,
    )
