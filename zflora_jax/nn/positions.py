"""Which position each token has, and which slots it attends to.

Letters: B batch, T query positions, S key slots, k base head dim.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from zflora_jax.core.fields import require
from zflora_jax.nn.kv_cache import KVCache
from zflora_jax.ops.linear import Array


@flax.struct.dataclass
class Context:
    """What all layers share.

    Attributes:
      cos: [B, T, 1, k/2] float32, of the rotary embedding.
      sin: as cos.
      mask: [B, 1, T, S] bool, True where a token attends to a slot.
      index: int32, the cache slot of the first token; None without a cache.
    """

    cos: Array
    sin: Array
    mask: Array
    index: Array | None


def positions_and_mask(
    shape: tuple[int, ...],
    padding_mask: Array | None,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> tuple[Array, Array, Array]:
    """Positions and attention mask of tokens [B, T].

    Args:
      shape: (B, T).
      padding_mask: [B, T] bool, True at real tokens; None means all.
      segment_ids: [B, T] int32 of packed rows, in place of padding_mask.
      cache: what comes before the tokens.

    Returns:
      Positions [B, T] int32, mask [B, 1, T, S] bool, and which slots now hold a real token, [B, S]
      bool.

    Raises:
      ConfigError: a padding mask that is not bool; segment ids beside one, or beside a cache.
    """
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
    first, before, slots = jnp.zeros((), jnp.int32), jnp.zeros((shape[0], 1), jnp.int32), real
    if cache is not None:
        first = cache.index
        before = jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
        slots = jax.lax.dynamic_update_slice_in_dim(cache.valid, real, first, axis=1)
    causal = jnp.arange(slots.shape[1])[None, :] <= first + jnp.arange(shape[1])[:, None]
    if segment_ids is None:
        positions = before + jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
        return positions, causal[None, None, :, :] & slots[:, None, None, :], slots
    # Equality alone: padding then attends to padding, and no row of the softmax is empty.
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return segment_positions(segment_ids), causal[None, None, :, :] & same, slots


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
