"""The token loop as one program: prefill and decode, compiled, for any model's tree.

A row's result does not depend on the rows beside it: padding is never attended to and takes no
position, and each row draws from its own random stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.inference.model_call import empty_cache, next_logits
from zflora_jax.inference.sampling import GREEDY, Sampler
from zflora_jax.nn.kv_cache import KVCache
from zflora_jax.ops.sampling import ENDED

Array = jax.Array


@flax.struct.dataclass
class DecodeState:
    """The loop's carry.

    Attributes:
      out: [B, N] int32, the tokens written so far; `sampling.ENDED` after the end of a row.
      last: [B] int32, the token to feed next.
      done: [B] bool, whether the row has ended.
      step: int32, how many tokens are written.
      cache: keys and values of the prompts and of the tokens fed so far.
    """

    out: Array
    last: Array
    done: Array
    step: Array
    cache: KVCache


@dataclass(frozen=True)
class DecodeProgram:
    """How tokens are generated. Equal programs share what is compiled.

    Attributes:
      config: of the model.
      adapter: of adapters that run beside the base; None for a base, fused or packed tree.
      sampler: chooses each token.
      stop_token_ids: tokens that end a row.

    The methods take arrays only, and max_new_tokens, for which they are compiled:
      variables: of the model (see `model_call.hidden`).
      tokens: [B, T] int32, prompts padded on the left.
      valid: [B, T] bool, False at padding. A row that is all padding (a filler) yields nothing.
      keys: [B], one random key per row.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    sampler: Sampler = GREEDY
    stop_token_ids: tuple[int, ...] = ()

    @partial(jax.jit, static_argnames=("self", "max_new_tokens"))
    def decode(
        self, variables: Tree, tokens: Array, valid: Array, keys: Array, max_new_tokens: int
    ) -> Array:
        """Generated tokens [B, max_new_tokens] int32: up to a row's stop token, then
        `sampling.ENDED`; where the logits are not finite, `sampling.NON_FINITE`.
        """
        state = self.prefill(variables, tokens, valid, keys, max_new_tokens)
        return self.decode_until(variables, state, keys, max_new_tokens).out

    @partial(jax.jit, static_argnames=("self", "max_new_tokens"))
    def prefill(
        self, variables: Tree, tokens: Array, valid: Array, keys: Array, max_new_tokens: int
    ) -> DecodeState:
        """The first part of `decode`: the state after the first token, with room for
        max_new_tokens.
        """
        batch, length = tokens.shape
        cache = empty_cache(self.config, self.adapter, batch, length + max_new_tokens)
        logits, cache = next_logits(self.config, self.adapter, variables, tokens, valid, cache)
        first, done = self._choose(logits, keys, jnp.zeros((), jnp.int32), ~jnp.any(valid, axis=1))
        out = jnp.full((batch, max_new_tokens), ENDED, jnp.int32).at[:, 0].set(first)
        return DecodeState(out, first, done, jnp.ones((), jnp.int32), cache)

    @partial(jax.jit, static_argnames="self", donate_argnames="state")
    def decode_until(
        self, variables: Tree, state: DecodeState, keys: Array, until: ArrayLike
    ) -> DecodeState:
        """The rest of `decode`: go on until `until` tokens are written (int32, at most the
        prefill's max_new_tokens), or all rows have ended. `state` is donated.
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
        """(the token that each row goes on with, ENDED where it has ended; whether it has ended
        now).
        """
        drawn = self.sampler(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step))
        ended = done
        if self.stop_token_ids:
            ended = done | jnp.isin(drawn, jnp.asarray(self.stop_token_ids, jnp.int32))
        return jnp.where(done, ENDED, drawn), ended
