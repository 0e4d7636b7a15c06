"""Grouped-query attention: splash attention on TPUs, cuDNN's on NVIDIA GPUs, plain products
elsewhere and where those two do not apply. The plain operation is `plain_attention`.

Legend: B batch, T query positions, S key positions, H query heads, K key/value heads, G query heads
of a key head, q their G*T queries, k head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from zflora_jax.ops.attention_flash import (
    cudnn_attention,
    cudnn_refuses,
    splash_attention,
    splash_refuses,
)
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.ops.linear import Array
from zflora_jax.parallel.devices import device_in_use
from zflora_jax.parallel.mesh import batch_axes, several_devices

FLASH: dict[str, Callable[..., Array]] = {"splash": splash_attention, "cudnn": cudnn_attention}


def attention(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    """`plain_attention` of q [B, T, H, k], k [B, K, k, S] and v [B, K, S, k] -> [B, T, H, k], with
    its softmax in float32. Values at padding are finite but arbitrary.
    """
    q, k, v = (checkpoint_name(x, "heads") for x in (q, k, v))
    kernel, _ = attention_choice(q.shape, k.shape[1], q.dtype, mask)
    if kernel == "blocks":
        return block_attention(q, k, v, mask, scale)

    def run(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        return FLASH[kernel](q, k, v, segments, scale, mask.window)

    if not several_devices():
        return run(q, k, v, mask.queries)
    # The compiler cannot divide the kernel: every device runs it on its rows and heads.
    rows = batch_axes(len(q))
    heads = P(rows, "tensor")
    return jax.shard_map(
        run,
        in_specs=(P(rows, None, "tensor"), heads, heads, P(rows)),
        out_specs=P(rows, None, "tensor"),
        check_vma=False,  # which a Pallas kernel does not state
    )(q, k, v, mask.queries)


def plain_attention(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    """`attention` by its formula, head by head."""
    group, dense = q.shape[2] // k.shape[1], mask.dense(q.shape[1], k.shape[3])
    scores = jnp.einsum("BTHk,BHkS->BHTS", q, jnp.repeat(k, group, axis=1)) * scale
    weights = jax.nn.softmax(jnp.where(dense, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("BHTS,BHSk->BTHk", weights, jnp.repeat(v, group, axis=1))


def attention_choice(
    shape: tuple[int, ...], kv_heads: int, dtype: Any, mask: AttentionMask
) -> tuple[str, str]:
    """Chooses the attention kernel for the device in use: ("splash", "cudnn" or "blocks"; the
    reason why it is no flash kernel, or "").

    Args:
      shape: (B, T, H, k) of the queries.
      kv_heads: Number of key/value heads, K.
      dtype: Data type of queries, keys and values.
      mask: Mask of arrays or ShapeDtypeStructs; packed rows have int32 `queries`.
    """
    rows, length, _, width = shape
    platform = device_in_use().platform
    if platform not in ("tpu", "gpu"):
        return "blocks", f"no flash kernel for {platform}"
    if length == 1:
        return "blocks", "one query a row: plain products read the cache in place"
    if mask.first is not None:
        return "blocks", "queries follow a cache: their first slot is not known to the compiler"
    if several_devices():
        tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
        if batch_axes(rows) is None:
            return "blocks", f"the mesh does not divide {rows} rows"
        if kv_heads % tensor:
            return "blocks", f"tensor={tensor} does not divide {kv_heads} key heads"
    packed = mask.queries is not None and mask.queries.dtype != bool
    if platform == "tpu":
        flash, refusal = "splash", splash_refuses(length, width, dtype)
    else:
        flash, refusal = "cudnn", cudnn_refuses(width, dtype, packed)
    return ("blocks", refusal) if refusal else (flash, "")


# --- by plain products ----------------------------------------------------------------------------


def block_attention(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    """`attention` by plain products, with its own backward pass."""
    # Queries that share keys lie below each other: one matrix product per row and key head.
    (B, T, H, dim), K = q.shape, k.shape[1]
    grouped = q.reshape(B, T, K, H // K, dim).transpose(0, 2, 3, 1, 4)
    plain = partial(_attention, scale=scale)
    if grouped.shape[2:4] == (1, 1):
        out = jax.lax.platform_dependent(
            grouped, k, v, mask, tpu=partial(one_query_as_eight, attend=plain), default=plain
        )
    else:
        out = plain(grouped, k, v, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def one_query_as_eight(
    q: Array, k: Array, v: Array, mask: AttentionMask, attend: Callable[..., Array]
) -> Array:
    """`attend` for the one query of each key head [B, K, 1, 1, k], with zeros up to eight."""
    # XLA's TPU compiler multiplies one query with the cache on the vector unit: a fifth more cycles
    # a token for 8 rows of Llama-2-7B.
    return attend(jnp.pad(q, ((0, 0), (0, 0), (0, 7), (0, 0), (0, 0))), k, v, mask)[:, :, :1]


def spans(length: int, mask: AttentionMask) -> list[tuple[int, int]]:
    """(First query, end) of equal spans of queries, which need no key behind their end. There are
    up to four, each a multiple of 128 queries; one for more than 1024, or if they follow a cache.
    """
    # Four spans multiply 10 of 16 squares; eight multiply 36 of 64, in a longer program. Spans of
    # long sequences would hold all their scores at one time.
    several = mask.first is None and length <= 1024
    n = next((n for n in (4, 3, 2) if length % (128 * n) == 0), 1) if several else 1
    return [(i * length // n, (i + 1) * length // n) for i in range(n)]


def query_blocks(length: int) -> int:
    """The number of equal blocks in a loop over queries: from 1025 on, blocks of at most 512."""
    counts = range(2, length // 128 + 1) if length > 1024 else ()
    return next((n for n in counts if length % n == 0 and length // n <= 512), 1)


def _cut(x: Array, blocks: int, axis: int) -> Array:
    """The blocks of `axis` on a new leading axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _probabilities(q: Array, k: Array, mask: AttentionMask, scale: float) -> Array:
    """[B, K, GT, S] float32 of q [B, K, G, T, k] and k [B, K, k, S]."""
    dense = mask.dense(q.shape[3], k.shape[3])
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.einsum("BKqk,BKkS->BKqS", flat, k, preferred_element_type=jnp.float32) * scale
    grouped = scores.reshape(*scores.shape[:2], -1, *dense.shape[2:])
    masked = jnp.where(dense[:, :, None], grouped, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(masked.reshape(scores.shape), axis=-1)


def _span(
    q: Array, k: Array, v: Array, mask: AttentionMask, start: int, end: int
) -> tuple[Array, Array, Array, AttentionMask]:
    """Queries [B, K, G, t, k] of a span, and the keys, values and mask that they need."""
    if (start, end) == (0, q.shape[3]):
        return q, k, v, mask
    return q[:, :, :, start:end], k[..., :end], v[:, :, :end], mask.span(start, end)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    """[B, K, G, T, k] of q of that shape."""
    outs = [_attend(*_span(q, k, v, mask, *at), scale) for at in spans(q.shape[3], mask)]
    return jnp.concatenate(outs, axis=3)


def _attend(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    """`_attention` of one span, block by block."""

    def attend(block: tuple[Array, AttentionMask]) -> Array:
        p = _probabilities(block[0], k, replace(block[1], keys=mask.keys), scale).astype(q.dtype)
        # In float32: XLA's CPU compiler then reads bfloat16 values in place
        # (`linear.bfloat16_product`).
        out = jnp.einsum("BKqS,BKSk->BKqk", p, v, preferred_element_type=jnp.float32)
        return out.reshape(*block[0].shape[:-1], -1).astype(q.dtype)

    n = query_blocks(q.shape[3])
    if n == 1:
        return attend((q, mask))
    return _join(jax.lax.map(attend, (_cut(q, n, 3), mask.query_blocks(n, q.shape[3]))), 3)


def _attention_forward(
    q: Array, k: Array, v: Array, mask: AttentionMask, scale: float
) -> tuple[Array, tuple[Any, ...]]:
    out = checkpoint_name(_attention(q, k, v, mask, scale), "heads")
    return out, (q, k, v, mask, out)


def _attention_backward(
    scale: float, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out = saved
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32)
    d_qs = []
    for start, end in spans(q.shape[3], mask):
        own = slice(start, end)
        d_q, *of_keys = _gradients(
            *_span(q, k, v, mask, start, end), out[:, :, :, own], d_out[:, :, :, own], scale
        )
        d_k, d_v = (
            x + jnp.pad(d, ((0, 0), (0, 0), (0, 0), (0, x.shape[3] - d.shape[3])))
            for x, d in zip((d_k, d_v), of_keys, strict=True)
        )
        d_qs.append(d_q)
    return (
        jnp.concatenate(d_qs, axis=3),
        d_k.astype(k.dtype),
        d_v.swapaxes(2, 3).astype(v.dtype),
        None,
    )


def _gradients(
    q: Array, k: Array, v: Array, mask: AttentionMask, out: Array, d_out: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of one span: of q [B, K, G, t, k], and in float32 of k and v [B, K, k, s]."""
    # As in FlashAttention (arXiv 2205.14135, section 3.1) the probabilities are computed again. The
    # products over queries have their narrow operand on the left; `linear.matmul` says why.
    f32 = jnp.float32

    def block_gradients(
        q: Array, block: AttentionMask, out: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        shape = q.shape
        p = _probabilities(q, k, replace(block, keys=mask.keys), scale)
        q, out, d_out = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, out, d_out))
        d_v = jnp.einsum("BKqk,BKqS->BKkS", d_out, p.astype(q.dtype), preferred_element_type=f32)
        d_p = jnp.einsum("BKqk,BKSk->BKqS", d_out, v, preferred_element_type=f32)
        mean = jnp.sum(d_out.astype(f32) * out.astype(f32), axis=-1, keepdims=True)
        # p is zero where nothing is attended to: no row is fully masked.
        d_scores = (p * (d_p - mean) * scale).astype(q.dtype)
        d_k = jnp.einsum("BKqk,BKqS->BKkS", q, d_scores, preferred_element_type=f32)
        return jnp.einsum("BKqS,BKkS->BKqk", d_scores, k).reshape(shape), d_k, d_v

    n = query_blocks(q.shape[3])
    if n == 1:
        return block_gradients(q, mask, out, d_out)

    def add(
        total: tuple[Array, Array], block: tuple[Any, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        d_q, d_k, d_v = block_gradients(*block)
        return (total[0] + d_k, total[1] + d_v), d_q

    zero = jnp.zeros(k.shape, f32), jnp.zeros(v.swapaxes(2, 3).shape, f32)
    cut_q, cut_out, cut_d = (_cut(x, n, 3) for x in (q, out, d_out))
    blocks = (cut_q, mask.query_blocks(n, q.shape[3]), cut_out, cut_d)
    (d_k, d_v), d_q = jax.lax.scan(add, zero, blocks)
    return _join(d_q, 3), d_k, d_v


_attention.defvjp(_attention_forward, _attention_backward)
