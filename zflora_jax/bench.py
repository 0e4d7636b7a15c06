"""Latency of decode: TTFT and TPOT of several models, interleaved in one process, compile time left out (design.md section 8)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.decode import Sampler, decode, packed
from zflora_jax.fields import require
from zflora_jax.model import Model


def decode_latency(
    models: Mapping[str, Model], *, prompt_length: int = 32, new_tokens: int = 32, batch: int = 1, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """label -> {ttft_ms, tpot_ms, tpot_ms_min, tpot_ms_max}, greedy decode of random prompts without stop tokens.

    Each repeat times, model by model, a call that makes 1 token (TTFT: prefill and the first token) and one that makes `new_tokens`; TPOT is their
    difference over
    new_tokens - 1. Both are medians over `repeats`, after one call of each to compile.
    """
    require(new_tokens >= 2, f"new_tokens={new_tokens}: TPOT needs at least 2.")
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    tokens = np.random.default_rng(0).integers(0, min(m.config.vocab_size for m in models.values()), (batch, prompt_length)).astype(np.int32)
    valid, keys = np.ones(tokens.shape, bool), jax.random.split(jax.random.key(0), batch)

    def seconds(model: Model, count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(decode(model.config, Sampler(), count, (), model.params, jnp.asarray(tokens), jnp.asarray(valid), keys))
        return time.perf_counter() - start

    ready = {label: packed(model) for label, model in models.items()}
    for model in ready.values():
        for count in (1, new_tokens):
            seconds(model, count)
    first: dict[str, list[float]] = {label: [] for label in ready}
    each: dict[str, list[float]] = {label: [] for label in ready}
    for _ in range(repeats):
        for label, model in ready.items():
            first[label].append(1e3 * seconds(model, 1))
            each[label].append((1e3 * seconds(model, new_tokens) - first[label][-1]) / (new_tokens - 1))
    return {
        label: {
            "ttft_ms": statistics.median(first[label]),
            "tpot_ms": statistics.median(each[label]),
            "tpot_ms_min": min(each[label]),
            "tpot_ms_max": max(each[label]),
        }
        for label in ready
    }
