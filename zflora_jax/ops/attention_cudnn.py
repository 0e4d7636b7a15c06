"""Attention by cuDNN's flash kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

cuDNN has a flag for causal attention. Padding is moved behind the real tokens, which do not see it
there. Segments of packed rows are encoded in channels that are added to the heads: cuDNN takes
them only as a dense T x T bias, whose gradient it computes too. Not run on a GPU by this project.

Legend: B batch, T positions, H query heads, K key/value heads, k head dim.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zflora_jax.ops.linear import Array
from zflora_jax.parallel.devices import allow_absent_cudnn, widest_head

GAP = 512.0  # a score of another segment is lower by at least so much, after the scale
MAX_SEGMENT_BITS = 15
SEGMENT_CHANNELS = MAX_SEGMENT_BITS + 1


def cudnn_refuses(length: int, width: int, dtype: Any, packed: bool, scale: float) -> str:
    """Why the kernel does not take T = length, head dim k = width and this dtype, with segments of
    packed rows if `packed`; "" if it does.
    """
    dtype, widest = jnp.dtype(dtype), widest_head()
    total = width + (SEGMENT_CHANNELS if packed else 0)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention has no {dtype.name}"
    if width % 8:
        return f"heads of {width} channels are no multiple of 8"
    if total > widest:
        more = f" and {SEGMENT_CHANNELS} for segments" if packed else ""
        return f"heads of {width} channels{more} are wider than {widest}"
    if packed and length > 2**MAX_SEGMENT_BITS:
        return f"{length} positions may have more segments than 2**{MAX_SEGMENT_BITS}"
    if packed and MAX_SEGMENT_BITS * _step(scale) > float(jnp.finfo(dtype).max):
        return f"{dtype.name} does not hold scores of segments at a scale of {scale}"
    return ""


def cudnn_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    scale: float,
    window: int | None = None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Array:
    """Causal attention within segments ([B, T] int32 or bool; None for one) and a window; shapes as
    in `attention.attention`, S = T. implementation: "xla" computes the same without cuDNN, for
    tests.
    """
    width, k, v = q.shape[3], k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
    back = None
    if segments is not None and segments.dtype == bool:
        order = jnp.argsort(~segments, axis=1, stable=True)
        back = jnp.argsort(order, axis=1)
        q, k, v = (_reordered(x, order, back) for x in (q, k, v))
    elif segments is not None:
        of_queries, of_keys = segment_channels(segments, scale, q.dtype)
        q, k = _widened(q, of_queries), _widened(k, of_keys)
        v = _widened(v, jnp.zeros_like(of_keys))
    allow_absent_cudnn()
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out[..., :width] if back is None else _reordered(out, back, order)


def segment_channels(segments: Array, scale: float, dtype: Any) -> tuple[Array, Array]:
    """Channels [B, T, 16] of queries and of keys whose product is exactly 0 within a segment and at
    most -GAP / scale between two, so that weights between segments are zero in float32.

    Segments [B, T] int32, runs of equal ids, are numbered in 15 bits of 1 and -1. Two numbers that
    differ in n bits have the product 15 - 2 n; one more channel subtracts 15.
    """
    changes = jnp.concatenate(
        [jnp.zeros_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    number = jnp.cumsum(changes, axis=1, dtype=jnp.int32)[..., None]
    bits = jnp.right_shift(number, jnp.arange(MAX_SEGMENT_BITS, dtype=jnp.int32)[None, None]) & 1
    signs, one = 2 * bits - 1, jnp.ones_like(number)
    of_queries = jnp.concatenate([signs, one], axis=-1).astype(dtype)
    of_keys = jnp.concatenate([signs, -MAX_SEGMENT_BITS * one], axis=-1).astype(dtype)
    return of_queries, of_keys * jnp.asarray(_step(scale), dtype)


def _step(scale: float) -> float:
    """Half of what a differing bit subtracts: a power of two, exact in all dtypes."""
    return 2.0 ** math.ceil(math.log2(GAP / 2 / scale))


def _widened(x: Array, channels: Array) -> Array:
    """x [B, T, heads, k] with channels [B, T, n] at the end of each head."""
    wide = jnp.broadcast_to(channels[:, :, None], (*x.shape[:3], channels.shape[-1]))
    return jnp.concatenate([x, wide], axis=-1)


@jax.custom_vjp
def _reordered(x: Array, order: Array, back: Array) -> Array:
    """Tokens of x [B, T, heads, k] in another order [B, T] int32; `back` is its inverse."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1, mode="promise_in_bounds")


_reordered.defvjp(
    lambda x, order, back: (_reordered(x, order, back), (order, back)),
    # A gather, where jax's own gradient would add token by token.
    lambda saved, d: (_reordered(d, saved[1], saved[0]), None, None),
)
