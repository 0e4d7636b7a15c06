"""Grouped-query attention: splash attention on TPUs, cuDNN's on NVIDIA GPUs, plain products in
blocks elsewhere and where those two do not apply. The plain operation is `plain_attention`.

Legend: B batch, T query positions, S key positions, H query heads, K key/value heads, k head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from zflora_jax.ops.attention_blocks import block_attention
from zflora_jax.ops.attention_cudnn import cudnn_attention, cudnn_refuses
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.ops.attention_splash import splash_attention, splash_refuses
from zflora_jax.ops.linear import Array
from zflora_jax.ops.remat import save_for_backward
from zflora_jax.parallel.devices import device_in_use
from zflora_jax.parallel.mesh import batch_axes, several_devices

FLASH: dict[str, Callable[..., Array]] = {"splash": splash_attention, "cudnn": cudnn_attention}


def attention(q: Array, k: Array, v: Array, mask: AttentionMask, scale: float) -> Array:
    """Grouped-query attention, softmax in float32.

    Args:
      q: [B, T, H, k].
      k: [B, K, k, S].
      v: [B, K, S, k].
      mask: What attends to what.
      scale: Factor of the scores.

    Returns:
      [B, T, H, k], equal to `plain_attention` but at padding, where it is any finite number.
    """
    q, k, v = (save_for_backward(x, "heads") for x in (q, k, v))
    kernel, _ = attention_choice(q.shape, k.shape[1], q.dtype, mask, scale)
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
    shape: tuple[int, ...],
    kv_heads: int,
    dtype: Any,
    mask: AttentionMask,
    scale: float | None = None,
) -> tuple[str, str]:
    """Chooses the attention kernel for the device in use: ("splash", "cudnn" or "blocks", why it is
    not a flash kernel or "").

    Args:
      shape: (B, T, H, k) of the queries.
      kv_heads: Number of key/value heads, K.
      dtype: Data type of queries, keys and values.
      mask: Mask of arrays or ShapeDtypeStructs; packed rows have int32 `queries`.
      scale: Factor of the scores; None for k**-0.5.
    """
    rows, length, _, width = shape
    device = device_in_use()
    flash = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform)
    if flash is None:
        return "blocks", f"no flash kernel for {device.platform}"
    if length == 1:
        return "blocks", "one query a row: plain products read the cache as it lies"
    if not mask.same_tokens:
        return "blocks", "queries follow a cache: their first slot is not known to the compiler"
    if several_devices():
        mesh = jax.sharding.get_abstract_mesh()
        if batch_axes(rows) is None:
            return "blocks", f"the mesh does not divide {rows} rows"
        if kv_heads % mesh.shape["tensor"]:
            return "blocks", f"tensor={mesh.shape['tensor']} does not divide {kv_heads} key heads"
    packed = mask.queries is not None and mask.queries.dtype != bool
    if flash == "splash":
        refusal = splash_refuses(length, width, dtype)
    else:
        refusal = cudnn_refuses(length, width, dtype, packed, scale or width**-0.5)
    return ("blocks", refusal) if refusal else (flash, "")
