"""Prompts in batches: checks, grouping by length, and padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.token_ids import check_ids

# A prompt is padded to one of these lengths, so that few programs are compiled: 16, powers of two
# up to 8192, and the lengths halfway between them.
PROMPT_LENGTHS = (16, *(n for p in range(5, 13) for n in (2**p, 3 * 2 ** (p - 1))), 2**13)


def padded_length(length: int) -> int:
    """Returns the smallest of PROMPT_LENGTHS that holds `length` (a multiple of 2048 beyond)."""
    return next((n for n in PROMPT_LENGTHS if n >= length), -(-length // 2048) * 2048)


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that holds `count`: few shapes, few programs."""
    return 1 << max(count - 1, 0).bit_length()


@dataclass(frozen=True)
class Batch:
    """Prompts that are run together.

    Attributes:
      rows: Their indices among all prompts.
      size: Rows of the arrays; above len(rows) if fillers keep the shape of other batches.
    """

    rows: list[int]
    size: int


def batches(
    lengths: Sequence[int], batch_size: int, *, longest_first: bool = False
) -> Iterator[Batch]:
    """Yields batches of one size, of prompts of similar length.

    Args:
      lengths: Number of tokens of each prompt.
      batch_size: Most prompts of a batch. Fewer prompts in all make one batch of the next power of
        two.
      longest_first: Whether the shortest prompts are in the last batch, which is filled up.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i] if longest_first else lengths[i])
    size = min(batch_size, power_of_two(len(order)))
    for start in range(0, len(order), batch_size):
        yield Batch(order[start : start + batch_size], size)


def listed(values: Any) -> list[Any]:
    """Returns a sequence or a generator as a list, and any other value unchanged."""
    return list(values) if isinstance(values, Iterable) else [values]


def pad_left(
    rows: Sequence[Sequence[int]], size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids as arrays of `size` rows, of which those after `rows` are all padding.

    Args:
      rows: Token ids of each row, at most `length`.
      size: Rows of the arrays, at least len(rows).
      length: Tokens of a row.

    Returns:
      (tokens int32 [size, length], 0 at padding; valid bool [size, length], False at padding).
    """
    tokens, valid = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    for n, row in enumerate(rows):
        tokens[n, length - len(row) :], valid[n, length - len(row) :] = row, True
    return tokens, valid


def check_row(model: Model, ids: Any, name: str) -> None:
    """Raises ConfigError for a row that is empty or no list of the model's token ids."""
    require(
        not isinstance(ids, str) and hasattr(ids, "__len__"),
        f"{name} is {ids!r:.80}: expected a list of token ids, e.g. [1, 2]. Encode texts with the"
        " model's tokenizer, or use `zf.generate`, which takes a list of texts.",
    )
    require(
        len(ids) > 0, f"{name} is empty: there must be at least one token (e.g. the BOS token)."
    )
    require(np.ndim(ids[0]) == 0, f"{name} holds lists; it must be a list of token ids.")
    check_ids(ids, model.config.vocab_size, name, model.tokenizer)


def check_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
    setting: str = "max_new_tokens",
) -> None:
    """Raises ConfigError for prompts with ids outside the vocabulary, or that exceed the context
    together with max_new_tokens.

    Args:
      model: The model.
      prompts: Token ids of each prompt.
      max_new_tokens: Number of tokens that follow a prompt.
      names: Names of the prompts for messages; None or "" for their numbers.
      setting: The setting that max_new_tokens comes from, for messages.
    """
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        name = (names[i] if names else "") or f"prompt {i}"
        check_row(model, prompt, name)
        require(
            len(prompt) + max_new_tokens <= limit,
            f"{name} has {len(prompt)} tokens; with {setting}={max_new_tokens} that exceeds the"
            f" model's context of {limit}. Shorten or remove it, or lower {setting}.",
        )
