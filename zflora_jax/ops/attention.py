"""Grouped-query attention: in blocks of queries with a backward pass of its own, by cuDNN's kernel
where that applies. The plain operation is `plain_attention`.

Einsum legend: B batch, T query positions, S key positions, H query heads, K key/value heads, G
query heads of a key head, q their G*T queries, k head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from zflora_jax.ops.linear import Array
from zflora_jax.ops.remat import save_for_backward
from zflora_jax.parallel.devices import widest_head


def attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """Grouped-query attention, softmax in float32.

    Args:
      q: [B, T, H, k].
      k: [B, K, k, S].
      v: [B, K, S, k].
      mask: [B, 1, T, S] bool, True where a query attends to a slot.
      scale: of the scores.

    Returns:
      [B, T, H, k], equal to `plain_attention`.
    """
    q, k, v = (save_for_backward(x, "heads") for x in (q, k, v))
    if cudnn_applies(q, k.shape[-1]):
        return fused_attention(q, k, v, mask, scale)
    # The queries of the G = H / K heads that share keys lie below each other, so that every product
    # is one plain matrix product per row and key head.
    (B, T, H, dim), K = q.shape, k.shape[1]
    out = _attention(q.reshape(B, T, K, H // K, dim).transpose(0, 2, 3, 1, 4), k, v, mask, scale)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def plain_attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """`attention` by its formula, head by head."""
    group = q.shape[2] // k.shape[1]
    scores = jnp.einsum("BTHk,BHkS->BHTS", q, jnp.repeat(k, group, axis=1)) * scale
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("BHTS,BHSk->BTHk", weights, jnp.repeat(v, group, axis=1))


def cudnn_applies(q: Array, slots: int) -> bool:
    """Whether cuDNN's attention takes queries q [B, T, H, k] and `slots` keys, in both passes:
    16-bit numbers, even lengths, k a multiple of 8 and not wider than `devices.widest_head`. One
    query alone is left to the plain products, which read the cache as it lies.
    """
    even = q.shape[1] > 1 and q.shape[1] % 2 == 0 and slots % 2 == 0
    if not even or q.shape[3] % 8 != 0 or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return q.shape[3] <= widest_head()


def fused_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    scale: float,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Array:
    """The same as `attention`, by `jax.nn.dot_product_attention`."""
    # Needs no memory for T x S scores (docs/method.md); not timed on a GPU by this project.
    return jax.nn.dot_product_attention(
        q,
        k.transpose(0, 3, 1, 2),
        v.transpose(0, 2, 1, 3),
        mask=mask,
        scale=scale,
        implementation=implementation,
    )


def query_blocks(length: int) -> int:
    """Into how many equal blocks the queries of a sequence are cut: of at most 512 from 1025 tokens
    on, where the length has such a divisor.
    """
    # T/n x S scores per head exist at one time (test_long_sequences_never_hold_all_scores).
    if length <= 1024:
        return 1
    return next(
        (n for n in range(2, length // 128 + 1) if length % n == 0 and length // n <= 512), 1
    )


def _cut(x: Array, blocks: int, axis: int) -> Array:
    """The blocks of `axis` on a new leading axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _probabilities(q: Array, k: Array, mask: Array, scale: float) -> Array:
    """[B, K, GT, S] float32 of q [B, K, G, T, k] and k [B, K, k, S]."""
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.einsum("BKqk,BKkS->BKqS", flat, k, preferred_element_type=jnp.float32) * scale
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[2:])
    return jax.nn.softmax(
        jnp.where(mask[:, :, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape),
        axis=-1,
    )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """[B, K, G, T, k] of q of that shape."""

    def attend(block: tuple[Array, Array]) -> Array:
        p = _probabilities(block[0], k, block[1], scale).astype(q.dtype)
        # In float32, as XLA's CPU compiler then reads bfloat16 values as they lie
        # (`linear.bfloat16_product`).
        out = jnp.einsum("BKqS,BKSk->BKqk", p, v, preferred_element_type=jnp.float32)
        return out.reshape(*block[0].shape[:-1], -1).astype(q.dtype)

    n = query_blocks(q.shape[3])
    return (
        attend((q, mask))
        if n == 1
        else _join(jax.lax.map(attend, (_cut(q, n, 3), _cut(mask, n, 2))), 3)
    )


def _attention_forward(
    q: Array, k: Array, v: Array, mask: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    out = save_for_backward(_attention(q, k, v, mask, scale), "heads")
    return out, (q, k, v, mask, out)


def _attention_backward(
    scale: float, saved: tuple[Array, ...], d_out: Array
) -> tuple[Array, Array, Array, None]:
    """As in FlashAttention (arXiv 2205.14135, section 3.1) the probabilities are computed again
    instead of kept: T x S numbers per head and layer.

    The products over queries have their narrow operand on the left; `linear.matmul` says why.
    """
    q, k, v, mask, out = saved

    def block_gradients(
        q: Array, mask: Array, out: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        shape, p = q.shape, _probabilities(q, k, mask, scale)
        q, out, d_out = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, out, d_out))
        d_v = jnp.einsum(
            "BKqk,BKqS->BKkS", d_out, p.astype(q.dtype), preferred_element_type=jnp.float32
        )
        d_p = jnp.einsum("BKqk,BKSk->BKqS", d_out, v, preferred_element_type=jnp.float32)
        mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = p * (d_p - mean) * scale
        grouped = d_scores.reshape(*d_scores.shape[:2], -1, *mask.shape[2:])
        # p is zero where nothing is attended to, but in a row that attends to nothing at all.
        d_scores = jnp.where(mask[:, :, None], grouped, 0.0).reshape(d_scores.shape).astype(q.dtype)
        d_k = jnp.einsum("BKqk,BKqS->BKkS", q, d_scores, preferred_element_type=jnp.float32)
        return jnp.einsum("BKqS,BKkS->BKqk", d_scores, k).reshape(shape), d_k, d_v

    n = query_blocks(q.shape[3])
    if n == 1:
        d_q, d_k, d_v = block_gradients(q, mask, out, d_out)
    else:

        def add(
            total: tuple[Array, Array], block: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], Array]:
            d_q, d_k, d_v = block_gradients(*block)
            return (total[0] + d_k, total[1] + d_v), d_q

        zero = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32))
        (d_k, d_v), d_q = jax.lax.scan(
            add,
            zero,
            tuple(_cut(x, n, axis) for x, axis in ((q, 3), (mask, 2), (out, 3), (d_out, 3))),
        )
        d_q = _join(d_q, 3)
    return d_q, d_k.astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)
