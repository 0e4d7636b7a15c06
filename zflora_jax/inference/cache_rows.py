"""What decoding does to the rows and slots of a key/value cache.

Letters: B batch, K key/value heads or beams, S slots.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from zflora_jax.nn.kv_cache import HEADS, ROWS, KVCache
from zflora_jax.ops.products import copy_bits

Array = jax.Array


def without_single_axes(cache: KVCache) -> KVCache:
    """`cache`, its arrays without the axes of rows and of heads where these have size 1.

    XLA's CPU compiler then updates the cache in place inside a loop; with those axes it copies
    every array four times per token.
    """
    return replace(cache, layers=cache.map_layers(lambda x, _: drop_single(x)))


def drop_single(x: Array) -> Array:
    """An array of a cache without its axes of rows and of heads where these have size 1."""
    return jnp.squeeze(x, tuple(axis for axis in (ROWS, HEADS) if x.shape[axis] == 1))


def with_axes_of(cache: KVCache, whole: KVCache) -> KVCache:
    """The inverse of `without_single_axes`: `cache` with the axes of `whole`."""
    layers = jax.tree.map(lambda x, like: x.reshape(like.shape), cache.layers, whole.layers)
    return replace(cache, layers=layers)


def repeat_rows(cache: KVCache, count: int) -> KVCache:
    """Each row `count` times: B rows become B * count, copies of a row side by side."""
    layers = jax.tree.map(lambda x: jnp.repeat(x, count, axis=ROWS), cache.layers)
    return KVCache(layers, jnp.repeat(cache.valid, count, axis=0), cache.index)


def reorder_rows(cache: KVCache, rows: Array, start: int) -> KVCache:
    """Row i becomes row rows[i] from slot `start` on; what lies before is the same in both.

    Args:
      cache: of B rows.
      rows: [B] int32.
      start: first slot that moves, e.g. the length of the prompt that beams share.
    """

    def moved(x: Array, slots: int) -> Array:
        take = partial(jnp.take, axis=ROWS, mode="clip")
        after = copy_bits(take, (jax.lax.slice_in_dim(x, start, None, axis=slots),), (rows,))
        return copy_bits(
            lambda x, after: jax.lax.dynamic_update_slice_in_dim(x, after, start, axis=slots),
            (x, after),
        )

    return KVCache(cache.map_layers(moved), cache.valid, cache.index)


def continue_rows(cache: KVCache, rows: Array, slots: int) -> KVCache:
    """A cache whose row n is row rows[n] of `cache`, with `slots` more slots.

    Args:
      cache: full, of a model with its layers apart.
      rows: [N] int32.
      slots: how many to add.
    """

    def continued(x: Array, axis: int) -> Array:
        widths = [(0, slots if n == axis % x.ndim else 0) for n in range(x.ndim)]
        return copy_bits(lambda x, rows: jnp.pad(x[rows], widths), (x,), (rows,))

    return KVCache(
        cache.map_layers(continued),
        jnp.pad(cache.valid[rows], ((0, 0), (0, slots))),
        jnp.asarray(cache.valid.shape[1], jnp.int32),
    )
