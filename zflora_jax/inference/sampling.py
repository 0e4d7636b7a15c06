"""How the next token is chosen from logits: the likeliest, or drawn from what top-k and top-p
leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.fields import check_types, require

Array = jax.Array


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen: greedy at temperature 0, else drawn from softmax(logits /
    temperature) cut by top_k, then by top_p (nucleus).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.temperature >= 0,
            f"temperature={self.temperature}: must be at least 0 (0 is greedy).",
        )
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k={self.top_k}: must be at least 1, or None.",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p={self.top_p}: must be within (0, 1], or None.",
        )
        require(
            self.temperature > 0 or (self.top_k is None and self.top_p is None),
            "top_k and top_p need a temperature above 0; greedy decoding ignores them.",
        )

    def __call__(self, logits: Array, keys: Array) -> Array:
        """logits [B, V] float32, keys [B] -> tokens int32 [B]."""
        if self.temperature == 0:
            return greedy(logits)
        kept, tokens = self.cut(logits)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return (
            drawn if tokens is None else jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]
        )

    def cut(self, logits: Array) -> tuple[Array, Array | None]:
        """logits [B, V] -> (what is drawn from, [B, n] with -inf where nothing is, the tokens int32
        [B, n] that it stands for, None where n = V).

        With top_k only its k logits are looked at further. Without, top_p's threshold is found by
        bisection: sorting a vocabulary takes XLA's CPU compiler several times as long as a decode
        step (results/decode_variants.md).
        """
        logits = logits / self.temperature
        nucleus = self.top_p if self.top_p is not None and self.top_p < 1 else None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, tokens = jax.lax.top_k(logits, self.top_k)
            if nucleus is not None:
                probability = jax.nn.softmax(logits, axis=-1)
                likelier = jnp.cumsum(probability, axis=-1) - probability
                # The smallest set whose probability reaches top_p.
                logits = jnp.where(likelier < nucleus, logits, -jnp.inf)
            return logits, tokens
        if nucleus is not None:
            probability = jax.nn.softmax(logits, axis=-1)
            logits = jnp.where(
                probability >= _nucleus_floor(probability, nucleus), logits, -jnp.inf
            )
        return logits, None


def greedy(logits: Array) -> Array:
    """logits [B, V] -> the first of the largest, int32 [B]. As two plain reductions: XLA's CPU
    compiler makes a slow loop of argmax. Down columns, as `ops.head.head_logits` computes them from
    float32 on a CPU. The last token where a row has NaN.
    """
    columns = logits.T
    token = jnp.arange(columns.shape[0], dtype=jnp.int32)[:, None]
    return jnp.min(
        jnp.where(columns == jnp.max(columns, axis=0, keepdims=True), token, token[-1]), axis=0
    )


def _nucleus_floor(probability: Array, share: float) -> Array:
    """The largest number [B, 1] such that the probabilities [B, V] of at least that number sum to
    `share` (0 where rounding keeps all from it). Bisection over the bits of a float32, which are
    ordered as the numbers are where these are not negative.
    """

    def number(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) // 2
        enough = (
            jnp.sum(
                jnp.where(probability >= number(middle), probability, 0.0), axis=-1, keepdims=True
            )
            >= share
        )
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((probability.shape[0], 1), jnp.int32)
    above_one = jnp.full_like(low, np.float32(1).view(np.int32) + 1)
    return number(jax.lax.fori_loop(0, 31, halve, (low, above_one))[0])
