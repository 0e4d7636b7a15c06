"""The token loop as one program: prefill and decode, compiled, for any model's tree.

A row's result does not depend on the other rows of its batch: padding is never attended to and
takes no position, and each row draws from its own random stream.

Letters: B batch, T positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zflora_jax.adapters.packing import apart_for, pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model, require_there
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.inference.generation_config import GREEDY, Sampler
from zflora_jax.nn.kv_cache import KVCache, cache_slots, init_cache
from zflora_jax.nn.llama import Llama
from zflora_jax.ops.precision import at_config_precision
from zflora_jax.ops.sampling import ENDED

Array = jax.Array

_Kept = weakref.WeakKeyDictionary[Model, tuple[trees.References, Model]]
_packed, _unpacked = _Kept(), _Kept()


def packed(model: Model, unmerged: AdapterConfig | None = None) -> Model:
    """Returns `model` packed for decode, and caches the result until its arrays are replaced.

    Args:
      model: A base or fused model.
      unmerged: Config of the unmerged adapter, see `pack_for_decode`.

    Raises:
      ConfigError: The model's parameters were donated.
    """
    require_there(model.params)
    kept = _unpacked if apart_for(model, unmerged) else _packed
    if model not in kept or not trees.refer_to(kept[model][0], model.params):
        made = pack_for_decode(model, unmerged=unmerged)
        if made is model:
            return model
        kept[model] = trees.references(model.params), made
    return kept[model][1]


@at_config_precision
def next_logits(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: trees.Tree,
    tokens: Array,
    valid: Array | None,
    cache: KVCache,
) -> tuple[Array, KVCache]:
    """Runs the model on the next tokens of each row.

    Args:
      config: The model's config.
      adapter: The unmerged adapter; None without one.
      variables: {"params": ...}, with an adapter also {"adapters": ...}.
      tokens: Token ids, int32 [B, T], left-padded where `valid` is False.
      valid: Real tokens, bool [B, T]; None if all are real.
      cache: Keys and values of the tokens before.

    Returns:
      (Logits of the token that follows each row, float32 [B, V]; the updated cache).
    """
    llama: Any = Llama(config, adapter)
    hidden, cache = llama.apply(variables, tokens, valid, cache, method="hidden")
    logits = llama.apply(variables, hidden[:, -1:], method="logits")
    return logits[:, 0], cache


@flax.struct.dataclass
class DecodeState:
    """The loop's carry.

    Attributes:
      out: Tokens written so far, int32 [B, N]; `sampling.ENDED` after the end of a row.
      last: The token to feed next, int32 [B].
      done: Rows that have ended, bool [B].
      step: Number of tokens written, int32.
      cache: Keys and values of the prompts and of the tokens fed so far.
    """

    out: Array
    last: Array
    done: Array
    step: Array
    cache: KVCache


@dataclass(frozen=True)
class DecodeProgram:
    """Compiled generation of tokens. Equal programs share their compiled functions.

    Attributes:
      config: The model's config.
      adapter: The unmerged adapter; None for a base, fused or packed tree.
      sampler: Chooses each token.
      stop_token_ids: Tokens that end a row.

    The methods take arrays, and max_new_tokens, which is static:
      variables: The model's variables (see `next_logits`).
      tokens: Prompts padded on the left, int32 [B, T].
      valid: Real tokens, bool [B, T]. A row that is all padding (a filler) yields nothing.
      keys: One random key per row, [B].
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    sampler: Sampler = GREEDY
    stop_token_ids: tuple[int, ...] = ()

    @partial(jax.jit, static_argnames=("self", "max_new_tokens"))
    def decode(
        self, variables: trees.Tree, tokens: Array, valid: Array, keys: Array, max_new_tokens: int
    ) -> Array:
        """Returns tokens int32 [B, max_new_tokens]: ENDED after a row's stop token, NON_FINITE for
        logits that are not finite (both of `ops.sampling`).
        """
        state = self.prefill(variables, tokens, valid, keys, max_new_tokens)
        return self.decode_until(variables, state, keys, max_new_tokens).out

    @partial(jax.jit, static_argnames=("self", "max_new_tokens"))
    def prefill(
        self, variables: trees.Tree, tokens: Array, valid: Array, keys: Array, max_new_tokens: int
    ) -> DecodeState:
        """Returns the state of `decode` after the first token, with room for max_new_tokens."""
        batch, length = tokens.shape
        slots = cache_slots(length + max_new_tokens)
        cache = init_cache(self.config, batch, slots, self.adapter)
        logits, cache = next_logits(self.config, self.adapter, variables, tokens, valid, cache)
        first, done = self._choose(logits, keys, jnp.zeros((), jnp.int32), ~jnp.any(valid, axis=1))
        out = jnp.full((batch, max_new_tokens), ENDED, jnp.int32).at[:, 0].set(first)
        return DecodeState(out, first, done, jnp.ones((), jnp.int32), cache)

    @partial(jax.jit, static_argnames="self")
    def decode_until(
        self, variables: trees.Tree, state: DecodeState, keys: Array, until: ArrayLike
    ) -> DecodeState:
        """Continues `decode` until `until` tokens are written (int32, at most the prefill's
        max_new_tokens), or all rows have ended.
        """

        def going(s: DecodeState) -> Array:
            return (s.step < until) & ~jnp.all(s.done)

        def one_token(s: DecodeState) -> DecodeState:
            fed = jnp.maximum(s.last, 0)[:, None]  # negative: ENDED, or NON_FINITE
            logits, cache = next_logits(self.config, self.adapter, variables, fed, None, s.cache)
            token, done = self._choose(logits, keys, s.step, s.done)
            out = jax.lax.dynamic_update_index_in_dim(s.out, token, s.step, axis=1)
            return DecodeState(out, token, done, s.step + 1, cache)

        start = replace(state, cache=state.cache.without_single_axes())
        end = jax.lax.while_loop(going, one_token, start)
        return replace(end, cache=end.cache.with_axes_of(state.cache))

    def _choose(self, logits: Array, keys: Array, step: Array, done: Array) -> tuple[Array, Array]:
        """Returns (next token of each row, ENDED after its end; True for rows that have ended)."""
        drawn = self.sampler(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step))
        ended = done
        if self.stop_token_ids:
            ended = done | jnp.isin(drawn, jnp.asarray(self.stop_token_ids, jnp.int32))
        return jnp.where(done, ENDED, drawn), ended
