"""Settings of generation: the choice of the next token, and the length of answers.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from zflora_jax.core.fields import Count, Seed, check_types, require
from zflora_jax.ops.sampling import NON_FINITE, greedy, nucleus, nucleus_of_sorted

Array = jax.Array


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token of each row.

    Attributes:
      temperature: 0 takes the likeliest token (greedy), else tokens are drawn from
        softmax(logits / temperature).
      top_k: Number of likeliest tokens to draw from; None for all.
      top_p: Tokens are drawn from the smallest set of likeliest ones whose probabilities sum to at
        least top_p (nucleus), after top_k; None for all.
    """

    temperature: float = 0.0
    top_k: Count | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.temperature == 0 or self.temperature >= 1e-6,  # float32 logits over it stay finite
            f"temperature={self.temperature}: must be at least 0 (0 is greedy), and 1e-6 above 0.",
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
        """Chooses a token for each row.

        Args:
          logits: Logits, float32 [B, V].
          keys: Random keys [B].

        Returns:
          Tokens int32 [B]; NON_FINITE for a row that has NaN or +infinity, or whose drawn token has
          no finite logit.
        """
        if self.temperature == 0:
            return greedy(logits)
        kept, tokens = self.cut(logits)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)[:, None]
        finite = jnp.isfinite(jnp.take_along_axis(kept, drawn, axis=1))
        token = drawn if tokens is None else jnp.take_along_axis(tokens, drawn, axis=1)
        return jnp.where(finite, token, NON_FINITE)[:, 0]

    def cut(self, logits: Array) -> tuple[Array, Array | None]:
        """Cuts the distribution that tokens are drawn from.

        Args:
          logits: Logits, float32 [B, V].

        Returns:
          (logits / temperature [B, n], -inf for tokens that are not drawn; their tokens int32
          [B, n], None if n = V).
        """
        # jax.lax.top_k may sort NaN last: as infinity it is never passed over.
        logits = jnp.where(jnp.isnan(logits), jnp.inf, logits / self.temperature)
        top_p = self.top_p if self.top_p is not None and self.top_p < 1 else None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, tokens = jax.lax.top_k(logits, self.top_k)
            return logits if top_p is None else nucleus_of_sorted(logits, top_p), tokens
        return logits if top_p is None else nucleus(logits, top_p), None


GREEDY = Sampler()


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of generation. Functions that generate take them as keywords, too:

        generate(model, texts, max_new_tokens=32, sampler=Sampler(0.7))

    Attributes:
      max_new_tokens: Most tokens of an answer, including its stop token.
      sampler: Chooses each token; None takes the likeliest (greedy).
      seed: Seed of the draws.
      batch_size: Number of prompts that are decoded together. It changes the speed, not the answers
        (up to float rounding of the matrix products).
      stop_token_ids: Ids that end an answer. None uses the model's (eos_token_ids, and with a chat
        template the end of a turn); with () only max_new_tokens ends it.
    """

    max_new_tokens: Count = 64
    sampler: Sampler | None = None
    seed: Seed = 0
    batch_size: Count = 16
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)

    def stopping_at(self, ids: Iterable[int]) -> GenerationConfig:
        """Returns this config, with `ids` as stop_token_ids if it has none."""
        return self if self.stop_token_ids is not None else replace(self, stop_token_ids=tuple(ids))
