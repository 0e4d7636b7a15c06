"""Adapters of several tasks in one batch: each row runs with its own, and the products with base
kernels are still one for the whole batch.

Letters: B batch, T positions, d residual width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zflora_jax.core.fields import require
from zflora_jax.core.trees import Tree
from zflora_jax.nn.kv_cache import KVCache
from zflora_jax.ops.linear import Array


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
    given = (tokens, padding_mask, cache, segment_ids)
    if "row_adapters" not in variables:
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
        return run(jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), row_adapters), *given)
    return _by_rows(run, row_adapters, *given)


def _by_rows(
    run: Callable[..., Any],
    row_adapters: Tree,
    tokens: Array,
    padding_mask: Array | None,
    cache: KVCache | None,
    segment_ids: Array | None,
) -> tuple[Array, KVCache | None]:
    """run(adapters, tokens, padding_mask, cache, segment_ids) of each row, under vmap."""

    def of_row(adapters: Tree, inputs: Any, layers: Any, valid: Array | None) -> Any:
        """A batch of one row; `layers` have no axis for it."""
        tokens, padding_mask, segment_ids = jax.tree.map(lambda x: x[None], inputs)
        past = None
        if cache is not None and valid is not None:
            past = KVCache(layers, valid[None], cache.index, cache.empty)
        x, past = run(adapters, tokens, padding_mask, past, segment_ids)
        return (x[0], None, None) if past is None else (x[0], past.layers, past.valid[0])

    inputs = tokens, padding_mask, segment_ids
    if cache is None:
        return jax.vmap(of_row)(row_adapters, inputs, None, None)[0], None
    x, layers, valid = jax.vmap(of_row, (0, 0, cache.row_axis, 0), (0, cache.row_axis, 0))(
        row_adapters, inputs, cache.layers, cache.valid
    )
    return x, KVCache(layers, valid, cache.index + tokens.shape[1])
