"""Replace the adapter of a fused model by another of the same config."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.fuse import require_widened, widenings
from zflora_jax.adapters.kernel_adapter import BLOCKS, Widening
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.packing import head_order, state_scale
from zflora_jax.adapters.shapes import check_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import group, kernel_shapes, packed_rows
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.copies import write_divided, write_pieces
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.ops.quantized_blocks import filled, group_span, quantize_block
from zflora_jax.parallel.mesh import mesh_in_use, place_like, several_devices
from zflora_jax.parallel.sharding import constrain

Array = jax.Array


def swap(fused: Model, adapters: Tree) -> Model:
    """Replaces the adapter blocks of a fused model.

    Only those blocks are written, O(adapter) bytes; but for bfloat16 on a CPU XLA copies each of
    their kernels, and on a mesh each kernel is written once. Kernels that `pack_for_decode`
    dequantised get float blocks.

    Args:
      fused: Fused model, packed or not. The buffers of its parameters are donated, so it cannot be
        used afterwards.
      adapters: Adapters of the same AdapterConfig, float32.

    Returns:
      The model with the new adapters.

    Raises:
      ValueError: as for `fuse`, and for a method that merges by addition.
    """
    adapter = require_widened(fused, "swap")
    plain = fused.config.replace(packed=False, fill_residual=0, fill_mlp=0)
    base = base_config(plain, adapter)
    given = base.replace(scan_layers="layers" in adapters)
    with mesh_in_use(fused.params):
        adapters = place_like(fused.params, adapters)
        check_adapters(adapters, given, adapter)
        params = _swap(fused.config, base, adapter, fused.params, adapters)
    return replace(fused, params=params)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _swap(
    config: LlamaConfig, base: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> Tree:
    flat, execution = trees.flatten(params), config.execution
    arrange = trees.stack_layers if execution.scan_layers else trees.unstack_layers
    layers, divided = arrange(adapters, base.num_layers), several_devices()
    write = write_divided if divided else _write_in_place
    for kernel, beside in widenings(base, adapter).items():
        for layer in layers:
            blocks = layers[layer][group(kernel)][kernel]
            if execution.packed:
                name = f"{layer}/{packed_rows(config)[kernel][0]}/kernel"
                flat[name] = _swap_packed(config, kernel, beside, flat[name], blocks)
            else:
                name = f"{layer}/{group(kernel)}/{kernel}/kernel"
                flat[name] = beside.fuse(flat[name], blocks, write)
    swapped = trees.unflatten(flat)
    return constrain(swapped, fused=True) if divided else swapped


def _write_in_place(x: Array, value: Array, spans: dict[int, slice]) -> Array:
    """`ops.copies.write_divided` on one device, in place."""
    start = tuple((spans[axis].start or 0) if axis in spans else 0 for axis in range(-x.ndim, 0))
    return write_pieces(x, [value], [start])


def _swap_packed(
    config: LlamaConfig, kernel: str, beside: Widening, leaf: Any, blocks: Tree
) -> Any:
    """A packed leaf [out, in] with the blocks of one of its kernels written in."""
    inputs, outputs = kernel_shapes(config)[kernel]
    _, start, _ = packed_rows(config)[kernel]
    order = head_order(config, kernel)
    place = np.arange(outputs[-1]) if order is None else np.argsort(order)
    heads = outputs[-1] * np.arange(math.prod(outputs[:-1]))
    for name, block in blocks.items():
        extra_in, extra_out = BLOCKS[name]
        reads, writes = beside.spans(name)
        rows = (start + heads[:, None] + place[writes]).reshape(-1)
        value = beside.stored(name, block)
        scale = state_scale(config, kernel) if extra_out else 1.0
        if isinstance(leaf, QuantizedArray):
            like = replace(leaf, reads=len(inputs), writes=len(outputs))
            coded = quantize_block(value, like)
            leaf = _write_codes(leaf, filled(coded, coded.shape), rows, extra_in, scale)
        else:
            columns = np.arange(math.prod(inputs)).reshape(inputs)[..., reads].reshape(-1)
            flat = (value * scale).reshape(len(columns), len(rows)).T
            leaf = _write_at(leaf, flat, rows, columns)
    return leaf


def _write_codes(
    leaf: QuantizedArray, block: QuantizedArray, rows: np.ndarray, extra: bool, scale: float
) -> QuantizedArray:
    """A packed kernel with a quantised block [*in, *out] of whole groups written in.

    Args:
      leaf: The kernel, of `packing.joined`.
      block: The block.
      rows: Row of each of its outputs in the leaf.
      extra: Whether its inputs are an adapter's, else the base's.
      scale: A power of two that the outputs are stored times.
    """
    heads = leaf.inputs // leaf.inner

    def write(part: Array, new: Array, heads: int, first: int) -> Array:
        count = new.shape[block.axis]
        width = (part.size // part.shape[-1] if part.ndim == 3 else part.shape[1]) // heads
        columns = (np.arange(heads)[:, None] * width + first + np.arange(count)).reshape(-1)
        return _write_at(part, new.reshape(len(columns), len(rows)).T, rows, columns)

    def scales(part: Array, new: Array) -> Array:
        first = group_span(leaf, extra).start or 0
        new = new.astype(jnp.float32) * scale
        return write(part, new, heads if leaf.group else 1, first)

    return replace(
        leaf,
        codes=write(leaf.codes, block.codes, heads, leaf.base if extra else 0),
        scales=scales(leaf.scales, block.scales),
        mins=None if leaf.mins is None else scales(leaf.mins, block.mins),
    )


def _write_at(x: Array, value: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """A packed array [out, in], or [groups, inputs of a group, out], with `value` written at rows
    and columns, in place: a piece for each run of consecutive ones (see `write_pieces`).
    """
    pieces, starts = [], []
    for at, row, height in _runs(rows):
        for to, column, width in _runs(columns):
            piece, start = value[at : at + height, to : to + width], (row, column)
            if x.ndim == 3:
                each = x.shape[1]
                piece, start = piece.T.reshape(-1, each, height), (column // each, 0, row)  # type: ignore[assignment]
            pieces.append(piece)
            starts.append(start)
    return write_pieces(x, pieces, starts)


def _runs(places: np.ndarray) -> list[tuple[int, int, int]]:
    """(Index, first place, count) of the runs of consecutive places."""
    ends = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    return [(start, int(places[start]), end - start) for start, end in pairwise(ends)]
