"""Prompts in batches: what is checked, which share a batch, how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.token_ids import check_ids

# A prompt is padded to one of these lengths, so that few programs are compiled: 16, powers of two
# up to 8192, and the lengths halfway between them.
PROMPT_LENGTHS = (16, *(n for p in range(5, 13) for n in (2**p, 3 * 2 ** (p - 1))), 2**13)


def padded_length(length: int) -> int:
    """The smallest of PROMPT_LENGTHS that holds `length` (a multiple of 2048 beyond the last)."""
    return next((n for n in PROMPT_LENGTHS if n >= length), -(-length // 2048) * 2048)


@dataclass(frozen=True)
class Batch:
    """Prompts that are run together.

    Attributes:
      rows: their indices among all prompts.
      size: rows of the arrays; above len(rows) where fillers keep the shape of other batches.
    """

    rows: list[int]
    size: int


def power_of_two(count: int) -> int:
    """The smallest one that holds `count`: few shapes, few programs."""
    return 1 << max(count - 1, 0).bit_length()


def batches(
    lengths: Sequence[int], batch_size: int, *, longest_first: bool = False
) -> Iterator[Batch]:
    """Prompts of similar length together, all batches of one size.

    Args:
      lengths: of the prompts, in tokens.
      batch_size: most prompts of a batch. Fewer prompts in all make one batch of the next power of
        two.
      longest_first: where the last batch, which is filled up, is to be the cheapest.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i] if longest_first else lengths[i])
    size = min(batch_size, power_of_two(len(order)))
    for start in range(0, len(order), batch_size):
        yield Batch(order[start : start + batch_size], size)


def pad_left(
    rows: Sequence[Sequence[int]], size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as arrays.

    Args:
      rows: token ids of each row, at most `length`.
      size: rows of the arrays, at least len(rows); those beyond are all padding.
      length: tokens of a row.

    Returns:
      (tokens [size, length] int32, 0 at padding; valid [size, length] bool, False at padding).
    """
    tokens, valid = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    for n, row in enumerate(rows):
        tokens[n, length - len(row) :], valid[n, length - len(row) :] = row, True
    return tokens, valid


def check_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
    setting: str = "max_new_tokens",
) -> None:
    """ConfigError for a prompt that is not a list of the model's token ids, is empty, or exceeds
    the context together with max_new_tokens. For its message: names, of the prompts (None or "":
    their numbers), and the name of the setting.
    """
    no_ids = any(isinstance(prompt, str) or not hasattr(prompt, "__len__") for prompt in prompts)
    require(
        not no_ids,
        "prompts must be a list of prompts, each a list of token ids, e.g. [[1, 2], [3]];"
        " `zf.generate` takes a list of texts.",
    )
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        name = (names[i] if names else "") or f"prompt {i}"
        require(
            len(prompt) > 0,
            f"{name} is empty: generation needs at least one token (e.g. the BOS token).",
        )
        require(np.ndim(prompt[0]) == 0, f"{name} holds lists; it must be a list of token ids.")
        require(
            len(prompt) + max_new_tokens <= limit,
            f"{name} has {len(prompt)} tokens; with {setting}={max_new_tokens} that exceeds the"
            f" model's context of {limit}. Shorten or remove it, or lower {setting}.",
        )
        check_ids(prompt, model.config.vocab_size, name, model.tokenizer)
