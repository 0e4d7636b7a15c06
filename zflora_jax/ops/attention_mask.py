"""What attends to what, said by a few numbers a token; the dense mask is made of them where a
product needs one.

Letters: B batch, T query positions, S key slots, n blocks of queries.
"""

from __future__ import annotations

from dataclasses import replace

import flax.struct
import jax.numpy as jnp

from zflora_jax.ops.linear import Array


@flax.struct.dataclass
class AttentionMask:
    """A query attends to the keys of its own segment, up to its own slot, and no further back than
    the window.

    Every query is a key too, so none attends to nothing: padding, whose segment is its own, attends
    to padding. What a kernel gives for padding may differ from that, but is finite.

    Attributes:
      queries: [B, T], the segment of each query: int32 of packed rows, bool (real or padding)
        else; None means that all are real (True).
      keys: [B, S], of each key, in the same terms; None as in `queries`.
      first: int32, the slot of the first query; None means that queries and keys are of the same T
        tokens, which flash kernels need to know while a program is compiled.
      window: how many tokens a query attends to at most, its own the last; None: all. Padding is
        not counted where it lies between real tokens behind a cache.
    """

    queries: Array | None = None
    keys: Array | None = None
    first: Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def within(self, window: int | None, slots: int) -> AttentionMask:
        """The same with a window, which limits nothing where it has room for all slots."""
        return replace(self, window=None if window is None or window >= slots else window)

    @property
    def same_tokens(self) -> bool:
        """Whether queries and keys are of the same tokens."""
        return self.first is None

    def dense(self, length: int, slots: int) -> Array:
        """[B or 1, 1, T, S] bool, True where a query attends to a slot.

        Args:
          length: T.
          slots: S.
        """
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
        queries, keys = (
            jnp.ones((1, 1), bool) if x is None else x for x in (self.queries, self.keys)
        )
        return causal[:, None] & (queries[:, None, :, None] == keys[:, None, None, :])

    def span(self, start: int, end: int) -> AttentionMask:
        """The mask of the queries from `start` to `end` and the keys up to `end`; queries and keys
        must be of the same tokens.
        """
        queries, keys = self.queries, self.keys
        return AttentionMask(
            None if queries is None else queries[:, start:end],
            None if keys is None else keys[:, :end],
            jnp.full((), start, jnp.int32),
            self.window,
        )

    def query_blocks(self, blocks: int, length: int) -> AttentionMask:
        """Of `blocks` equal blocks of the T = `length` queries, on a new leading axis n of
        `queries` and `first`; `keys` are left out, as all blocks share them.
        """
        starts = jnp.arange(blocks, dtype=jnp.int32) * (length // blocks)
        first = starts if self.first is None else self.first + starts
        queries = self.queries
        if queries is not None:
            queries = jnp.moveaxis(queries.reshape(len(queries), blocks, -1), 1, 0)
        return AttentionMask(queries, None, first, self.window)
