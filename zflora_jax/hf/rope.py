"""RoPE frequencies as files store them: longrope factors, and divisors in GGUF files."""

from __future__ import annotations

import numpy as np

from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.ops.rope import rope_frequencies

# Divides an inverse frequency to zero and stays finite in float32 when multiplied by any theta
NO_ROTATION = 1e30


def longrope_powers(config: LlamaConfig) -> np.ndarray:
    """theta^(2i/head_dim) [head_dim/2], computed in float32 as transformers does, as float64.

    With longrope, transformers' inverse frequencies are 1 / (factor * power).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    return (np.float32(config.rope_theta) ** exponents).astype(np.float64)


def rotated_dims(divisors: np.ndarray) -> int | None:
    """The number of head dims that RoPE rotates if `divisors`, one for each pair of dims, divide
    its frequencies; None unless the last pairs, and only they, are switched off.
    """
    off = divisors >= NO_ROTATION / 10
    ours = divisors.ndim == 1 and off.any() and not off.all() and np.all(off[:-1] <= off[1:])
    return 2 * int((~off).sum()) if ours else None


def with_frequencies(config: LlamaConfig, wanted: np.ndarray, rtol: float) -> LlamaConfig | None:
    """The config without RoPE scaling, or with Llama-3's (low_freq_factor 1 and high_freq_factor 4,
    as in all published models), that gives the inverse frequencies `wanted` [k/2] of the rotated
    dims within a relative tolerance; None where neither does.
    """
    plain = rope_frequencies(config.replace(rope_scaling=None)).astype(np.float64)
    if plain.shape != wanted.shape or not np.isfinite(wanted).all() or not (wanted > 0).all():
        return None
    for scaling in (None, _llama3(plain, wanted)):
        found = config.replace(rope_scaling=scaling)
        if np.allclose(rope_frequencies(found), wanted, rtol=rtol, atol=0):
            return found
    return None


def _llama3(plain: np.ndarray, wanted: np.ndarray) -> RopeScaling | None:
    """The Llama-3 scaling that brings the frequencies `plain` closest to `wanted`."""
    factor = float(np.round(np.max(plain / wanted), 3))
    if factor <= 1:
        return None
    smooth = (wanted / plain - 1 / factor) / (1 - 1 / factor)
    band = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original = np.median((3 * smooth + 1)[band] * 2 * np.pi / plain[band]) if band.any() else 8192
    return RopeScaling(factor, 1.0, 4.0, max(1, round(float(original))))
