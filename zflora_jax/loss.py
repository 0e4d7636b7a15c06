"""Next-token cross-entropy on chosen positions, in chunks, so that the logits of a whole batch never exist at one time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def masked_cross_entropy(
    logits_fn: Callable[[Array], Array], hidden: Array, tokens: Array, loss_mask: Array, chunk: int, groups: int = 1
) -> tuple[Array, Array]:
    """Sum of -log p over the chosen tokens, and their number (both float32 scalars).

    logits_fn: [groups, chunk, d] -> [groups, chunk, V] float32. hidden [B, T, d]; tokens int32 [B, T]; loss_mask bool [B, T]: position t counts when
    the *token at t* is to be predicted (from hidden t-1). Chosen positions are gathered to the front, `chunk` at a time go through the head, and
    chunks without any are skipped. The backward pass recomputes a chunk's logits: one chunk of logits is alive at a time in both directions.

    groups: equal parts of the rows, each gathered for itself: as many as devices that the rows are divided over, so that none needs another's rows.
    """
    x = hidden[:, :-1].reshape(groups, -1, hidden.shape[-1])
    targets, mask = tokens[:, 1:].reshape(groups, -1), loss_mask[:, 1:].reshape(groups, -1)
    positions = mask.shape[1]
    chunks = -(-positions // chunk)
    order = jnp.pad(jnp.argsort(~mask, axis=1, stable=True), ((0, 0), (0, chunks * chunk - positions)))
    live = jnp.arange(chunks * chunk)[None] < jnp.sum(mask, axis=1, keepdims=True)
    order, live = (a.reshape(groups, chunks, chunk).swapaxes(0, 1) for a in (order, live))

    def chunk_loss(rows: Array, wanted: Array, keep: Array) -> Array:
        logits = logits_fn(rows)
        # A sum over the vocabulary instead of a gather: where the vocabulary is divided over devices, each sums its part.
        chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1])[None, None] == wanted[..., None], logits, 0.0), axis=-1)
        return jnp.sum(jnp.where(keep, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0))

    # checkpoint is outside cond: inside, cond would return the head among its residuals and scan would stack one copy of it per chunk.
    @jax.checkpoint
    def live_loss(rows: Array, wanted: Array, keep: Array) -> Array:
        return jax.lax.cond(jnp.any(keep), chunk_loss, lambda *_: jnp.zeros((), jnp.float32), rows, wanted, keep)

    def body(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        index, keep = inputs
        # The gather is outside cond, so that its transpose is one scatter per chunk and not a branch.
        rows = jnp.take_along_axis(x, index[..., None], axis=1)
        return total + live_loss(rows, jnp.take_along_axis(targets, index, axis=1), keep), None

    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), (order, live))
    return total, jnp.sum(mask).astype(jnp.float32)
