"""Beam search: prefill and the search in one compiled function, by the rules of transformers'
`generate(num_beams=K)`.

Those rules, with length_penalty=1 and early_stopping=False: a finished hypothesis counts its
log-probability per generated token, its stop token included; a row ends when K have finished and
its best running hypothesis, were it to end now, would not count more than the worst of them. As in
`decode`, a row's result does not depend on the rows beside it.

Legend: B batch, K beams, C candidates of a step, T prompt positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.nn.kv_cache import KVCache, cache_slots, init_cache
from zflora_jax.nn.llama import Llama
from zflora_jax.nn.row_adapters import hidden_states
from zflora_jax.ops.precision import at_config_precision

Array = jax.Array


def next_logits(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    tokens: Array,
    valid: Array | None,
    cache: KVCache,
) -> tuple[Array, KVCache]:
    """Logits [B, V] float32 of the token that follows tokens [B, T] int32 (left-padded where
    `valid` is False), and the updated cache.

    variables: {"params": ...}, and with an adapter that is not fused {"adapters": ...}, or
    {"row_adapters": ...} (see `row_adapters.hidden_states`).
    """
    llama = Llama(config, adapter)
    hidden, cache = hidden_states(llama, variables, tokens, valid, cache)
    logits: Any = llama.apply(variables, hidden[:, -1:], method="logits")
    return logits[:, 0], cache


@flax.struct.dataclass
class Hypotheses:
    """K continuations of each prompt, best first. tokens [B, K, N] int32, -1 where nothing is
    written; scores [B, K] float32, -inf for none yet.
    """

    tokens: Array
    scores: Array

    def best(self, count: int) -> tuple[Hypotheses, Array]:
        """The `count` of highest score, and their places [B, count] int32 in this one."""
        scores, places = jax.lax.top_k(self.scores, count)
        return Hypotheses(_pick(self.tokens, places), scores), places


@flax.struct.dataclass
class BeamState:
    """The loop's carry. running: hypotheses to extend, scored by their summed log-probabilities;
    finished: by the same per token; improvable [B] bool: rows whose finished hypotheses may still
    be beaten; step int32: tokens written so far; cache: of B*K rows, those of a prompt together.
    """

    running: Hypotheses
    finished: Hypotheses
    improvable: Array
    step: Array
    cache: KVCache


def _pick(values: Array, places: Array) -> Array:
    """values [B, X, ...], places [B, Y] -> [B, Y, ...]."""
    return jnp.take_along_axis(
        values, jnp.expand_dims(places, tuple(range(2, values.ndim))), axis=1
    )


@jax.jit(static_argnums=(0, 1, 2, 3, 4))
@at_config_precision
def beam_decode(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    num_beams: int,
    max_new_tokens: int,
    stop: tuple[int, ...],
    variables: Tree,
    tokens: Array,
    valid: Array,
) -> Array:
    """Prompts [B, T] int32, left-padded, -> each one's best continuation [B, max_new_tokens] int32:
    up to its stop token if it has one, then -1.

    valid [B, T] bool: False at padding; a row that is all padding (a filler) yields nothing. stop:
    token ids that end a hypothesis. The prompts are run once each, not once per beam. num_beams +
    len(stop) must not exceed the vocabulary. With num_beams=1 this is not greedy decoding: after a
    stop token the search goes on while a longer answer could count more.
    """
    batch, length = tokens.shape
    # Each beam has at most len(stop) candidates that end, so this many always hold num_beams that
    # do not.
    candidates = num_beams * max(2, 1 + len(stop))

    def extend(s: BeamState, logits: Array, cache: KVCache) -> BeamState:
        """The state one token later, from logits [B, K, V] of the running hypotheses and the cache
        that they were computed with.
        """
        log_probs = (
            jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) + s.running.scores[:, :, None]
        )
        scores, places = jax.lax.top_k(log_probs.reshape(batch, -1), candidates)
        beams, drawn = places // logits.shape[-1], places % logits.shape[-1]
        written = jax.lax.dynamic_update_index_in_dim(
            _pick(s.running.tokens, beams), drawn, s.step, axis=2
        )
        step = s.step + 1
        ends = jnp.isin(drawn, jnp.asarray(stop, jnp.int32)) | (step == max_new_tokens)

        # Only the best K candidates may finish; those below them are there to be run on.
        ending = jnp.where(
            ends & s.improvable[:, None], scores / step.astype(jnp.float32), -jnp.inf
        )
        pool = Hypotheses(
            jnp.concatenate([s.finished.tokens, written[:, :num_beams]], axis=1),
            jnp.concatenate([s.finished.scores, ending[:, :num_beams]], axis=1),
        )
        finished, _ = pool.best(num_beams)
        running, kept = Hypotheses(written, jnp.where(ends, -jnp.inf, scores)).best(num_beams)
        improvable = s.improvable & (
            running.scores[:, 0] / step.astype(jnp.float32) > finished.scores[:, -1]
        )
        return BeamState(running, finished, improvable, step, follow(cache, _pick(beams, kept)))

    def follow(cache: KVCache, beams: Array) -> KVCache:
        """The cache reordered to the beams [B, K] that were run on. A row's beams share its prompt,
        so only what lies after it moves.
        """
        rows = (jnp.arange(batch, dtype=jnp.int32)[:, None] * num_beams + beams).reshape(-1)
        return cache.reorder_rows(rows, start=length)

    def going(s: BeamState) -> Array:
        return (s.step < max_new_tokens) & jnp.any(s.improvable)

    def one_token(s: BeamState) -> BeamState:
        last = jax.lax.dynamic_index_in_dim(s.running.tokens, s.step - 1, axis=2)
        logits, cache = next_logits(config, adapter, variables, last.reshape(-1, 1), None, s.cache)
        return extend(s, logits.reshape(batch, num_beams, -1), cache)

    logits, cache = next_logits(
        config,
        adapter,
        variables,
        tokens,
        valid,
        init_cache(config, batch, cache_slots(length + max_new_tokens), adapter),
    )
    cache = cache.repeat_rows(num_beams)
    none = Hypotheses(
        jnp.full((batch, num_beams, max_new_tokens), -1, jnp.int32),
        jnp.full((batch, num_beams), -jnp.inf, jnp.float32),
    )
    # The beams are equal so far: the first alone is extended.
    empty = Hypotheses(none.tokens, none.scores.at[:, 0].set(0.0))
    state = BeamState(empty, none, jnp.any(valid, axis=1), jnp.zeros((), jnp.int32), cache)
    state = extend(
        state, jnp.broadcast_to(logits[:, None], (batch, num_beams, logits.shape[-1])), cache
    )
    # A filler has finished nothing: all -1.
    return jax.lax.while_loop(going, one_token, state).finished.tokens[:, 0]
