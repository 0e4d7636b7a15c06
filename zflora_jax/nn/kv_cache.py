"""The key/value cache of decode. Nothing else knows the layout of its arrays.

Letters: B batch, T new tokens, S cache slots, K key/value heads, k head dim, L layers; e the dims
that an adapter adds to k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.copies import copy_bits, write_slice
from zflora_jax.ops.linear import Array
from zflora_jax.parallel.sharding import divide

KEY_SLOTS, VALUE_SLOTS, HEADS, ROWS = -1, -2, -3, -4  # the axes of a cache's arrays


@flax.struct.dataclass
class LayerCache:
    """Keys [B, K, k+e, S] and values [B, K, S, k+e] of one layer, in the activation dtype."""

    keys: Array
    values: Array

    def map(self, change: Callable[[Array, int], Array]) -> LayerCache:
        """change(x, negative axis of the slots) for keys and values x."""
        return LayerCache(change(self.keys, KEY_SLOTS), change(self.values, VALUE_SLOTS))


@flax.struct.dataclass
class KVCache:
    """Keys and values of past positions.

    Attributes:
      layers: A LayerCache per layer; with scan_layers one, stacked on a leading axis L.
      valid: [B, S] bool, True for slots that hold a real token (padding does not).
      index: int32, the slot that the next token goes to, the same in all rows.
      empty: True if the cache is statically known to be empty.
    """

    layers: Any
    valid: Array
    index: Array
    empty: bool = flax.struct.field(pytree_node=False, default=False)

    @staticmethod
    def update(
        layer: LayerCache | None, k: Array, v: Array, index: Array | None, alone: bool
    ) -> tuple[LayerCache, LayerCache | None]:
        """Writes keys and values [B, T, K, k+e] of new tokens into a layer's cache, if it has one,
        from slot `index` on. Returns (the keys and values that attention reads, the updated layer);
        it reads only the T new ones if `alone`, else all S.
        """
        new = LayerCache(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))
        if layer is None or index is None:
            return new, None

        def write(x: Array, update: Array, axis: int) -> Array:
            update = update.reshape(*x.shape[:-2], *update.shape[-2:])  # see `without_single_axes`
            return write_slice(x, update, index, axis)

        layer = LayerCache(
            write(layer.keys, new.keys, KEY_SLOTS), write(layer.values, new.values, VALUE_SLOTS)
        )
        if alone:
            return new, layer
        rows, heads = new.keys.shape[:2]
        return layer.map(lambda x, _: x.reshape(rows, heads, *x.shape[-2:])), layer

    def without_single_axes(self) -> KVCache:
        """The cache without the axes B and K of size 1, for a loop's carry."""

        # XLA's CPU compiler then updates the cache in place; with them it copies every array four
        # times a token (test_the_compiled_loop_copies_no_cache).
        def squeeze(x: Array) -> Array:
            return jnp.squeeze(x, tuple(axis for axis in (ROWS, HEADS) if x.shape[axis] == 1))

        return replace(self, layers=jax.tree.map(squeeze, self.layers))

    def with_axes_of(self, whole: KVCache) -> KVCache:
        """The inverse of `without_single_axes`, which made this from `whole`."""
        layers = jax.tree.map(lambda x, like: x.reshape(like.shape), self.layers, whole.layers)
        return replace(self, layers=layers)

    def continue_rows(self, rows: Array, slots: int) -> KVCache:
        """Rows `rows` [N] int32 of a full cache of unstacked layers, each with `slots` more."""

        def extended(x: Array, axis: int) -> Array:
            pads = [(0, slots if at == axis % x.ndim else 0) for at in range(x.ndim)]
            return copy_bits(lambda x, rows: jnp.pad(x[rows], pads), (x,), (rows,))

        valid = jnp.pad(self.valid[rows], ((0, 0), (0, slots)))
        index = jnp.asarray(self.valid.shape[1], jnp.int32)
        return KVCache([layer.map(extended) for layer in self.layers], valid, index)


def init_cache(
    config: LlamaConfig, batch: int, slots: int, adapter: AdapterConfig | None = None
) -> KVCache:
    """An empty cache. On a mesh its rows are divided over data and its heads over tensor.

    Args:
      config: Config of the model.
      batch: Number of rows, B.
      slots: Number of positions, S.
      adapter: Config of unmerged adapters, whose head dims are added.
    """
    width = config.head_dim + resolve_adapter(config, adapter).heads
    count, scan = config.num_layers, config.execution.scan_layers
    stacked = (count,) if scan else ()

    def empty(*shape: int) -> Array:
        x = jnp.zeros((*stacked, batch, config.num_kv_heads, *shape), config.execution.dtype)
        return divide(x, *(None for _ in stacked), "data", "tensor")

    def layer() -> LayerCache:
        return LayerCache(empty(width, slots), empty(slots, width))

    layers = layer() if scan else [layer() for _ in range(count)]
    return KVCache(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32), empty=True)


def cache_slots(tokens: int) -> int:
    """Slots of a cache for `tokens` positions: a multiple of 64, so that a prompt's computation
    does not depend on the number of tokens that follow.
    """
    return -(-tokens // 64) * 64
