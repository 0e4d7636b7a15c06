"""Adapters of several tasks in one batch: each row runs with its own, and the products with base
kernels are still one for the whole batch.

Letters: B batch, T positions, d residual width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zflora_jax.core.fields import require
from zflora_jax.core.trees import Tree
from zflora_jax.nn.kv_cache import KVCache
from zflora_jax.ops.products import Array


def hidden_states(
    llama: nn.Module,
    variables: Tree,
    tokens: Array,
    padding_mask: Array | None = None,
    cache: KVCache | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, Any]:
    """`Llama.hidden` of `variables`, whose adapters may be each row's own.

    Args:
      llama: a Llama.
      variables: {"params": ...} and, for a model with an adapter, {"adapters": ...}, or
        {"row_adapters": leaves [B, ...]} as `adapters.tasks.rows_of` gathers them.
      tokens: [B, T] int32.
      padding_mask: as in `Llama.__call__`, as are cache and segment_ids.

    Raises:
      ConfigError: row_adapters of another number of rows than tokens.
    """
    if "row_adapters" not in variables:
        given = (tokens, padding_mask, cache, segment_ids)
        return llama.apply(variables, *given, method="hidden")  # type: ignore[return-value]
    params, row_adapters = variables["params"], variables["row_adapters"]
    count = len(jax.tree.leaves(row_adapters)[0])
    require(
        count == len(tokens),
        f"row_adapters of {count} rows and tokens of {len(tokens)}: give one for each row, as"
        " `adapters.tasks.rows_of` does.",
    )

    def run(adapters: Tree, *given: Any) -> Any:
        return llama.apply({"params": params, "adapters": adapters}, *given, method="hidden")

    if count == 1:
        only = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), row_adapters)
        return run(only, tokens, padding_mask, cache, segment_ids)

    def of_row(
        adapters: Tree,
        tokens: Array,
        padding_mask: Array | None,
        segment_ids: Array | None,
        layers: Any,
        valid: Array | None,
    ) -> tuple[Array, Any, Array | None]:
        """A batch of one row; `layers` have no axis for it."""
        one, mask, segments, slots = jax.tree.map(
            lambda x: x[None], (tokens, padding_mask, segment_ids, valid)
        )
        past = None if cache is None or slots is None else KVCache(layers, slots, cache.index)
        x, past = run(adapters, one, mask, past, segments)
        return (x[0], None, None) if past is None else (x[0], past.layers, past.valid[0])

    axis = 0 if cache is None else cache.row_axis
    past = (None, None) if cache is None else (cache.layers, cache.valid)
    x, layers, valid = jax.vmap(of_row, in_axes=(0, 0, 0, 0, axis, 0), out_axes=(0, axis, 0))(
        row_adapters, tokens, padding_mask, segment_ids, *past
    )
    if cache is None or valid is None:
        return x, None
    return x, KVCache(layers, valid, cache.index + tokens.shape[1])
