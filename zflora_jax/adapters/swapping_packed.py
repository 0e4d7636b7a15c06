"""Where the blocks of an adapter lie in kernels that are packed for decode."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.blocks import Array, Piece
from zflora_jax.core.architecture import group
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.copies import write_pieces
from zflora_jax.ops.quantized import QuantizedArray, pair
from zflora_jax.ops.quantized_blocks import group_span, quantize_block


def place(config: LlamaConfig, kernel: str) -> tuple[str, int]:
    """(The packed leaf that holds a kernel, the first of its rows there.)"""
    heads = {"q": 0, "k": config.num_heads, "v": config.num_heads + config.num_kv_heads}
    if kernel in heads:
        return "attn/qkv/kernel", heads[kernel] * config.head_dim
    if kernel in ("gate", "up"):
        return "mlp/gate_up/kernel", 0 if kernel == "gate" else config.stored.intermediate_size
    return f"{group(kernel)}/{kernel}/kernel", 0


def packed_pieces(
    value: Array,
    shape: Any,
    first: int,
    reads: slice,
    writes: slice,
    order: np.ndarray | None,
) -> list[Piece]:
    """Cut a block [*in, *out] into pieces of a packed leaf [out, in], each with its start indices.

    `first` is the first row of the kernel in the leaf; `order`, if given, is that of its heads'
    dims there. Where heads are wider than the base's there are one or two pieces per head (see
    `ops.copies.write_pieces`).
    """
    inputs, outputs = _spans(shape[0], reads), _spans(shape[1], writes, order)
    flat = value.reshape(sum(count for _, count in inputs), -1).T
    found: list[Piece] = []
    at_in = 0
    for column, width in inputs:
        at_out = 0
        for row, height in outputs:
            found.append(
                (flat[at_out : at_out + height, at_in : at_in + width], (first + row, column))
            )
            at_out += height
        at_in += width
    return found


def _spans(
    axes: tuple[int, ...], part: slice, order: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """(start, count) of the pieces that slice `part` of the last of `axes` has in all of them
    flattened; a single one if it is contiguous.

    order: the native index at each place of the last axis; None where they are the same.
    """
    width, heads = axes[-1], int(np.prod(axes[:-1]))
    places = np.argsort(np.arange(width) if order is None else order)
    runs = np.split(places[part], np.flatnonzero(np.diff(places[part]) != 1) + 1)
    if len(runs) == 1 and len(runs[0]) == width:
        return [(0, heads * width)]
    return [(head * width + int(run[0]), len(run)) for head in range(heads) for run in runs]


def write_codes(
    leaf: QuantizedArray,
    value: Array,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    first: int,
    *,
    extra: bool,
    writes: slice,
    order: np.ndarray | None,
    scale: float,
) -> QuantizedArray:
    """Quantise a block and write it into a packed kernel.

    Args:
      leaf: of `packing_quantized.joined`.
      value: the block [*in, *out], float32.
      axes: the input and output axes of the fused kernel.
      first: the first of the kernel's outputs in the leaf.
      extra: whether the block's inputs are an adapter's, else the base's.
      writes: which of the last output axis the block has.
      order: as in `packed_pieces`.
      scale: a power of two that the outputs are stored times.
    """
    like = replace(leaf, reads=len(axes[0]), writes=len(axes[1]), paired=False)
    block, inner = quantize_block(value, like), leaf.inner
    block = replace(block, scales=block.scales.astype(jnp.float32) * scale)
    if block.mins is not None:
        block = replace(block, mins=block.mins.astype(jnp.float32) * scale)
    codes = _whole_groups(block)
    flat = replace(block, codes=_by_outputs(codes, block.reads), reads=1, writes=0)
    halves = 2 if leaf.paired else 1
    start, count = (leaf.base, codes.shape[block.reads - 1]) if extra else (0, leaf.base)
    reads = slice(start // halves, (start + count) // halves)
    stored = (pair(flat) if leaf.paired else flat).codes
    group = group_span(leaf, extra).start or 0
    total = leaf.inputs // leaf.group if leaf.group else leaf.scales.shape[leaf.axis]
    own = slice(group, group + block.scales.shape[block.reads - 1])
    heads = leaf.inputs // inner

    def written(part: Array, numbers: Array, inputs: tuple[int, ...], reads: slice) -> Array:
        found = packed_pieces(numbers.T, (inputs, axes[1]), first, reads, writes, order)
        if leaf.reads == 2:  # [groups, inputs of a group, out]
            each = part.shape[1]
            found = [
                (piece.T.reshape(-1, each, len(piece)), (column // each, 0, row))
                for piece, (row, column) in found
            ]
        return write_pieces(part, *zip(*found, strict=True))

    by_group = (heads, total // heads) if leaf.group else (total,)
    scales = _by_outputs(block.scales, block.reads)
    mins = None if block.mins is None else _by_outputs(block.mins, block.reads)
    return replace(
        leaf,
        codes=written(leaf.codes, stored, (heads, inner // halves), reads),
        scales=written(leaf.scales, scales, by_group, own),
        mins=None if mins is None else written(leaf.mins, mins, by_group, own),
    )


def _whole_groups(block: QuantizedArray) -> Array:
    """The codes of a block with zeros behind its last group."""
    pads = [(0, 0)] * block.ndim
    pads[block.axis] = (0, -block.shape[block.axis] % block.group if block.group else 0)
    return jnp.pad(block.codes, pads)


def _by_outputs(part: Array, reads: int) -> Array:
    """[*in, *out] as [out, in]."""
    return part.reshape(math.prod(part.shape[:reads]), -1).T
