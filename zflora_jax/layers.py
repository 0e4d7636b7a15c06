"""Layers of a Llama whose streams may be widened.

A stream is a pair (x, z): base channels and adapter channels, z = None where there are none. A fused model carries everything in x. The same
layers serve both: RMSNorm takes its mean over the base channels, RoPE turns the base dims of a head, Dense adds the adapter's blocks to what the base
kernel computes (design.md section 2; this project's reconstruction of zFLoRA).

Einsum legend: B batch, T query positions, S key positions, H query heads, K key/value heads, q the G*T queries of a key head, d residual width,
k head dim, V vocabulary, n tokens, i and j a block's axes.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.config import AdapterConfig, LlamaConfig

Array = jax.Array


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies of the base head dims, [k/2] float32, with Llama-3 scaling where the config has it (as transformers computes them)."""
    k = config.rotary_dim
    freq = (1.0 / np.float32(config.rope_theta) ** (np.arange(0, k, 2, dtype=np.float32) / np.float32(k))).astype(np.float32)
    if (s := config.rope_scaling) is None:
        return freq
    wavelength = 2 * np.pi / freq
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    # High frequencies stay (smooth >= 1), low ones are divided by the factor (smooth <= 0), the band between is interpolated.
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * freq / s.factor + smooth * freq).astype(np.float32)


def rope_tables(config: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, k/2] float32 of int32 positions [B, T]. Angles are float32 always: bfloat16 cannot tell position 257 from 256."""
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the first k dims of heads x [B, T, heads, k or more]; pairs are (i, i + k/2). Dims beyond k carry no position and pass through."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


class AdaptedModule(nn.Module):
    """A module that may have variables in the `adapters` collection."""

    def base_param(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
        """The base parameter, or what replaces it whole in the adapters (method "full")."""
        if self.has_variable("adapters", name):
            return self.get_variable("adapters", name)
        return self.param(name, init, shape, jnp.float32)

    def block(self, name: str, dtype: jnp.dtype) -> Array:
        value: Array | None = self.get_variable("adapters", name)
        if value is None:
            raise ValueError(f"the adapters lack {'/'.join((*self.path, name))}; make them with init_adapters for this config and adapter.")
        return value.astype(dtype)


class Dense(AdaptedModule):
    """y = x W + s z B and y_z = x A + z C, with the blocks that the adapter has for this kernel; low-rank factors are added to y.

    x [B, T, *in_axes] and z [B, T, *in_axes with the extra width] or None -> (y [B, T, *out_axes], y_z [B, T, *out_axes with the extra width] or
    None).
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    adapter: AdapterConfig | None = None
    blocks: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> tuple[Array, Array | None]:
        n, dtype = len(self.in_axes), x.dtype
        kernel = self.base_param("kernel", nn.initializers.normal(0.02), self.in_axes + self.out_axes)
        product = project if self.has_variable("adapters", "kernel") else jnp.tensordot  # a frozen kernel has no gradient to arrange
        y = product(x, kernel.astype(dtype), n)
        y_z: Array | None = None
        if self.adapter is None or not self.blocks or self.is_initializing():
            return y, y_z
        block, scale = {name: self.block(name, dtype) for name in self.blocks}, self.adapter.scale
        if "forward" in block:
            y_z = project(x, block["forward"], n)
        if z is not None and "backward" in block:
            y = y + scale * project(z, block["backward"], n)
        if z is not None and y_z is not None and "cross" in block:
            y_z = y_z + project(z, block["cross"], n)
        if "lora_a" in block:
            y = y + scale * project(project(x.reshape(*x.shape[:-n], -1), block["lora_a"]), block["lora_b"]).reshape(y.shape)
        if "ffa_a" in block:
            y = y + scale * tile(project(x.reshape(*x.shape[:-n], -1), block["ffa_a"]), math.prod(self.out_axes)).reshape(y.shape)
        return y, y_z


def project(x: Array, block: Array, axes: int = 1) -> Array:
    """The last `axes` axes of x [B, T, ...] against the first of an adapter block -> [B, T, *the block's other axes]."""
    out = block.shape[axes:]
    flat = matmul(x.reshape(*x.shape[:-axes], -1), block.reshape(math.prod(block.shape[:axes]), -1))
    return flat.reshape(*x.shape[:-axes], *out)


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """x [..., i] @ w [i, j], with a gradient of w whose compiled form transposes the narrower of its two operands.

    XLA's CPU compiler transposes the left operand of a product over rows, and fuses what makes that operand into the transposition: with the wide
    gradient of an MLP or attention there, a LoRA step of SmolLM2-135M spent a third of its time in such loops.
    """
    return x @ w


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, d_rows = x.reshape(-1, w.shape[0]), dy.reshape(-1, w.shape[1])
    dw = jnp.einsum("ni,nj->ij", rows, d_rows) if w.shape[0] <= w.shape[1] else jnp.einsum("nj,ni->ji", d_rows, rows).T
    return dy @ w.T, dw


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def tied_logits(x: Array, table: Array) -> Array:
    """x [B, T, d] against an embedding table [V, d] of the same dtype -> logits [B, T, V] float32.

    Gradients are taken in the dtype of the operands: float32 cotangents times a bfloat16 table would run at float32 speed.
    """
    return jnp.einsum("BTd,Vd->BTV", x, table, preferred_element_type=jnp.float32)


def _tied_logits_forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return tied_logits(x, table), (x, table)


def _tied_logits_backward(saved: tuple[Array, Array], d_logits: Array) -> tuple[Array, Array]:
    x, table = saved
    d_logits = d_logits.astype(x.dtype)
    return jnp.einsum("BTV,Vd->BTd", d_logits, table), jnp.einsum("BTd,BTV->dV", x, d_logits).T


tied_logits.defvjp(_tied_logits_forward, _tied_logits_backward)


def tile(h: Array, out: int) -> Array:
    """h R for FFA's fixed tiling R [r, out], R[i, j] = sqrt(r/out) where j mod r = i: h [..., r] -> [..., out]. Orthonormal rows when r
    divides out."""
    rank = h.shape[-1]
    return jnp.take(h, np.arange(out) % rank, axis=-1) * math.sqrt(rank / out)


class RMSNorm(AdaptedModule):
    """x / rms * gain, with the mean square over the first `base_dim` channels; z is divided by the same rms, gain 1. Computed in float32."""

    dim: int
    base_dim: int
    eps: float

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> tuple[Array, Array | None]:
        gain = self.base_param("scale", nn.initializers.ones, (self.dim,))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide[..., : self.base_dim]), axis=-1, keepdims=True) + self.eps)
        y = (wide * inverse * gain.astype(jnp.float32)[None, None, :]).astype(x.dtype)
        return y, None if z is None else (z.astype(jnp.float32) * inverse).astype(z.dtype)


def attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """Grouped-query attention: q [B, T, H, k], k [B, K, k, S], v [B, K, S, k], mask [B, 1, T, S] bool (True = attend) -> [B, T, H, k]. Softmax in
    float32.

    The queries of the G = H / K heads that share keys lie below each other, so that every product is one plain matrix product per row and key head.
    """
    (B, T, H, dim), K = q.shape, k.shape[1]
    q = q.reshape(B, T, K, H // K, dim).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, dim)
    out = _attention(q, k, v, mask, scale)
    return out.reshape(B, K, H // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def _probabilities(q: Array, k: Array, mask: Array, scale: float) -> Array:
    """[B, K, GT, S] float32 of q [B, K, GT, k] and k [B, K, k, S]."""
    scores = jnp.einsum("BKqk,BKkS->BKqS", q, k, preferred_element_type=jnp.float32) * scale
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[2:])
    return jax.nn.softmax(jnp.where(mask[:, :, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    return jnp.einsum("BKqS,BKSk->BKqk", _probabilities(q, k, mask, scale).astype(q.dtype), v)


def _attention_forward(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    out = _attention(q, k, v, mask, scale)
    return out, (q, k, v, mask, out)


def _attention_backward(scale: float, saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    """As in FlashAttention (arXiv 2205.14135, section 3.1) the probabilities are computed again instead of kept: T x S numbers per head and layer.

    The products over queries have their narrow operand on the left; `matmul` says why.
    """
    q, k, v, mask, out = saved
    p = _probabilities(q, k, mask, scale)
    d_v = jnp.einsum("BKqk,BKqS->BKkS", d_out, p.astype(q.dtype)).swapaxes(2, 3)
    d_p = jnp.einsum("BKqk,BKSk->BKqS", d_out, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (p * (d_p - mean) * scale).astype(q.dtype)
    return jnp.einsum("BKqS,BKkS->BKqk", d_scores, k), jnp.einsum("BKqk,BKqS->BKkS", q, d_scores), d_v, None


_attention.defvjp(_attention_forward, _attention_backward)
