"""The key/value cache of decode: its arrays, their axes, and how many slots they have.

Letters: B batch, S cache slots, K key/value heads, k head dim, L layers; e the dims that an adapter
adds to k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.products import Array
from zflora_jax.parallel.sharding import divide

KEY_SLOTS, VALUE_SLOTS, HEADS, ROWS = -1, -2, -3, -4  # the axes of a cache's arrays


@flax.struct.dataclass
class KVCache:
    """Keys and values of past positions.

    layers: per layer a pair (keys [B, K, k+e, S], values [B, K, S, k+e]) in the activation dtype,
    as attention's products read them; with scan_layers one pair stacked on a leading axis L. Inside
    `decode.decode_until`'s loop axes B and K of one are missing. valid: [B, S] bool, the slots that
    hold a real token (padding does not). index: int32, the slot that the next token goes to, the
    same in all rows.
    """

    layers: Any
    valid: Array
    index: Array

    def map_layers(self, change: Callable[[Array, int], Array]) -> Any:
        """`layers` with change(x, axis) for each of its arrays x; axis, negative, is that of the
        slots.
        """

        def pair(keys: Array, values: Array) -> tuple[Array, Array]:
            return change(keys, KEY_SLOTS), change(values, VALUE_SLOTS)

        return (
            pair(*self.layers)
            if isinstance(self.layers, tuple)
            else [pair(*layer) for layer in self.layers]
        )


def init_cache(
    config: LlamaConfig, batch: int, slots: int, adapter: AdapterConfig | None = None
) -> KVCache:
    """An empty cache of `slots` positions for `batch` rows; heads are as wide as the model's,
    adapter dims included. On a mesh its rows are divided over data and its heads over tensor.
    """
    width = config.head_dim + (resolve_adapter(config, adapter).heads if adapter else 0)
    head, stacked = (batch, config.num_kv_heads), (config.num_layers,) if config.scan_layers else ()

    def empty(*shape: int) -> Array:
        x = jnp.zeros((*stacked, *head, *shape), config.dtype)
        return divide(x, *(None for _ in stacked), "data", "tensor")

    def pair() -> tuple[Array, Array]:
        return empty(width, slots), empty(slots, width)

    layers = pair() if config.scan_layers else [pair() for _ in range(config.num_layers)]
    return KVCache(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def cache_slots(tokens: int) -> int:
    """How many slots the cache for `tokens` positions gets: a multiple of 64, so that how a prompt
    is computed does not hang on how many tokens follow.
    """
    return -(-tokens // 64) * 64
