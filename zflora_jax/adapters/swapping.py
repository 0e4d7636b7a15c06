"""Replace the adapter of a fused model by another of the same config."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from zflora_jax.adapters.blocks import (
    Array,
    Piece,
    block_region,
    in_axis,
    require_widened,
    stored_values,
    with_block,
)
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.shapes import check_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import group, kernel_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.copies import write_pieces
from zflora_jax.ops.rope import paired_order
from zflora_jax.parallel.mesh import mesh_in_use, place_like, several_devices
from zflora_jax.parallel.sharding import constrain


def swap(fused: Model, adapters: Tree) -> Model:
    """Replace the adapter blocks of a fused model.

    Only those blocks are written, O(adapter) bytes; but for bfloat16 on a CPU XLA copies each of
    their kernels, and on a mesh each kernel is written once.

    Args:
      fused: packed or not. The buffers of its parameters are donated, so it cannot be used
        afterwards.
      adapters: float32, of the same AdapterConfig.

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
    return Model(fused.config, params, fused.tokenizer, fused.source, adapter)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _swap(
    config: LlamaConfig, base: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> Tree:
    flat = trees.flatten(params)
    adapters = (trees.stack_layers if config.execution.scan_layers else trees.unstack_layers)(
        adapters, base.num_layers
    )
    pieces: dict[str, list[Piece]] = {}  # leaf -> pieces to write
    for name, block in trees.flatten(adapters).items():
        layer, _, kernel, block_name = name.split("/")
        axis, shape = in_axis(base, kernel), kernel_shapes(base)[kernel]
        region = block_region(block_name, axis, shape[0][-1], shape[1][-1])
        packed, qk_norm = config.execution.packed, config.traits.qk_norm
        value = stored_values(kernel, block_name, block, adapter, packed, qk_norm)
        if several_devices():
            at = f"{layer}/{group(kernel)}/{kernel}/kernel"
            flat[at] = with_block(flat[at], value, block_name, axis, shape[0][-1], shape[1][-1])
            continue
        if config.execution.packed:
            leaf_name, first = _place(config, kernel)
            order = paired_order(config.rotary_dim, config.head_dim) if kernel in "qk" else None
            found = _packed_pieces(
                value, kernel_shapes(config)[kernel], first, region[1], region[-1], order
            )
        else:
            leaf_name = f"{group(kernel)}/{kernel}/kernel"
            found = [
                (
                    value,
                    (0,) * (value.ndim - len(region) + 1)
                    + tuple(part.start or 0 for part in region[1:]),
                )
            ]
        pieces.setdefault(f"{layer}/{leaf_name}", []).extend(found)
    written = {
        name: write_pieces(flat[name], *zip(*found, strict=True)) for name, found in pieces.items()
    }
    return (
        constrain(trees.unflatten(flat | written), fused=True)
        if several_devices()
        else trees.unflatten(flat | written)
    )


def _place(config: LlamaConfig, kernel: str) -> tuple[str, int]:
    """(The packed leaf that holds a kernel, the first of its rows there.)"""
    heads = {"q": 0, "k": config.num_heads, "v": config.num_heads + config.num_kv_heads}
    if kernel in heads:
        return "attn/qkv/kernel", heads[kernel] * config.head_dim
    if kernel in ("gate", "up"):
        return "mlp/gate_up/kernel", 0 if kernel == "gate" else config.stored.intermediate_size
    return f"{group(kernel)}/{kernel}/kernel", 0


def _packed_pieces(
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
