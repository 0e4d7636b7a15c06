"""Layers of a Llama whose streams may be widened.

A stream is a pair (x, z): base channels and adapter channels, z = None where there are none. A fused model carries everything in x. The same
layers serve both: RMSNorm takes its mean over the base channels, RoPE turns the base dims of a head, Dense adds the adapter's blocks to what the base
kernel computes (design.md section 2; this project's reconstruction of zFLoRA).

Einsum legend: B batch, T query positions, S key positions, H query heads, K key/value heads, d residual width, k head dim.
"""

from __future__ import annotations

import math

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
        y = jnp.tensordot(x, kernel.astype(dtype), axes=n)
        y_z: Array | None = None
        if self.adapter is None or not self.blocks or self.is_initializing():
            return y, y_z
        block, scale = {name: self.block(name, dtype) for name in self.blocks}, self.adapter.scale
        if "forward" in block:
            y_z = jnp.tensordot(x, block["forward"], axes=n)
        if z is not None and "backward" in block:
            y = y + scale * jnp.tensordot(z, block["backward"], axes=n)
        if z is not None and y_z is not None and "cross" in block:
            y_z = y_z + jnp.tensordot(z, block["cross"], axes=n)
        if "lora_a" in block or "ffa_a" in block:
            flat = x.reshape(*x.shape[:-n], -1)
            if "lora_a" in block:
                delta = flat @ block["lora_a"] @ block["lora_b"]
            else:
                delta = tile(flat @ block["ffa_a"], math.prod(self.out_axes))
            y = y + scale * delta.reshape(y.shape)
        return y, y_z


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
    """Grouped-query attention: q [B, T, H, k], k and v [B, S, K, k], mask [B, 1, T, S] bool (True = attend) -> [B, T, H, k]. Softmax in float32."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)
