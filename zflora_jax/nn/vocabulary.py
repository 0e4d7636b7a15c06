"""More rows for a model's embedding and head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from zflora_jax.core import trees
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.token_ids import rows_needed
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel.sharding import spec


def resize_vocab(
    model: Model,
    tokenizer_or_size: Any,
    *,
    rows: ArrayLike | None = None,
    head_rows: ArrayLike | None = None,
) -> Model:
    """Gives a model's embedding (and untied head) rows for more tokens; config.vocab_size follows.

    New rows are the mean of the existing ones, in float32 and cast once, so that a new token starts
    as likely as an average one. Adapters do not train them (method "full" does): give `rows` that
    were trained elsewhere.

    Args:
      model: A base or fused model, stacked or per layer, on one device or on a mesh; not packed.
      tokenizer_or_size: A tokenizer, which becomes the model's and whose ids all get a row (a
        larger embedding keeps its size), or the number of rows.
      rows: Rows [n, d] of the n new tokens, d the base's residual width; also for a tied head.
      head_rows: Rows [n, d] of an untied head.

    Returns:
      A new Model; `model` is left as it is.

    Raises:
      ConfigError: a packed model, a table of codes, a size below the ids in use, or rows of the
        wrong shape.
    """
    config = model.config
    require(
        not config.execution.packed,
        "this model is packed for decode; resize the model it was packed from.",
    )
    size, tokenizer = _new_size(model, tokenizer_or_size)
    given = {"embed/embedding": (0, rows), "lm_head/kernel": (1, head_rows)}
    require(
        head_rows is None or not config.tie_word_embeddings,
        "head_rows: this model's head is its embedding; give `rows` alone.",
    )
    flat = trees.flatten(model.params)
    for name in set(given) & set(flat):
        axis, new = given[name]
        require(
            not isinstance(flat[name], QuantizedArray),
            f"{name} is stored as {flat[name].dtype}: resize a model whose embedding and head are"
            " numbers (load it with quantize.embedding=none and quantize.head=none, or use"
            " zf.dequantize_model), and quantise them afterwards (zf.quantize_model).",
        )
        flat[name] = _resized(name, flat[name], axis, size, config.norm_dim, new)
    wider, params = config.replace(vocab_size=size), trees.unflatten(flat)
    return dataclasses.replace(model, config=wider, params=params, tokenizer=tokenizer)


def _new_size(model: Model, tokenizer_or_size: Any) -> tuple[int, Any]:
    """The new size of the vocabulary, and the model's tokenizer then."""
    config = model.config
    if isinstance(tokenizer_or_size, int | np.integer):
        size, tokenizer = int(tokenizer_or_size), model.tokenizer
    else:
        require(
            hasattr(tokenizer_or_size, "get_vocab"),
            "resize_vocab takes a tokenizer or a number of tokens.",
        )
        tokenizer = tokenizer_or_size
        size = max(rows_needed(tokenizer), config.vocab_size)
    special = (config.bos_token_id, config.pad_token_id, *config.eos_token_ids)
    in_use = rows_needed(tokenizer) if tokenizer is not None else config.vocab_size
    used = max(in_use, *(i + 1 for i in special if i is not None), 0)
    require(
        size >= min(used, config.vocab_size),
        f"resize_vocab to {size} would drop token ids in use: the largest is {used - 1}. Give"
        f" {used} or more.",
    )
    return size, tokenizer


def _resized(
    name: str, leaf: jax.Array, axis: int, size: int, width: int, rows: ArrayLike | None
) -> jax.Array:
    """A leaf with `size` tokens along `axis`. width: the residual channels of `rows`."""
    count = size - leaf.shape[axis]
    if rows is not None:
        rows = np.asarray(rows, np.float32)
        require(
            rows.shape == (max(count, 0), width),
            f"{name}: rows of shape {rows.shape}; expected ({max(count, 0)}, {width}), one row for"
            " each new token.",
        )
        require(bool(np.isfinite(rows).all()), f"{name}: rows hold NaN or infinite values.")

    def resize(leaf: jax.Array) -> jax.Array:
        if count <= 0:
            return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
        mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True)
        new = jnp.repeat(mean, count, axis=axis)
        if rows is not None:
            new = jnp.asarray(rows if axis == 0 else rows.T)
        return jnp.concatenate([leaf, new.astype(leaf.dtype)], axis=axis)

    where, out = getattr(leaf, "sharding", None), None
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        shape = tuple(size if i == axis else n for i, n in enumerate(leaf.shape))
        out = NamedSharding(where.mesh, spec(name, shape, where.mesh))
    return jax.jit(resize, out_shardings=out)(leaf)
