"""Log-likelihoods of the answer options of multiple-choice questions.

All options of a question share the computation of its prompt, in two phases:

1. A prompt, with the tokens that all its options begin with, is run once.
2. The rest of each option, if that is more than one token, continues its cache.

Compiling often takes longer than running, so the shapes are few: short rows have a power of two of
tokens. The head is a separate program, over the positions that predict a token of an option.

Letters: N rows of a call, T tokens per row, P positions of the head, d residual width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree, gathered
from zflora_jax.inference.batching import (
    batches,
    check_row,
    listed,
    pad_left,
    padded_length,
    power_of_two,
)
from zflora_jax.inference.program import packed
from zflora_jax.nn.kv_cache import KVCache, init_cache
from zflora_jax.nn.llama import Llama
from zflora_jax.ops.precision import at_config_precision
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use
from zflora_jax.parallel.sharding import divide

Array = jax.Array
# Positions whose logits exist at one time: 50 MB for a vocabulary of 49152.
HEAD_POSITIONS = 256
# Shortest rows of phase 1 and of phase 2, in tokens
SHORTEST_PROMPT, SHORTEST_OPTION = 32, 16


def option_log_likelihoods(
    model: Model,
    prompts: Iterable[Sequence[int]],
    options: Iterable[Iterable[Sequence[int]]],
    *,
    batch_size: int = 16,
) -> list[np.ndarray]:
    """Sums log p of each option's tokens after its prompt.

    No BOS or EOS is added, and sums are not divided by a length. Float32 products have the
    precision of config.execution.matmul_precision, as in training and decode. Processes that share
    a model call this together, with the same arguments, and all get the scores.

    Args:
      model: A base, fused or packed model.
      prompts: Token ids of each prompt.
      options: For each prompt any number of options, each a list of token ids.
      batch_size: Number of prompts of similar length that share a batch.

    Returns:
      One float32 array [number of options] per prompt, in nats, in the order of `prompts`. They
      depend neither on batch_size nor on the other prompts (up to float rounding).

    Raises:
      ConfigError: A prompt or option is empty, a prompt has no options, ids are outside the
        vocabulary, or the tokens exceed the context.
      NonFiniteError: A log-likelihood is NaN or infinite.
    """
    prompts, rows = listed(prompts), [listed(row) for row in listed(options)]
    _check(model, prompts, rows, batch_size)
    run = packed(model)
    ids = [[[int(token) for token in option] for option in row] for row in rows]
    lengths = [len(prompt) + _agreement(row) for prompt, row in zip(prompts, ids, strict=True)]
    scores = [np.zeros(0, np.float32)] * len(ids)
    # The longest first: the last batch, filled up, is the cheapest.
    for batch in batches(lengths, batch_size, longest_first=True):
        questions = [(prompts[i], ids[i]) for i in batch.rows]
        found = _score(run, questions, batch.size, batch_size)
        if not all(np.isfinite(row).all() for row in found):  # argmax would pick a NaN
            raise NonFiniteError(
                "log-likelihoods are NaN or infinite: the model is damaged, or was trained with too"
                " high a learning rate."
            )
        for i, values in zip(batch.rows, found, strict=True):
            scores[i] = values
    return scores


def _score(
    run: Model,
    questions: Sequence[tuple[Sequence[int], list[list[int]]]],
    size: int,
    batch_size: int,
) -> list[np.ndarray]:
    """Returns the scores of one batch of (prompt, options): its two phases."""
    begun, rest = [], []
    for row, (prompt, options) in enumerate(questions):
        same = _agreement(options)
        begun.append(Piece([*prompt, *options[0][:same]], same, [o[same] for o in options]))
        for k, option in enumerate(options):
            if left := option[same:-1]:  # nothing follows the last token
                rest.append((row, k, Piece(left, len(left) - 1, option[-1:], row)))
    scores, cache = _feed(run, None, begun, size, SHORTEST_PROMPT, keep=bool(rest))
    rest.sort(key=lambda entry: len(entry[2].tokens))
    size = min(_length(len(rest), 1), batch_size)
    for first in range(0, len(rest), size):
        some = rest[first : first + size]
        found, _ = _feed(run, cache, [p for *_, p in some], size, SHORTEST_OPTION, keep=False)
        for (row, k, _), (value,) in zip(some, found, strict=True):
            scores[row][k] += value
    return scores


def _agreement(rows: list[list[int]]) -> int:
    """Returns the length of the rows' common beginning; each keeps at least one token after it."""
    low, high = min(rows), max(rows)  # in lexicographic order; where these two agree, all do
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return min(same, min(map(len, rows)) - 1)


def _length(n: int, least: int) -> int:
    """Returns the power of two that holds n, at least `least`; beyond 64 `padded_length`."""
    return max(least, power_of_two(n) if n <= 64 else padded_length(n))


@dataclass(frozen=True)
class Piece:
    """One row of a call.

    Attributes:
      tokens: Tokens to feed.
      scored: Number of last tokens that are scored, each given all tokens before it.
      candidates: Tokens that are scored as the next one after `tokens`.
      parent: Row of the cache that the tokens continue.
    """

    tokens: list[int]
    scored: int
    candidates: list[int]
    parent: int = 0

    def asked(self, length: int) -> list[tuple[int, int]]:
        """Returns (position, next token) of all scored tokens, the candidates last, in a row that
        is left-padded to `length`.
        """
        own = self.tokens[len(self.tokens) - self.scored :]
        first = length - 1 - self.scored
        return [*enumerate(own, first), *((length - 1, token) for token in self.candidates)]


def _feed(
    run: Model, past: KVCache | None, pieces: list[Piece], size: int, least: int, *, keep: bool
) -> tuple[list[np.ndarray], KVCache | None]:
    """Feeds pieces, filled to `size` rows of at least `least` tokens. `past` and `keep` are those
    of `feed_pieces`.

    Returns:
      (For each piece log p of its candidates, each plus that of its scored tokens, float32 [number
      of candidates]; the cache if `keep`.)
    """
    size = fill_rows(size, run.params) if size > 1 else size
    length = _length(max(len(p.tokens) for p in pieces), least)
    tokens, valid = pad_left([p.tokens for p in pieces], size, length)
    parents = np.zeros(size, np.int32)
    parents[: len(pieces)] = [p.parent for p in pieces]
    with mesh_in_use(run.params):
        hidden, cache = feed_pieces(run.config, run.params, past, parents, tokens, valid, keep)
        asked = [(row, *place) for row, piece in enumerate(pieces) for place in piece.asked(length)]
        found = [np.zeros(0, np.float32)]
        for first in range(0, len(asked), HEAD_POSITIONS):
            some = asked[first : first + HEAD_POSITIONS]
            places = np.zeros((min(_length(len(some), 32), HEAD_POSITIONS), 3), np.int32)
            places[: len(some)] = some
            values = token_log_p(run.config, run.params, hidden, *places.T)
            found.append(gathered(values)[: len(some)])
    ends = np.cumsum([p.scored + len(p.candidates) for p in pieces])[:-1]
    each = np.split(np.concatenate(found), ends)
    return [x[p.scored :] + x[: p.scored].sum() for x, p in zip(each, pieces, strict=True)], cache


@partial(jax.jit, static_argnames=("config", "keep"))
@at_config_precision
def feed_pieces(
    config: LlamaConfig,
    params: Tree,
    past: KVCache | None,
    parents: Array,
    tokens: Array,
    valid: Array,
    keep: bool,
) -> tuple[Array, KVCache | None]:
    """Runs the layers over pieces.

    Args:
      config: The model's config, layers unrolled.
      params: The model's parameters.
      past: A full cache; None if the pieces continue nothing.
      parents: Row of `past` that each piece continues, int32 [N].
      tokens: Token ids, left-padded, int32 [N, T].
      valid: Real tokens, bool [N, T].
      keep: Whether to return the cache of `past` and the tokens.

    Returns:
      (final hidden states [N, T, d]; the cache, None without `keep`).
    """
    rows, length = tokens.shape
    cache = init_cache(config, rows, length) if keep and past is None else None
    if past is not None:
        cache = past.continue_rows(parents, length)
    model: Any = Llama(config)
    hidden, cache = model.apply({"params": params}, tokens, valid, cache, method="hidden")
    return hidden, cache if keep else None


@partial(jax.jit, static_argnames=("config",))
@at_config_precision
def token_log_p(
    config: LlamaConfig, params: Tree, hidden: Array, rows: Array, positions: Array, wanted: Array
) -> Array:
    """Returns log p of tokens, each after a position of hidden states.

    Args:
      config: The model's config.
      params: The model's parameters.
      hidden: Final hidden states [N, T, d].
      rows: Row of each token's position, int32 [P].
      positions: Position before each token, int32 [P].
      wanted: The tokens, int32 [P].

    Returns:
      Nats, float32 [P].
    """
    states = divide(hidden[rows, positions], "data")
    model: Any = Llama(config)
    logits = model.apply({"params": params}, states[:, None], method="logits")[:, 0]
    found = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
    return found - jax.nn.logsumexp(logits, axis=-1)


def _check(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
) -> None:
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1.")
    require(
        len(prompts) == len(options),
        f"{len(prompts)} prompts and {len(options)} lists of options: expected one list for each"
        " prompt.",
    )
    limit = model.config.max_position_embeddings
    for i, (prompt, row) in enumerate(zip(prompts, options, strict=True)):
        check_row(model, prompt, f"prompt {i}")
        require(len(row) > 0, f"prompt {i} has no options: give at least one list of token ids.")
        for k, option in enumerate(row):
            check_row(model, option, f"option {k} of prompt {i}")
            total = len(prompt) + len(option)
            require(
                total <= limit,
                f"prompt {i} and its option {k} have {total} tokens, {len(prompt)} + {len(option)};"
                f" the model's context holds {limit}. Shorten the prompt.",
            )
