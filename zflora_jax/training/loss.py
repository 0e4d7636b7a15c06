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
# Rows [g, c, d], the token each is to predict [g, c] int32, whether it counts [g, c] bool.
Part = tuple[Array, Array, Array]


def masked_cross_entropy(
    logits_fn: Callable[[Array], Array],
    hidden: Array,
    tokens: Array,
    loss_mask: Array,
    chunk: int,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Sum of -log p over the chosen tokens, and their number.

    Chosen positions are gathered to the front, `chunk` at a time go through the head, and chunks
    without any are skipped. One chunk of logits is alive at a time, and each is computed once: see
    `_summed`.

    Args:
      logits_fn: the head, [1, chunk, d] -> [1, chunk, V] float32.
      hidden: [B, T, d], what the head is applied to.
      tokens: [B, T] int32.
      loss_mask: [B, T] bool. Position t counts if the token *at t* is to be predicted, from
        hidden[:, t - 1].
      chunk: positions of a group whose logits exist at one time.
      groups: into how many equal parts the rows are divided, each gathered for itself: the number
        of devices that hold rows, so that no device needs the rows of another.

    Returns:
      (sum in nats, number of tokens), float32 scalars.
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
    # What the head is made of becomes an argument, so that its gradient can be asked for; of one
    # group, so that each can have its own.
    convertible, head = jax.closure_convert(
        logits_fn, jax.ShapeDtypeStruct((1, chunk, x.shape[-1]), x.dtype)
    )
    return _summed(convertible, head, *parts), jnp.sum(mask).astype(jnp.float32)


def _chunk_loss(
    logits_fn: Callable[..., Array], head: Sequence[Array], rows: Array, wanted: Array, keep: Array
) -> Array:
    logits = (
        logits_fn(rows, *head)
        if len(rows) == 1
        else jax.vmap(lambda group: logits_fn(group[None], *head)[0])(rows)
    )
    # A sum over the vocabulary instead of a gather: where the vocabulary is divided over devices,
    # each sums its part.
    chosen = jnp.sum(
        jnp.where(jnp.arange(logits.shape[-1])[None, None] == wanted[..., None], logits, 0.0),
        axis=-1,
    )
    return jnp.sum(jnp.where(keep, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    logits_fn: Callable[..., Array], head: Sequence[Array], rows: Array, wanted: Array, live: Array
) -> Array:
    """The loss of all chunks: rows [n, g, c, d], wanted and live [n, g, c].

    Where a gradient is wanted the forward pass computes it chunk by chunk, while the chunk's logits
    are there (as the fused cross-entropy of Liger Kernel, arXiv 2410.10989, section 3.2): a loss is
    a scalar, so the backward pass only scales it, and no logits are kept or computed again.
    """

    def body(total: Array, part: Part) -> tuple[Array, None]:
        loss = partial(_chunk_loss, logits_fn, head)
        return (
            total
            + jax.lax.cond(jnp.any(part[2]), loss, lambda *_: jnp.zeros((), jnp.float32), *part),
            None,
        )

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (rows, wanted, live))[0]


def _summed_forward(
    logits_fn: Callable[..., Array], head: Any, rows: Any, wanted: Any, live: Any
) -> tuple[Array, tuple[Any, Array]]:
    trained = any(leaf.perturbed for leaf in head)  # a frozen head gets no gradient
    values, groups = [leaf.value for leaf in head], rows.value.shape[1]
    loss_of = partial(_chunk_loss, logits_fn)

    def of_group(rows: Array, wanted: Array, keep: Array) -> Any:
        loss, (d_head, d_rows) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            values, rows[None], wanted[None], keep[None]
        )
        return loss, d_head, d_rows[0]

    def gradient(*part: Array) -> tuple[Array, Any, Array]:
        """Loss, gradient of the head, and of the rows [g, c, d].

        The head's is summed in every group for itself, [g, *head]: with groups on different devices
        one sum over them, after the last chunk, is enough.
        """
        if not trained:
            loss, d_rows = jax.value_and_grad(loss_of, argnums=1)(values, *part)
            return loss, [], d_rows
        loss, d_head, d_rows = jax.vmap(of_group)(*part)
        return jnp.sum(loss), d_head, d_rows

    zero_head = [jnp.zeros((groups, *leaf.shape), leaf.dtype) for leaf in values] if trained else []

    def body(carry: tuple[Array, Any], part: Part) -> tuple[tuple[Array, Any], Array]:
        def nothing(rows: Array, *_: Array) -> tuple[Array, Any, Array]:
            return jnp.zeros((), jnp.float32), zero_head, jnp.zeros_like(rows)

        loss, d_head, d_rows = jax.lax.cond(jnp.any(part[2]), gradient, nothing, *part)
        return jax.tree.map(jnp.add, carry, (loss, d_head)), d_rows

    start = jnp.zeros((), jnp.float32), zero_head
    (total, d_head), d_rows = jax.lax.scan(body, start, (rows.value, wanted.value, live.value))
    return total, ([jnp.sum(leaf, axis=0) for leaf in d_head], d_rows)


def _summed_backward(
    logits_fn: Callable[..., Array], saved: tuple[Any, Array], d_total: Array
) -> tuple[Any, Array, None, None]:
    d_head, d_rows = jax.tree.map(
        lambda g: (d_total * g.astype(jnp.float32)).astype(g.dtype), saved
    )
    return d_head or None, d_rows, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
