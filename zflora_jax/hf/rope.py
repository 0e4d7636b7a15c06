"""RoPE settings, recovered from the frequencies that files store.

GGUF files store Llama-3's scaling as divisors. Exports with widened heads store, as `rope_type:
longrope`, which head dims RoPE rotates and at which frequencies; transformers keeps these settings
when it saves such a model again, without zflora.json.
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


def longrope_powers(config: LlamaConfig) -> np.ndarray:
    """theta^(2i/head_dim) [head_dim/2], computed in float32 as transformers does, as float64.

    With longrope transformers' inverse frequencies are 1 / (factor * power).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    return (np.float32(config.rope_theta) ** exponents).astype(np.float64)


def turned_dims(rope: Mapping[str, Any]) -> int | None:
    """The number of head dims that RoPE rotates in an export of this project.

    Args:
      rope: the RoPE settings of a config.json with rope_type "longrope".

    Returns:
      k; None for any other longrope, whose factors stretch the context (this project's switch the
      adapter pairs off).
    """
    short, long = (
        np.asarray(rope.get(f"{kind}_factor") or [], np.float64) for kind in ("short", "long")
    )
    same = np.array_equal(short, long) and rope.get("attention_factor", 1.0) == 1
    return rotated_dims(long) if same else None


def rotated_dims(divisors: np.ndarray) -> int | None:
    """The number of head dims that RoPE rotates where its frequencies are divided by `divisors`.

    Args:
      divisors: float64, one for each pair of dims.

    Returns:
      k; None where no pair is switched off, or not the last ones.
    """
    off = divisors >= NO_ROTATION / 10
    ours = (
        divisors.ndim == 1
        and off.any()
        and not off.all()
        and not np.diff(off.astype(int)).min() < 0
    )
    return 2 * int((~off).sum()) if ours else None


def with_turned_dims(config: LlamaConfig, rope: Mapping[str, Any], dims: int) -> LlamaConfig:
    """Set base_head_dim and the base's RoPE scaling from longrope factors.

    Args:
      config: with plain RoPE over the whole head.
      rope: the longrope settings, of an export of this project.
      dims: the number of rotated head dims.

    Returns:
      The config that rotates the first `dims` dims at the frequencies of the factors.

    Raises:
      ConfigError: neither plain RoPE nor Llama-3's scaling gives these frequencies.
    """
    factors = np.asarray(rope["long_factor"], np.float64)
    if 2 * len(factors) != config.head_dim:
        raise ConfigError(
            f"config.json: {len(factors)} longrope factors for heads of {config.head_dim} dims;"
            " expected one for each pair."
        )
    wanted = 1 / (factors * longrope_powers(config))[: dims // 2]
    found = with_frequencies(config.replace(base_head_dim=dims), wanted, rtol=1e-5)
    if found is not None:
        return found
    raise ConfigError(
        "config.json: its longrope factors mark an export of this project with widened heads that"
        " was saved again, but give no frequencies of plain RoPE or of Llama-3's scaling. Copy"
        " zflora.json and the folder zflora/ of the first export into the directory."
    )


def with_frequencies(config: LlamaConfig, wanted: np.ndarray, rtol: float) -> LlamaConfig | None:
    """Find the RoPE scaling that gives certain frequencies.

    Args:
      config: its own scaling is ignored.
      wanted: [k/2] float64, inverse frequencies of the rotated head dims.
      rtol: relative tolerance of the frequencies.

    Returns:
      The config without scaling or with Llama-3's (low_freq_factor 1 and high_freq_factor 4, as in
      all published models); None where neither gives `wanted`.
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
    """The Llama-3 scaling that comes nearest to turning the frequencies `plain` into `wanted`."""
    factor = float(np.round(np.max(plain / wanted), 3))
    if factor <= 1:
        return None
    smooth = (wanted / plain - 1 / factor) / (1 - 1 / factor)
    band = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original = np.median((3 * smooth + 1)[band] * 2 * np.pi / plain[band]) if band.any() else 8192
    return RopeScaling(factor, 1.0, 4.0, max(1, round(float(original))))
