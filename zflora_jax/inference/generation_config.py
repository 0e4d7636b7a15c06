"""Settings of generation: how the next token is chosen, and how much is generated.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from zflora_jax.core.fields import check_types, require
from zflora_jax.ops.sampling import NON_FINITE, greedy, nucleus, nucleus_of_sorted

Array = jax.Array


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
            self.temperature == 0 or self.temperature >= 1e-6,  # float32 logits over it stay finite
            f"temperature={self.temperature}: must be at least 0 (0 is greedy), and 1e-6 above 0.",
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


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated from a model. These two are the same:

        generate(model, texts, GenerationConfig(max_new_tokens=32, sampler=Sampler(0.7)))
        generate(model, texts, max_new_tokens=32, sampler=Sampler(0.7))

    Attributes:
      max_new_tokens: most tokens that an answer may have, its stop token included.
      sampler: how each token is chosen; None: the likeliest (greedy).
      seed: of what is drawn.
      batch_size: prompts that are decoded together. It changes the speed, not the answers (up to
        float rounding of the matrix products).
      stop_token_ids: ids that end an answer; None: the model's own (eos_token_ids, and with a chat
        template the end of a turn); empty: nothing ends it but max_new_tokens.

    Raises:
      ConfigError: a value that is not allowed, by name.
    """

    max_new_tokens: int = 64
    sampler: Sampler | None = None
    seed: int = 0
    batch_size: int = 16
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value}: must be at least 1.")
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2**32 - 1.")

    def stopping_at(self, ids: Iterable[int]) -> GenerationConfig:
        """Returns this config, with `ids` for stop_token_ids where it names none."""
        if self.stop_token_ids is not None:
            return self
        return replace(self, stop_token_ids=tuple(ids))
