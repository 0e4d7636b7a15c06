"""RoPE settings found again from the frequencies that files keep in their place.

GGUF files keep Llama-3's scaling as divisors. Exports with widened heads say by `rope_type:
longrope` which head dims RoPE turns, and at what frequencies; transformers keeps these settings
when it saves such a model again, and zflora.json is gone then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.ops.rope import rope_frequencies

# Divides an inverse frequency to zero and stays finite in float32 when multiplied by any theta
NO_ROTATION = 1e30


def turned_dims(rope: Mapping[str, Any]) -> int | None:
    """k, if these are the RoPE settings of an export of this project: head dims that are turned.

    None for any other longrope: its factors stretch the context, ours switch adapter pairs off.
    """
    short, long = (
        np.asarray(rope.get(f"{kind}_factor") or [], np.float64) for kind in ("short", "long")
    )
    off = long >= NO_ROTATION / 10
    ours = (
        long.ndim == 1
        and np.array_equal(short, long)
        and off.any()
        and not off.all()
        and not np.diff(off.astype(int)).min() < 0
    )
    return 2 * int((~off).sum()) if ours and rope.get("attention_factor", 1.0) == 1 else None


def with_turned_dims(config: LlamaConfig, rope: Mapping[str, Any], dims: int) -> LlamaConfig:
    """`config` (plain RoPE over the whole head) with base_head_dim and the base's own scaling, such
    that it turns the first `dims` dims of a head at the frequencies that the factors give.

    ConfigError for frequencies that neither plain RoPE nor Llama-3's scaling gives.
    """
    factors = np.asarray(rope["long_factor"], np.float64)
    if 2 * len(factors) != config.head_dim:
        raise ConfigError(
            f"config.json: {len(factors)} longrope factors for heads of {config.head_dim} dims;"
            " expected one for each pair."
        )
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wanted = (
        1 / (factors * (np.float32(config.rope_theta) ** exponents).astype(np.float64))[: dims // 2]
    )
    if (
        found := with_frequencies(config.replace(base_head_dim=dims), wanted, rtol=1e-5)
    ) is not None:
        return found
    raise ConfigError(
        "config.json: its longrope factors mark an export of this project with widened heads that"
        " was saved again, but give no frequencies of plain RoPE or of Llama-3's scaling. Copy"
        " zflora.json and the folder zflora/ of the first export into the directory."
    )


def with_frequencies(config: LlamaConfig, wanted: np.ndarray, rtol: float) -> LlamaConfig | None:
    """`config` with the RoPE scaling that gives the inverse frequencies `wanted`.

    Args:
      config: whose own scaling does not count.
      wanted: [k/2] float64, of the head dims that are turned.
      rtol: relative, between them and those that the scaling gives.

    Returns:
      The config, without scaling or with Llama-3's (low_freq_factor 1 and high_freq_factor 4, as
      all published models have); None where neither gives `wanted`.
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
    """Llama-3 scaling nearest to what makes `wanted` of the frequencies `plain`."""
    factor = float(np.round(np.max(plain / wanted), 3))
    if factor <= 1:
        return None
    smooth = (wanted / plain - 1 / factor) / (1 - 1 / factor)
    band = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original = np.median((3 * smooth + 1)[band] * 2 * np.pi / plain[band]) if band.any() else 8192
    return RopeScaling(factor, 1.0, 4.0, max(1, round(float(original))))
