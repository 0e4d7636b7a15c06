"""Flash attention by jax's kernels: splash attention in Pallas for TPUs, cuDNN's for NVIDIA GPUs.

Both take q, k and v as `attention.attention` does, with S = T, and compute causal attention within
segments ([B, T] bool, real tokens and padding, or int32; None for one) and a window. This project
has not run them on a TPU or a GPU. Letters as in `attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zflora_jax.ops.linear import Array
from zflora_jax.parallel.devices import allow_absent_cudnn, widest_head

# --- splash attention -----------------------------------------------------------------------------

LANES = 128  # a block is a multiple of these
WIDEST = 256  # head dim; wider ones were not compiled


def splash_refuses(length: int, width: int, dtype: Any) -> str:
    """The reason to refuse T = length, head dim k = width and this dtype; "" for none."""
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
    """Attention on a TPU. interpret: Run as plain operations, for tests on a CPU."""
    (B, T, H, width), K = q.shape, k.shape[1]
    queries = (q * jnp.asarray(scale, q.dtype)).reshape(B, T, K, H // K, width)
    given = (queries.transpose(0, 2, 3, 1, 4), k.swapaxes(2, 3), v)
    # Whole blocks: the padding at the end lies in the future of all tokens.
    more = -T % LANES
    q, k, v = (jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, more), (0, 0))) for x in given)
    if segments is not None:
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, more)))
    out = _splash(q, k, v, segments, window, interpret)[..., :T, :]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, width)


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
    mask: Any = masks.CausalMask((length, length))
    if window is not None:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    size = next(size for size in (512, 384, 256, 128) if length % size == 0)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * group),
        # Not the fused backward kernel, whose d_q needs a part for each block of keys.
        block_sizes=splash.BlockSizes(*(size,) * 8),
        residual_checkpoint_name="heads",  # its result and the sums of its softmax
        interpret=interpret,
    )
    if segments is None:
        return jax.vmap(jax.vmap(kernel))

    def row(q: Array, k: Array, v: Array, ids: Array) -> Array:
        alike = splash.SegmentIds(ids, ids)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, alike))(q, k, v)

    return lambda q, k, v: jax.vmap(row)(q, k, v, segments)


# --- cuDNN ----------------------------------------------------------------------------------------


def cudnn_refuses(width: int, dtype: Any, packed: bool) -> str:
    """The reason to refuse head dim k = width and this dtype, with segments of packed rows if
    `packed`; "" for none.
    """
    dtype, widest = jnp.dtype(dtype), widest_head()
    if packed:
        return "packed rows (data.packing): cuDNN would need their segments as a T x T bias"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention has no {dtype.name}"
    if width % 8:
        return f"heads of {width} channels are no multiple of 8"
    return "" if width <= widest else f"heads of {width} channels are wider than {widest}"


def cudnn_attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    scale: float,
    window: int | None = None,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Array:
    """Attention on a GPU without packed segments. Padding is moved behind the real tokens, which do
    not see it there. implementation: "xla" computes the same without cuDNN, for tests.
    """
    k, v = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
    if segments is not None:
        order = jnp.argsort(~segments, axis=1, stable=True)
        q, k, v = (_reordered(x, order) for x in (q, k, v))
    allow_absent_cudnn()
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out if segments is None else _reordered(out, jnp.argsort(order, axis=1))


def _reordered(x: Array, order: Array) -> Array:
    """Tokens of x [B, T, heads, k] in another order [B, T] int32."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1, mode="promise_in_bounds")
