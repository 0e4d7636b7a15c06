"""How the next token is chosen from logits: the likeliest, or drawn from what top-k and top-p
leave.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.fields import check_types, require

Array = jax.Array
ENDED = -1  # in place of a token: the row has ended before
NON_FINITE = -2  # in place of a token: the logits of the row are no finite numbers


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
      temperature: 0: the likeliest token (greedy); else a draw from softmax(logits / temperature).
      top_k: draw from the k likeliest tokens alone; None for all.
      top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least
        top_p (nucleus), taken after top_k; None for all.

    Raises:
      ConfigError: a value that is not allowed, by name.
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
        """Choose a token for each row.

        Args:
          logits: [B, V] float32.
          keys: [B] random keys.

        Returns:
          Tokens [B] int32; NON_FINITE for a row that has NaN or +infinity, or whose drawn token
          has no finite logit.
        """
        if self.temperature == 0:
            return greedy(logits)
        kept, tokens = self.cut(logits)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)[:, None]
        finite = jnp.isfinite(jnp.take_along_axis(kept, drawn, axis=1))
        token = drawn if tokens is None else jnp.take_along_axis(tokens, drawn, axis=1)
        return jnp.where(finite, token, NON_FINITE)[:, 0]

    def cut(self, logits: Array) -> tuple[Array, Array | None]:
        """What is drawn from.

        Args:
          logits: [B, V] float32.

        Returns:
          (logits over the temperature [B, n], -inf where nothing is drawn; the tokens [B, n] int32
          that they are of, None where n = V).
        """
        # top_k takes some NaN for the least of all numbers: as infinity none is passed over.
        logits = jnp.where(jnp.isnan(logits), jnp.inf, logits / self.temperature)
        top_p = self.top_p if self.top_p is not None and self.top_p < 1 else None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, tokens = jax.lax.top_k(logits, self.top_k)
            return logits if top_p is None else nucleus_of_sorted(logits, top_p), tokens
        return logits if top_p is None else nucleus(logits, top_p), None


GREEDY = Sampler()


def greedy(logits: Array) -> Array:
    """The first of the largest logits of each row, as `greedy_reference`.

    Two plain reductions, because XLA's CPU compiler makes a slow loop of argmax (0.28 ms against
    0.15 ms for one row of 49152, results/decode_variants.md). They go down columns, in which
    `head.head_logits` computes float32 logits on a CPU.

    Args:
      logits: [B, V].

    Returns:
      Tokens [B] int32; NON_FINITE for a row that has NaN or +infinity.
    """
    columns = logits.T
    token = jnp.arange(columns.shape[0], dtype=jnp.int32)[:, None]
    top = jnp.max(columns, axis=0, keepdims=True)
    first = jnp.min(jnp.where(columns == top, token, len(columns)), axis=0)
    return jnp.where(top[0] < jnp.inf, first, NON_FINITE)  # the maximum with NaN is NaN


def greedy_reference(logits: Array) -> Array:
    """`greedy` by its definition."""
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    wrong = jnp.isnan(logits) | (logits == jnp.inf)
    return jnp.where(jnp.any(wrong, axis=-1), NON_FINITE, token)


def nucleus_of_sorted(logits: Array, top_p: float) -> Array:
    """`nucleus` of rows that are sorted, the largest first."""
    probability = jax.nn.softmax(logits, axis=-1)
    likelier = jnp.cumsum(probability, axis=-1) - probability
    return jnp.where(likelier < top_p, logits, -jnp.inf)


def nucleus(logits: Array, top_p: float) -> Array:
    """The smallest set of likeliest tokens whose probabilities sum to at least top_p.

    The threshold is found by bisection, because XLA's CPU compiler sorts slowly (9.1 ms against
    0.8 ms for one row of 49152, results/decode_variants.md).

    Args:
      logits: [B, V] float32.
      top_p: within (0, 1).

    Returns:
      The logits [B, V], -inf outside the set. Tokens as likely as the set's last belong to it.
    """
    probability = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probability >= _nucleus_floor(probability, top_p), logits, -jnp.inf)


def nucleus_reference(logits: Array, top_p: float) -> Array:
    """`nucleus` by its definition: sort, and cut where the sum reaches top_p."""
    largest_first = jnp.sort(logits, axis=-1, descending=True)
    kept = nucleus_of_sorted(largest_first, top_p)
    least = jnp.min(jnp.where(jnp.isfinite(kept), kept, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


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
        held = jnp.where(probability >= number(middle), probability, 0.0)
        enough = jnp.sum(held, axis=-1, keepdims=True) >= share
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((probability.shape[0], 1), jnp.int32)
    above_one = jnp.full_like(low, np.float32(1).view(np.int32) + 1)
    return number(jax.lax.fori_loop(0, 31, halve, (low, above_one))[0])
