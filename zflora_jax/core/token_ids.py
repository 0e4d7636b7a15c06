"""Checks of token ids against the embedding: ids without a row are refused.

A lookup beyond the table gives NaN, which spreads from there through every logit and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zflora_jax.core.fields import ConfigError, require


def check_ids(ids: Any, vocab_size: int, what: str, tokenizer: Any = None) -> None:
    """Raises ConfigError that names ids that are no integers or outside 0..vocab_size - 1.

    Args:
      ids: Sequence or array of token ids.
      vocab_size: Rows of the model's embedding.
      what: Origin of the ids, for the message ("prompt 3").
      tokenizer: The model's tokenizer, if it has one.
    """
    try:
        values = np.asarray(ids)
    except ValueError:  # lists of several lengths
        values = np.asarray(ids, object)
    require(
        not values.size or np.issubdtype(values.dtype, np.integer),
        f"{what} must hold token ids, which are integers; got {values.dtype} {ids!r:.60}.",
    )
    outside = np.unique(values[(values < 0) | (values >= vocab_size)]).tolist()
    if outside:
        raise ConfigError(
            f"{what} holds token ids outside 0..{vocab_size - 1}{_named(outside, tokenizer)}"
        )


def _named(outside: Sequence[int], tokenizer: Any) -> str:
    known = 0 if tokenizer is None else rows_needed(tokenizer)
    if outside[0] < 0 or outside[-1] >= known:
        return ": is this the model's own tokenizer?"
    names = [f"{i} ({tokenizer.convert_ids_to_tokens(int(i))!r})" for i in outside[:5]]
    more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
    return (
        f": {', '.join(names)}{more}. The model has no embedding for these tokens. Add rows with"
        " transformers' resize_token_embeddings and load what it saves, or use a token that it has,"
        " e.g. tokenizer.pad_token = tokenizer.eos_token."
    )


def rows_needed(tokenizer: Any) -> int:
    """Number of rows that an embedding for all of its ids needs."""
    return max(tokenizer.get_vocab().values()) + 1
