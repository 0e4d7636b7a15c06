"""More rows for a model's embedding and head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from zflora_jax.core import trees
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model, require_there
from zflora_jax.core.token_ids import rows_needed
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel.sharding import placement


def resize_vocab(model: Model, tokenizer_or_size: Any) -> Model:
    """Gives a model's embedding (and untied head) rows for more tokens; config.vocab_size follows.

    New rows are the mean of the existing ones, in float32 and cast once, so that a new token starts
    as likely as an average one. Adapters do not train them; method "full" does.

    Args:
      model: A base or fused model, stacked or per layer, on one device or on a mesh; not packed.
      tokenizer_or_size: A tokenizer, which becomes the model's and whose ids all get a row (a
        larger embedding keeps its size), or the number of rows.

    Returns:
      A new Model; `model` is left as it is.

    Raises:
      ConfigError: a packed or donated model, a table of codes, or a size below the ids in use.
    """
    config = model.config
    require_there(model.params)
    require(
        not config.execution.packed,
        "this model is packed for decode; resize the model it was packed from.",
    )
    size, tokenizer = _new_size(model, tokenizer_or_size)
    flat = trees.flatten(model.params)
    for name, axis in (("embed/embedding", 0), ("lm_head/kernel", 1)):
        if name in flat:
            require(
                not isinstance(flat[name], QuantizedArray),
                f"{name} is stored as {flat[name].dtype}: resize a model whose embedding and head"
                " are floats (load it with quantize.embedding=none and quantize.head=none, or use"
                " zf.dequantize_model), and quantise them afterwards (zf.quantize_model).",
            )
            flat[name] = _resized(name, flat[name], axis, size)
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


def _resized(name: str, leaf: jax.Array, axis: int, size: int) -> jax.Array:
    """A leaf with `size` tokens along `axis`."""
    count = size - leaf.shape[axis]

    def resize(leaf: jax.Array) -> jax.Array:
        if count <= 0:
            return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
        mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True)
        return jnp.concatenate([leaf, jnp.repeat(mean, count, axis).astype(leaf.dtype)], axis=axis)

    where, out = getattr(leaf, "sharding", None), None
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
        shape = tuple(size if i == axis else n for i, n in enumerate(leaf.shape))
        out = placement(where.mesh, name, shape)
    return jax.jit(resize, out_shardings=out)(leaf)
