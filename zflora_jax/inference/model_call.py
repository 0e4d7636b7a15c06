"""The calls into the model: the one place of this package that knows how a model is run.

Letters: B batch, T positions, S cache slots, d residual width, V vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax

from zflora_jax.adapters.packing import apart_for, pack_for_decode
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.nn.kv_cache import KVCache, cache_slots, init_cache
from zflora_jax.nn.llama import Llama
from zflora_jax.nn.row_adapters import hidden_states
from zflora_jax.ops.precision import at_precision

Array = jax.Array

_packed: weakref.WeakKeyDictionary[Model, tuple[Tree, Model]] = weakref.WeakKeyDictionary()
_apart: weakref.WeakKeyDictionary[Model, tuple[Tree, Model]] = weakref.WeakKeyDictionary()


def packed(model: Model, beside: AdapterConfig | None = None) -> Model:
    """`model` packed for decode; the result is kept as long as `model` lives, so that repeated
    calls do not pack again. beside: as for `pack_for_decode`.
    """
    kept = _apart if apart_for(model, beside) else _packed
    if model not in kept or kept[model][0] is not model.params:
        made = pack_for_decode(model, beside=beside)
        if made is model:
            return model
        kept[model] = model.params, made
    return kept[model][1]


def hidden(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    tokens: Array,
    valid: Array | None,
    cache: KVCache | None,
) -> tuple[Array, KVCache | None]:
    """Run the layers, with float32 products at config.execution.matmul_precision.

    Args:
      config: of the model.
      adapter: of adapters that are not fused; None without.
      variables: {"params": ...}, with an adapter also {"adapters": ...} or {"row_adapters": ...}
        (see `row_adapters.hidden_states`).
      tokens: [B, T] int32, left-padded where `valid` is False.
      valid: [B, T] bool; None where all tokens are real.
      cache: what the tokens continue; None for nothing.

    Returns:
      (final hidden states [B, T, d] in the activation dtype, the updated cache or None).
    """
    with at_precision(config.execution.matmul_precision):
        return hidden_states(Llama(config, adapter), variables, tokens, valid, cache)


def logits(
    config: LlamaConfig, adapter: AdapterConfig | None, variables: Tree, states: Array
) -> Array:
    """Logits [B, T, V] float32 of hidden states [B, T, d]; other arguments as for `hidden`."""
    with at_precision(config.execution.matmul_precision):
        found: Any = Llama(config, adapter).apply(variables, states, method="logits")
    return found


def next_logits(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    tokens: Array,
    valid: Array | None,
    cache: KVCache,
) -> tuple[Array, KVCache]:
    """(Logits [B, V] float32 of the token that follows each row of `tokens`, the updated cache);
    arguments as for `hidden`.
    """
    states, updated = hidden(config, adapter, variables, tokens, valid, cache)
    assert updated is not None  # a cache was given
    return logits(config, adapter, variables, states[:, -1:])[:, 0], updated


def empty_cache(
    config: LlamaConfig, adapter: AdapterConfig | None, batch: int, positions: int
) -> KVCache:
    """A cache for `batch` rows with room for at least `positions` tokens."""
    return init_cache(config, batch, cache_slots(positions), adapter)
