"""Positions of tokens, and the slots that they attend to.

Letters: B batch, T tokens, S cache slots, k base head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from zflora_jax.core.fields import require
from zflora_jax.nn.kv_cache import KVCache
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.ops.linear import Array
from zflora_jax.parallel.mesh import has_values_here


@flax.struct.dataclass
class Context:
    """What all layers share.

    Attributes:
      cos: [B, T, 1, k/2] float32, of the rotary embedding.
      sin: as cos.
      mask: what a token attends to.
      index: int32, the cache slot of the first token; None without a cache.
    """

    cos: Array
    sin: Array
    mask: AttentionMask
    index: Array | None


def positions_and_mask(
    shape: tuple[int, ...],
    padding_mask: Array | None,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> tuple[Array, AttentionMask, Array]:
    """Positions and attention mask of tokens of shape (B, T); other arguments as `Llama.__call__`.

    Returns:
      Positions [B, T] int32, the mask, and the slots that now hold a real token, [B, S] bool: slots
      of the cache, or the tokens without one.

    Raises:
      ConfigError: a padding mask that is not bool, or one or segment ids of another shape; segment
        ids with a mask or a cache; more tokens than the cache has slots for (not checked where its
        index is traced: then the last slots would be written over).
    """
    for name, given in (("padding_mask", padding_mask), ("segment_ids", segment_ids)):
        require(
            given is None or given.shape == shape,
            f"{name} must have the tokens' shape {shape}; got {getattr(given, 'shape', None)}.",
        )
    require(
        padding_mask is None or padding_mask.dtype == bool,
        "padding_mask must be bool, True at real tokens; ids of packed rows go to segment_ids.",
    )
    require(
        segment_ids is None or padding_mask is None,
        "segment_ids tell padding (0) too: give them or padding_mask, not both.",
    )
    require(
        segment_ids is None or cache is None,
        "packed rows (segment_ids) cannot be continued from a cache: give padding_mask.",
    )
    real = jnp.ones(shape, bool) if padding_mask is None else padding_mask
    if segment_ids is not None:
        return segment_positions(segment_ids), AttentionMask(segment_ids, segment_ids), real
    positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    if cache is None:
        return positions, AttentionMask(padding_mask, padding_mask), real
    room = cache.valid.shape[1]
    require(
        not has_values_here(cache.index) or int(cache.index) + shape[1] <= room,
        f"a cache of {room} slots has no room for {shape[1]} more tokens: make a larger one.",
    )
    slots = jax.lax.dynamic_update_slice_in_dim(cache.valid, real, cache.index, axis=1)
    if cache.empty:  # attention reads the tokens, not the cache
        return positions, AttentionMask(padding_mask, padding_mask), slots
    before = jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
    return before + positions, AttentionMask(padding_mask, slots, cache.index), slots


def segment_positions(segment_ids: Array) -> Array:
    """Segment ids [B, T] int32 -> the position of each token within its segment, [B, T] int32."""
    slot = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.concatenate(
        [
            jnp.ones_like(segment_ids[:, :1], bool),
            segment_ids[:, 1:] != segment_ids[:, :-1],
        ],
        axis=1,
    )
    return slot - jax.lax.cummax(jnp.where(starts, slot, 0), axis=1)
