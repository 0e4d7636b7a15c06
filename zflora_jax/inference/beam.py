"""Beam search: prefill and the search in one compiled function, by the rules of transformers'
`generate(num_beams=K)`.

Those rules, with length_penalty=1 and early_stopping=False: a finished hypothesis counts its
log-probability per generated token, its stop token included; a row ends when K have finished and
its best running hypothesis, were it to end now, would not count more than the worst of them. As in
`program`, a row's result does not depend on the rows beside it.

Letters: B batch, K beams, C candidates of a step, T prompt positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.inference.program import next_logits
from zflora_jax.nn.kv_cache import KVCache, cache_slots, init_cache
from zflora_jax.ops.sampling import ENDED, NON_FINITE

Array = jax.Array


@flax.struct.dataclass
class Hypotheses:
    """K continuations of each prompt, best first.

    Attributes:
      tokens: [B, K, N] int32, ENDED where nothing is written.
      scores: [B, K] float32, -inf for none yet.
    """

    tokens: Array
    scores: Array

    def best(self, count: int) -> tuple[Hypotheses, Array]:
        """The `count` of highest score, and their places [B, count] int32 in this one."""
        scores, places = jax.lax.top_k(self.scores, count)
        return Hypotheses(_pick(self.tokens, places), scores), places


@flax.struct.dataclass
class BeamState:
    """The loop's carry.

    Attributes:
      running: hypotheses to extend, scored by their summed log-probabilities.
      finished: hypotheses that have ended, scored by the same per token.
      improvable: [B] bool, rows whose finished hypotheses may still be beaten.
      step: int32, how many tokens are written.
      cache: of B * K rows, those of a prompt side by side.
    """

    running: Hypotheses
    finished: Hypotheses
    improvable: Array
    step: Array
    cache: KVCache


@dataclass(frozen=True)
class BeamProgram:
    """How beams are searched. Equal programs share what is compiled.

    Attributes:
      config: of the model.
      adapter: of adapters that run beside the base; None for a base, fused or packed tree.
      num_beams: K. With 1 this is not greedy decoding: after a stop token the search goes on while
        a longer answer could count more.
      stop_token_ids: tokens that end a hypothesis. num_beams + len(stop_token_ids) must not exceed
        the vocabulary.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None
    num_beams: int
    stop_token_ids: tuple[int, ...] = ()

    @partial(jax.jit, static_argnames=("self", "max_new_tokens"))
    def search(self, variables: Tree, tokens: Array, valid: Array, max_new_tokens: int) -> Array:
        """The best continuation of each prompt. A prompt is run once, not once per beam.

        Args:
          variables: The model's variables (see `program.next_logits`).
          tokens: [B, T] int32, prompts padded on the left.
          valid: [B, T] bool, False at padding. A row that is all padding (a filler) yields nothing.
          max_new_tokens: N.

        Returns:
          [B, N] int32: up to the stop token if there is one, then ENDED; all `sampling.NON_FINITE`
          for a prompt with NaN among its logits.
        """
        prompt_length = tokens.shape[1]

        def going(s: BeamState) -> Array:
            return (s.step < max_new_tokens) & jnp.any(s.improvable)

        def one_token(s: BeamState) -> BeamState:
            last = jax.lax.dynamic_index_in_dim(s.running.tokens, s.step - 1, axis=2)
            logits, cache = next_logits(
                self.config, self.adapter, variables, last.reshape(-1, 1), None, s.cache
            )
            logits = logits.reshape(len(tokens), self.num_beams, -1)
            return self._extend(s, logits, cache, prompt_length)

        state = self._prefill(variables, tokens, valid, max_new_tokens)
        best = jax.lax.while_loop(going, one_token, state).finished
        # A filler has finished nothing: all ENDED.
        return jnp.where(best.scores[:, :1] == jnp.inf, NON_FINITE, best.tokens[:, 0])

    def _prefill(
        self, variables: Tree, tokens: Array, valid: Array, max_new_tokens: int
    ) -> BeamState:
        """The state after the first token."""
        batch, length = tokens.shape
        slots = cache_slots(length + max_new_tokens)
        cache = init_cache(self.config, batch, slots, self.adapter)
        logits, cache = next_logits(self.config, self.adapter, variables, tokens, valid, cache)
        none = Hypotheses(
            jnp.full((batch, self.num_beams, max_new_tokens), ENDED, jnp.int32),
            jnp.full((batch, self.num_beams), -jnp.inf, jnp.float32),
        )
        # The beams are equal so far: the first alone is extended.
        first = Hypotheses(none.tokens, none.scores.at[:, 0].set(0.0))
        step, cache = jnp.zeros((), jnp.int32), cache.repeat_rows(self.num_beams)
        state = BeamState(first, none, jnp.any(valid, axis=1), step, cache)
        logits = jnp.broadcast_to(logits[:, None], (batch, self.num_beams, logits.shape[-1]))
        return self._extend(state, logits, cache, length)

    def _extend(self, s: BeamState, logits: Array, cache: KVCache, prompt_length: int) -> BeamState:
        """The state one token later.

        Args:
          s: the state.
          logits: [B, K, V] of the running hypotheses.
          cache: that these were computed with.
          prompt_length: slots of the cache that the beams of a prompt share.
        """
        batch, _, max_new_tokens = s.running.tokens.shape
        log_probs = (
            jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) + s.running.scores[:, :, None]
        )
        # NaN beats all numbers, so that `search` sees it in the end.
        log_probs = jnp.where(jnp.isnan(log_probs), jnp.inf, log_probs)
        # A beam has at most one candidate for each stop token, so that this many always hold
        # num_beams that do not end.
        candidates = self.num_beams * max(2, 1 + len(self.stop_token_ids))
        scores, places = jax.lax.top_k(log_probs.reshape(batch, -1), candidates)
        beams, drawn = places // logits.shape[-1], places % logits.shape[-1]
        written = jax.lax.dynamic_update_index_in_dim(
            _pick(s.running.tokens, beams), drawn, s.step, axis=2
        )
        step = s.step + 1
        stops = jnp.asarray(self.stop_token_ids, jnp.int32)
        ends = jnp.isin(drawn, stops) | (step == max_new_tokens)

        # Only the best K candidates may finish; those below them are there to be run on.
        ending = jnp.where(
            ends & s.improvable[:, None], scores / step.astype(jnp.float32), -jnp.inf
        )
        pool = Hypotheses(
            jnp.concatenate([s.finished.tokens, written[:, : self.num_beams]], axis=1),
            jnp.concatenate([s.finished.scores, ending[:, : self.num_beams]], axis=1),
        )
        finished, _ = pool.best(self.num_beams)
        running, kept = Hypotheses(written, jnp.where(ends, -jnp.inf, scores)).best(self.num_beams)
        improvable = s.improvable & (
            running.scores[:, 0] / step.astype(jnp.float32) > finished.scores[:, -1]
        )
        first_rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * self.num_beams
        rows = (first_rows + _pick(beams, kept)).reshape(-1)
        cache = cache.reorder_rows(rows, prompt_length)
        return BeamState(running, finished, improvable, step, cache)


def _pick(values: Array, places: Array) -> Array:
    """values [B, X, ...], places [B, Y] -> [B, Y, ...]."""
    return jnp.take_along_axis(
        values, jnp.expand_dims(places, tuple(range(2, values.ndim))), axis=1
    )
