"""Attention by splash attention, jax's flash kernel for TPUs in Pallas.

Legend: B batch, T positions, H query heads, K key/value heads, G query heads of a key head, k
head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.ops.linear import Array

LANES = 128  # a block is a multiple of these
WIDEST = 256  # head dim; wider ones were not compiled


def splash_refuses(length: int, width: int, dtype: Any) -> str:
    """Why the kernel does not take T = length, head dim k = width and this dtype; "" if it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"splash attention has no {jnp.dtype(dtype).name}"
    if length < LANES:
        return f"{length} positions are less than one block of {LANES}"
    return "" if width <= WIDEST else f"heads of {width} channels are wider than {WIDEST}"


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments ([B, T] int32 or bool; None for one) and a window; shapes as
    in `attention.attention`, S = T. interpret: run as plain operations, for tests on a CPU.
    """
    (B, T, H, width), K = q.shape, k.shape[1]
    queries = (q * jnp.asarray(scale, q.dtype)).reshape(B, T, K, H // K, width)
    given = (queries.transpose(0, 2, 3, 1, 4), k.swapaxes(2, 3), v)
    # Whole blocks: what is added at the end lies in the future of all tokens.
    more = -T % LANES
    q, k, v = (jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, more), (0, 0))) for x in given)
    if segments is not None:
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, more)))
    out = _splash(q, k, v, segments, window, interpret)[..., :T, :]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, width)


def block_size(length: int) -> int:
    """The largest block, at most 512, that divides a multiple of 128."""
    return next(size for size in (512, 384, 256, 128) if length % size == 0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _splash(
    q: Array, k: Array, v: Array, segments: Array | None, window: int | None, interpret: bool
) -> Array:
    """[B, K, G, T, k] of q of that shape and of k and v [B, K, T, k]."""
    return _traced(q, lambda: _kernel(q, segments, window, interpret)(q, k, v))


def _splash_forward(
    q: Array, k: Array, v: Array, segments: Array | None, window: int | None, interpret: bool
) -> tuple[Array, tuple[Any, Array]]:
    out, back = _traced(q, lambda: jax.vjp(_kernel(q, segments, window, interpret), q, k, v))
    return out, (back, q)


def _splash_backward(
    window: int | None, interpret: bool, saved: tuple[Any, Array], d_out: Array
) -> tuple[Array, Array, Array, None]:
    back, q = saved
    return (*_traced(q, lambda: back(d_out)), None)


_splash.defvjp(_splash_forward, _splash_backward)


def _traced(q: Array, function: Callable[[], Any]) -> Any:
    """function(), traced with the settings of jax that the kernel is written for."""
    # The TPU compiler refuses bfloat16 products of any other precision.
    exact = q.dtype == jnp.float32
    precision = nullcontext() if exact else jax.default_matmul_precision("default")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), precision:
        return function()


def _kernel(
    q: Array, segments: Array | None, window: int | None, interpret: bool
) -> Callable[..., Array]:
    """The kernel over q [B, K, G, T, k], k and v [B, K, T, k]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
        splash_attention_mask as masks,
    )

    group, length = q.shape[2:4]
    square = (length, length)
    mask: Any = masks.CausalMask(square)
    if window is not None:
        mask = masks.LocalMask(square, (window - 1, 0), 0)
    size = block_size(length)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * group),
        # Not the fused backward kernel, whose d_q takes a part for each block of keys.
        block_sizes=splash.BlockSizes(*(size, size, size), *(size, size, size), *(size, size)),
        residual_checkpoint_name="heads",  # its result and the sums of its softmax
        interpret=interpret,
    )
    if segments is None:
        return jax.vmap(jax.vmap(kernel))

    def row(q: Array, k: Array, v: Array, ids: Array) -> Array:
        alike = splash.SegmentIds(ids, ids)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, alike))(q, k, v)

    return lambda q, k, v: jax.vmap(row)(q, k, v, segments)
