"""Quantised kernels in the layout for decode. Codes are moved, never computed anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS
from zflora_jax.core.trees import Tree
from zflora_jax.ops.quantized import KINDS, QuantizedArray, pair

Array = jax.Array


def group_multiple(params: Tree) -> int:
    """What the widths of fused streams are filled up to a multiple of, so that all groups are
    whole; 1 for a float model.
    """
    leaves = trees.flatten(params).values()
    return math.lcm(*(leaf.group or 1 for leaf in leaves if isinstance(leaf, QuantizedArray)))


def side_by_side(params: Tree) -> bool:
    """Whether the kernels that read one input can be one: all float, or of one kind and group
    size.
    """
    forms: dict[str, set[Any]] = {}
    for name, leaf in trees.flatten(params).items():
        if name.endswith("/kernel") and not name.startswith("lm_head"):
            layer, group, kernel, _ = name.split("/")
            form = (leaf.kind, leaf.group) if isinstance(leaf, QuantizedArray) else None
            forms.setdefault("/".join((layer, group, KERNELS[kernel][0])), set()).add(form)
    return all(len(found) == 1 for found in forms.values())


def filled_codes(w: QuantizedArray, shape: tuple[int, ...]) -> QuantizedArray:
    """A kernel of one layer with zeros behind it along every axis, up to `shape`, and behind the
    last group of inputs to make it whole.
    """
    axis = w.ndim + w.axis
    whole = list(shape)
    if w.group:
        whole[axis] += -whole[axis] % w.group

    def padded(part: Array, wanted: list[int]) -> Array:
        pads = [(0, want - have) for want, have in zip(wanted, part.shape, strict=True)]
        return jnp.pad(part, pads)

    def scales(part: Array) -> Array:
        wanted = list(part.shape)  # inputs before the groups' axis have nothing behind them
        wanted[axis] = whole[axis] // w.group if w.group else wanted[axis]
        return padded(part, wanted[: axis + 1] + whole[axis + 1 :])

    mins = None if w.mins is None else scales(w.mins)
    return replace(w, codes=padded(w.codes, whole), scales=scales(w.scales), mins=mins)


def joined(parts: Sequence[QuantizedArray], kind: str) -> QuantizedArray:
    """Kernels below each other as `ops.quantized_linear.quantized_linear` reads them on a kind of
    device.

    Args:
      parts: kernels of one layer that read the same inputs, of one kind and group size, filled.
      kind: "cpu", "gpu" or "tpu".

    Returns:
      Codes [out, in], on CPUs those of 4 bits in pairs; in groups on a TPU [groups, inputs of a
      group, out], as XLA's TPU compiler reads them inside a product (docs/quantised-bases.md).
    """
    first = parts[0]

    def flat(part: Array, reads: int) -> Array:
        return part.reshape(math.prod(part.shape[:reads]), -1)

    def beside(arrays: Sequence[Array]) -> Array:
        # Scales of what a norm follows may be wider, see `scaled_outputs`.
        dtype = max((a.dtype for a in arrays), key=lambda dtype: dtype.itemsize)
        return jnp.concatenate([flat(a, first.reads).astype(dtype) for a in arrays], axis=1)

    by_columns = kind == "tpu" and first.group > 0
    inner = first.shape[first.reads - 1]
    whole = replace(
        first,
        codes=beside([w.codes for w in parts]),
        scales=beside([w.scales for w in parts]),
        mins=None if first.mins is None else beside([w.mins for w in parts]),
        reads=1,
        writes=1,
        inner=inner,
    )
    if by_columns:
        axes = -1, first.group, whole.shape[-1]
        return replace(
            whole,
            codes=whole.codes.reshape(axes),
            scales=whole.scales[:, None],
            mins=None if whole.mins is None else whole.mins[:, None],
            reads=2,
        )
    rows = replace(jax.tree.map(lambda part: part.T, whole), writes=0)
    return _for_cpu(rows) if kind == "cpu" else rows


def _for_cpu(rows: QuantizedArray) -> QuantizedArray:
    """Codes of 4 bits in pairs, and scales of float16 as float32: XLA's CPU compiler writes those
    of all layers to memory as float32 in every token.
    """
    rows = pair(rows) if KINDS[rows.kind].bits == 4 else rows
    mins = None if rows.mins is None else rows.mins.astype(jnp.float32)
    return replace(rows, scales=rows.scales.astype(jnp.float32), mins=mins)


def packed_table(leaf: Any, kind: str) -> Any:
    """An embedding or a head as decode reads it; a float one as it is. `kind` as for `joined`."""
    if not isinstance(leaf, QuantizedArray):
        return leaf
    if leaf.writes:
        return joined([leaf], kind)
    return _for_cpu(leaf) if kind == "cpu" else leaf
