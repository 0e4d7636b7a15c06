"""Replace the adapter of a fused model by another of the same config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax

from zflora_jax.adapters.blocks import (
    Array,
    Piece,
    block_region,
    in_axis,
    packed_scale,
    require_widened,
    stored_values,
    with_block,
    with_codes,
)
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.shapes import check_adapters
from zflora_jax.adapters.swapping_packed import packed_pieces, place, write_codes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import group, kernel_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.copies import write_divided, write_pieces
from zflora_jax.ops.quantized import QuantizedArray
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
    return replace(fused, params=params)


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
        at = f"{layer}/{group(kernel)}/{kernel}/kernel"
        if isinstance(flat.get(at), QuantizedArray) and not config.execution.packed:
            values = stored_values(kernel, block_name, block, adapter)
            write = write_divided if several_devices() else _write_here
            flat[at] = with_codes(flat[at], values, block_name, shape[1][-1], write)
            continue
        packed, qk_norm = config.execution.packed, config.traits.qk_norm
        value = stored_values(kernel, block_name, block, adapter, packed, qk_norm)
        if several_devices():
            flat[at] = with_block(flat[at], value, block_name, axis, shape[0][-1], shape[1][-1])
            continue
        if config.execution.packed:
            leaf_name, first = place(config, kernel)
            order = paired_order(config.rotary_dim, config.head_dim) if kernel in "qk" else None
            packed_leaf = f"{layer}/{leaf_name}"
            if isinstance(flat[packed_leaf], QuantizedArray):
                flat[packed_leaf] = write_codes(
                    flat[packed_leaf],
                    stored_values(kernel, block_name, block, adapter),
                    kernel_shapes(config)[kernel],
                    first,
                    extra=block_name != "forward",
                    writes=region[-1],
                    order=order,
                    scale=packed_scale(kernel, block_name, qk_norm),
                )
                continue
            found = packed_pieces(
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


def _write_here(x: Array, value: Array, spans: Mapping[int, slice]) -> Array:
    """`ops.copies.write_divided` on one device, in place."""
    start = tuple((spans[axis].start or 0) if axis in spans else 0 for axis in range(-x.ndim, 0))
    return write_pieces(x, [value], [start])
