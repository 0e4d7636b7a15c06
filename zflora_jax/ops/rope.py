"""Rotary position embeddings of the base dims of a head."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.linear import Array

ROPE_ROWS = 8192  # of a table of rotations in a program: at most 4 MB at head_dim 128


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies of the base head dims, [k/2] float32, with the config's Llama-3 scaling,
    as transformers computes them.
    """
    k = config.base_head_width
    exponents = np.arange(0, k, 2, dtype=np.float32) / np.float32(k)
    freq = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if (s := config.rope_scaling) is None:
        return freq
    wavelength, low, high = 2 * np.pi / freq, s.low_freq_factor, s.high_freq_factor
    smooth = (s.original_max_position_embeddings / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)  # 1: high frequencies stay; 0: low ones are divided
    return ((1 - smooth) * freq / s.factor + smooth * freq).astype(np.float32)


def paired_order(base: int, width: int) -> np.ndarray:
    """The native dim at each place, [width] int, of a widened head that RoPE rotates as a whole.
    The base's pairs (i, i + base/2) become (i, i + width/2); the other pairs are adapter dims with
    frequency 0. Both widths are even.
    """
    middle = base + (width - base) // 2
    halves = ((0, base // 2), (base, middle), (base // 2, base), (middle, width))
    return np.concatenate([np.arange(*half) for half in halves])


def rope_tables(config: LlamaConfig, positions: Array, length: int) -> tuple[Array, Array]:
    """cos and sin of positions [B, T] int32 below `length`, [B, T, 1, k/2] float32, equal to
    `plain_rope_tables`; for a packed model over all dims of a head, in `paired_order`.
    """
    if length > ROPE_ROWS:
        return plain_rope_tables(config, positions)
    # Looked up in a constant: XLA's CPU compiler would compute them twice in every layer.
    table = np.arange(length, dtype=np.float32)[:, None, None] * _frequencies(config)
    parts = map(jnp.asarray, (np.cos(table), np.sin(table)))
    cos, sin = (jnp.take(part, positions, axis=0, mode="clip") for part in parts)
    return cos, sin


def plain_rope_tables(config: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """`rope_tables` computed where they are used, for any length."""
    frequencies = jnp.asarray(_frequencies(config))
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(config: LlamaConfig) -> np.ndarray:
    """`rope_frequencies`; for a packed model with 0 for the pairs of adapter dims."""
    frequencies = rope_frequencies(config)
    pairs = (config.head_dim if config.execution.packed else config.base_head_width) // 2
    return np.pad(frequencies, (0, pairs - len(frequencies)))


def apply_rope(x: Array, cos: Array, sin: Array, use_rope: Array | None = None) -> Array:
    """Rotates the first k dims of heads x [B, T, heads, k or more] by `rope_tables`, in pairs (i, i
    + k/2). Other dims pass through; so do all if `use_rope`, bool, is False (a layer without RoPE).
    """
    if use_rope is not None:
        cos, sin = jnp.where(use_rope, cos, 1.0), jnp.where(use_rope, sin, 0.0)
    half = cos.shape[-1]
    first = x[..., :half].astype(jnp.float32)
    second, rest = x[..., half : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    halves = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate(halves, axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
