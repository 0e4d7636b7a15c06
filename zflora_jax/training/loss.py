"""Next-token cross-entropy on chosen positions, in chunks, so that the logits of a whole batch
never exist at one time.

Legend of shapes: B batch, T positions, d residual width, V vocabulary, g groups, c positions of a
chunk, n chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def masked_cross_entropy(
    logits_fn: Callable[[Array], Array],
    hidden: Array,
    tokens: Array,
    loss_mask: Array,
    chunk: int,
    groups: int = 1,
) -> tuple[Array, Array]:
    """(Sum of -log p over the chosen tokens in nats, their number), float32 scalars.

    Chosen positions are gathered to the front and go through the head, `chunk` at a time; chunks
    without any are skipped. Each chunk's logits are computed once, see `_summed`.

    Args:
      logits_fn: The head, [1, chunk, d] -> [1, chunk, V] float32.
      hidden: Inputs of the head, [B, T, d].
      tokens: Token ids, [B, T] int32.
      loss_mask: [B, T] bool. Position t counts if the token *at t* is to be predicted, from
        hidden[:, t - 1].
      chunk: Positions of a group whose logits exist at one time.
      groups: Equal parts of the rows, one for each device that holds rows, so that no device needs
        the rows of another.
    """
    x = hidden[:, :-1].reshape(groups, -1, hidden.shape[-1])
    targets, mask = tokens[:, 1:].reshape(groups, -1), loss_mask[:, 1:].reshape(groups, -1)
    positions = mask.shape[1]
    chunk = max(1, min(chunk, positions))
    chunks = -(-positions // chunk)
    order = jnp.pad(
        jnp.argsort(~mask, axis=1, stable=True), ((0, 0), (0, chunks * chunk - positions))
    )
    live = jnp.arange(chunks * chunk)[None] < jnp.sum(mask, axis=1, keepdims=True)
    chosen = (
        jnp.take_along_axis(x, order[..., None], axis=1),
        jnp.take_along_axis(targets, order, axis=1),
        live,
    )
    parts = jax.tree.map(
        lambda a: a.reshape(groups, chunks, chunk, *a.shape[2:]).swapaxes(0, 1), chosen
    )
    # The head's weights become an argument, so that they can have a gradient; of one group, so that
    # each can have its own.
    convertible, head = jax.closure_convert(
        logits_fn, jax.ShapeDtypeStruct((1, chunk, x.shape[-1]), x.dtype)
    )
    return _summed(convertible, head, *parts), jnp.sum(mask).astype(jnp.float32)


def _chunk_loss(
    logits_fn: Callable[..., Array], head: Sequence[Array], rows: Array, wanted: Array, keep: Array
) -> Array:
    """Loss of a chunk: rows [g, c, d], the tokens to predict [g, c] int32, which count [g, c]."""
    if len(rows) == 1:
        logits = logits_fn(rows, *head)
    else:
        logits = jax.vmap(lambda group: logits_fn(group[None], *head)[0])(rows)
    # A sum over the vocabulary instead of a gather: where the vocabulary is divided over devices,
    # each sums its part.
    is_wanted = jnp.arange(logits.shape[-1])[None, None] == wanted[..., None]
    chosen = jnp.sum(jnp.where(is_wanted, logits, 0.0), axis=-1)
    return jnp.sum(jnp.where(keep, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0))


def _over_chunks(compute: Callable[..., Any], *parts: Array) -> tuple[Any, Any]:
    """(Sum, stack) over the chunks of `compute(rows, wanted, live)`, zero where no token counts."""
    shapes = jax.eval_shape(
        compute, *(jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in parts)
    )

    def zeros(*_: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(total: Any, part: Sequence[Array]) -> tuple[Any, Any]:
        summed, stacked = jax.lax.cond(jnp.any(part[2]), compute, zeros, *part)
        return jax.tree.map(jnp.add, total, summed), stacked

    return jax.lax.scan(body, zeros()[0], parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    logits_fn: Callable[..., Array], head: Sequence[Array], rows: Array, wanted: Array, live: Array
) -> Array:
    """The loss of all chunks: rows [n, g, c, d], wanted and live [n, g, c].

    Where a gradient is wanted the forward pass computes it chunk by chunk, while the chunk's logits
    are there (as the fused cross-entropy of Liger Kernel, arXiv 2410.10989, section 3.2): a loss is
    a scalar, so the backward pass only scales it, and no logits are kept or computed again.
    """
    loss = partial(_chunk_loss, logits_fn, head)
    return _over_chunks(lambda *part: (loss(*part), ()), rows, wanted, live)[0]


def _summed_forward(
    logits_fn: Callable[..., Array], head: Any, rows: Any, wanted: Any, live: Any
) -> tuple[Array, tuple[Any, Array]]:
    trained, values = any(leaf.perturbed for leaf in head), [leaf.value for leaf in head]
    loss_of = partial(_chunk_loss, logits_fn)

    def of_group(*part: Array) -> tuple[Array, Any, Array]:
        loss, (d_head, d_rows) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            values, *(x[None] for x in part)
        )
        return loss, d_head, d_rows[0]

    def gradient(*part: Array) -> tuple[tuple[Array, Any], Array]:
        """((loss, gradient of the head), gradient of the rows [g, c, d])."""
        if not trained:
            loss, d_rows = jax.value_and_grad(loss_of, argnums=1)(values, *part)
            return (loss, []), d_rows
        # Every group has its own gradient of the head, [g, *head]: with groups on different devices
        # one all-reduce after the last chunk is enough.
        loss, d_head, d_rows = jax.vmap(of_group)(*part)
        return (jnp.sum(loss), d_head), d_rows

    (total, d_head), d_rows = _over_chunks(gradient, rows.value, wanted.value, live.value)
    return total, ([jnp.sum(leaf, axis=0) for leaf in d_head], d_rows)


def _summed_backward(
    logits_fn: Callable[..., Array], saved: tuple[Any, Array], d_total: Array
) -> tuple[Any, Array, None, None]:
    d_head, d_rows = jax.tree.map(
        lambda g: (d_total * g.astype(jnp.float32)).astype(g.dtype), saved
    )
    return d_head or None, d_rows, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
