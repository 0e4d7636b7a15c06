"""Next-token losses on chosen positions, in chunks, so that the logits of a whole batch never exist
at one time.

Legend of shapes: B batch, T positions, d residual width, V vocabulary, g groups, c positions of a
chunk, n chunks, S sequences of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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
    """Returns (sum of -log p over the chosen tokens in nats, their number), float32 scalars.

    Chosen positions are gathered to the front and go through the head in chunks; those without any
    are skipped. Each chunk's logits are computed once, see `_summed`.

    Args:
      logits_fn: Output head, [1, chunk, d] -> [1, chunk, V] float32.
      hidden: Inputs of the head, [B, T, d].
      tokens: Token ids, [B, T] int32.
      loss_mask: [B, T] bool. Position t counts if the token *at t* is to be predicted, from
        hidden[:, t - 1].
      chunk: Positions of a group with logits at one time (`TrainConfig.loss_chunk`).
      groups: Equal parts of the rows, one for each device that holds rows, so that no device needs
        the rows of another.
    """
    parts = _chunks((hidden[:, :-1], tokens[:, 1:]), loss_mask[:, 1:], chunk, groups)
    shape = 1, parts[0].shape[2], hidden.shape[-1]
    # The head's weights become an argument, so that they can have a gradient; the shape is that of
    # one group, so that each group can have its own.
    convertible, head = jax.closure_convert(logits_fn, jax.ShapeDtypeStruct(shape, hidden.dtype))
    return _summed(convertible, head, *parts), jnp.sum(loss_mask[:, 1:]).astype(jnp.float32)


class PairSums(NamedTuple):
    """Sums over the learned tokens of the chosen and the rejected sequence of each row, [B, 2]."""

    log_p: Array  # log-probability, nats
    reference: Array  # log-probability under the reference, nats
    kl: Array  # Kullback-Leibler divergence from the reference at each token, nats; no gradient
    tokens: Array  # their number


def pair_sums(
    logits_fn: Callable[[Array], Array],
    reference_fn: Callable[[Array], Array],
    hidden: Array,
    reference_hidden: Array,
    batch: Mapping[str, Array],
    chunk: int,
    groups: int = 1,
) -> PairSums:
    """Compares two models on pairs of sequences; the first has a gradient.

    Args:
      logits_fn: The head, [g, c, d] -> [g, c, V] float32.
      reference_fn: The head of the reference.
      hidden: Inputs of the head, [B, T, d].
      reference_hidden: Inputs of the reference's head, [B, T, d].
      batch: "tokens" [B, T] int32, "loss_mask" [B, T] bool and "segments" [B, T] int32, 1 for the
        tokens of the chosen sequence and 2 for those of the rejected one.
      chunk, groups: Those of `masked_cross_entropy`.
    """
    rows = len(hidden)
    # The number of each token's sequence in its group.
    of = 2 * (jnp.arange(rows) % (rows // groups))[:, None] + batch["segments"][:, 1:] - 1
    arrays = hidden[:, :-1], reference_hidden[:, :-1], batch["tokens"][:, 1:], of
    parts = _chunks(arrays, batch["loss_mask"][:, 1:], chunk, groups)
    sequences = jnp.arange(2 * rows // groups)[None, None]

    def compare(x: Array, other: Array, wanted: Array, of: Array, live: Array) -> tuple[Array, Any]:
        ours = jax.nn.log_softmax(logits_fn(x))
        theirs = jax.lax.stop_gradient(jax.nn.log_softmax(reference_fn(other)))
        kl = jax.lax.stop_gradient(jnp.sum(jnp.exp(ours) * (ours - theirs), axis=-1))
        found = _pick(ours, wanted), _pick(theirs, wanted), kl, jnp.ones_like(kl)
        mine = (of[..., None] == sequences) & live[..., None]  # [g, c, S]
        return jnp.stack(
            [jnp.sum(jnp.where(mine, x[..., None], 0.0), axis=1) for x in found], -1
        ), ()

    sums, _ = _over_chunks(compare, *parts)
    return PairSums(*jnp.moveaxis(sums.reshape(rows, 2, 4), -1, 0))


def _chunks(arrays: Sequence[Array], mask: Array, chunk: int, groups: int) -> list[Array]:
    """Returns `arrays` [B, T, ...] as [n, g, c, ...] with the positions of `mask` [B, T] in front,
    then a mask of these positions, [n, g, c].
    """
    mask = mask.reshape(groups, -1)
    positions = mask.shape[1]
    # A chunk with one chosen position costs as much as a full one.
    chunk = max(1, min(chunk, positions, max(256, -(-positions // 4))))
    chunks = -(-positions // chunk)
    order = jnp.pad(
        jnp.argsort(~mask, axis=1, stable=True), ((0, 0), (0, chunks * chunk - positions))
    )
    live = jnp.arange(chunks * chunk)[None] < jnp.sum(mask, axis=1, keepdims=True)
    flat = [a.reshape(groups, positions, *a.shape[2:]) for a in arrays]
    chosen = [
        jnp.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), axis=1)
        for a in flat
    ]
    return [a.reshape(groups, chunks, chunk, *a.shape[2:]).swapaxes(0, 1) for a in (*chosen, live)]


def _pick(values: Array, wanted: Array) -> Array:
    """Values [g, c, V] at the tokens `wanted` [g, c]: a sum over the vocabulary, not a gather, so
    that each device sums its part if the vocabulary is divided.
    """
    is_wanted = jnp.arange(values.shape[-1])[None, None] == wanted[..., None]
    return jnp.sum(jnp.where(is_wanted, values, 0.0), axis=-1)


def _chunk_loss(
    logits_fn: Callable[..., Array], head: Sequence[Array], rows: Array, wanted: Array, keep: Array
) -> Array:
    """Loss of a chunk. rows: [g, c, d]; wanted: Next tokens [g, c] int32; keep: Mask [g, c]."""
    if len(rows) == 1:
        logits = logits_fn(rows, *head)
    else:
        logits = jax.vmap(lambda group: logits_fn(group[None], *head)[0])(rows)
    losses = jax.nn.logsumexp(logits, axis=-1) - _pick(logits, wanted)
    return jnp.sum(jnp.where(keep, losses, 0.0))


def _over_chunks(compute: Callable[..., Any], *parts: Array) -> tuple[Any, Any]:
    """(Sum, stack) of `compute(*parts)` over the chunks; zero for chunks without a token in the
    mask parts[-1]. A gradient through it computes each chunk again.
    """
    shapes = jax.eval_shape(
        compute, *(jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in parts)
    )

    def zeros(*_: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.checkpoint
    def body(total: Any, part: Sequence[Array]) -> tuple[Any, Any]:
        summed, stacked = jax.lax.cond(jnp.any(part[-1]), compute, zeros, *part)
        return jax.tree.map(jnp.add, total, summed), stacked

    return jax.lax.scan(body, zeros()[0], parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    logits_fn: Callable[..., Array], head: Sequence[Array], rows: Array, wanted: Array, live: Array
) -> Array:
    """The loss of all chunks: rows [n, g, c, d], wanted and live [n, g, c].

    If a gradient is wanted, the forward pass computes it chunk by chunk, while the chunk's logits
    exist (like the fused cross-entropy of Liger Kernel, arXiv 2410.10989, section 3.2). A loss is a
    scalar, so the backward pass only scales it, and no logits are kept or computed again.
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
