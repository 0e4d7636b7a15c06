"""Attention masks as a few integers per token; the dense mask is built where a product needs it.

Letters: B batch, T query positions, S key slots, n blocks of queries.
"""

from __future__ import annotations

from dataclasses import replace

import flax.struct
import jax.numpy as jnp

from zflora_jax.ops.linear import Array


@flax.struct.dataclass
class AttentionMask:
    """A query attends to the keys of its segment, up to its own slot, and no further back than the
    window. Padding is a separate segment, so that no row is fully masked.

    Attributes:
      queries: Segment of each query [B, T]: int32 for packed rows, else bool (real or padding);
        None if all are real.
      keys: Segment of each key [B, S], in the same form.
      first: Slot of the first query, int32. None if queries and keys are the same T tokens, which
        flash kernels need to know statically.
      window: Most tokens that a query attends to, including its own; None for all. Padding between
        real tokens behind a cache is not counted.
    """

    queries: Array | None = None
    keys: Array | None = None
    first: Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def within(self, window: int | None, slots: int) -> AttentionMask:
        """The mask with a window, which is dropped where it covers all slots."""
        return replace(self, window=None if window is None or window >= slots else window)

    def dense(self, length: int, slots: int) -> Array:
        """[B or 1, 1, T = length, S = slots] bool, True where a query attends to a slot."""
        first = jnp.zeros((), jnp.int32) if self.first is None else self.first
        at = first + jnp.arange(length, dtype=jnp.int32)
        slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
        causal = (slot <= at[:, None])[None]
        if self.window is not None:
            # Padding between real tokens takes no place in a window.
            place = slot
            if self.keys is not None and self.keys.dtype == bool:
                place = jnp.cumsum(self.keys, axis=1, dtype=jnp.int32)
            causal &= place[:, None, :] > jnp.take(place, at, axis=1)[:, :, None] - self.window
        if self.queries is None and self.keys is None:
            return causal[:, None]
        every = jnp.ones((1, 1), bool)
        queries, keys = (every if x is None else x for x in (self.queries, self.keys))
        return causal[:, None] & (queries[:, None, :, None] == keys[:, None, None, :])

    def span(self, start: int, end: int) -> AttentionMask:
        """The mask of the queries from `start` to `end` and the keys up to `end`."""
        queries, keys = self.queries, self.keys
        return AttentionMask(
            None if queries is None else queries[:, start:end],
            None if keys is None else keys[:, :end],
            jnp.full((), start, jnp.int32),
            self.window,
        )

    def query_blocks(self, blocks: int, length: int) -> AttentionMask:
        """The masks of equal blocks of the T = `length` queries, on a new leading axis n, without
        `keys`, which all share.
        """
        starts = jnp.arange(blocks, dtype=jnp.int32) * (length // blocks)
        first = starts if self.first is None else self.first + starts
        queries = self.queries
        if queries is not None:
            queries = jnp.moveaxis(queries.reshape(len(queries), blocks, -1), 1, 0)
        return AttentionMask(queries, None, first, self.window)
