"""Log-likelihoods of the answer options of multiple-choice questions.

Every option of a question shares the computation of its prompt, in two phases:

1. prompts: a prompt, and the tokens that all its options begin with, is run once;
2. options: the rest of each option, where that is more than one token, continues its cache.

Compiling a program of all layers takes longer than running it often, so its shapes are few: short
rows have a power of two of tokens. The head is a program of its own, over the positions that
predict a token of an option.

Letters: N rows of a call, T tokens per row, P positions of the head, d residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree, gathered
from zflora_jax.inference.batching import batches, pad_left, padded_length, power_of_two
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
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Sum of log p of each option's tokens after its prompt.

    log p(option | prompt) sums log_softmax(logits) over the option's tokens: no BOS or EOS is
    added, nothing is divided by a length. Float32 products are as exact as
    config.execution.matmul_precision says, as in training and decode. Processes that share a model
    call this together, with the same arguments, and all get the scores.

    Args:
      model: base, fused or packed.
      prompts: token ids of each prompt.
      options: for each prompt its options, of any number, each a list of token ids of any length.
      batch_size: prompts of similar length that share a batch.
      on_batch: called after each batch with its number of prompts.

    Returns:
      One float32 array [number of options] per prompt, in nats, in the order of `prompts`. They
      depend neither on batch_size nor on the other prompts (up to float rounding).

    Raises:
      ConfigError: an empty prompt or option, a prompt without options, ids outside the vocabulary,
        or more tokens than the context holds.
    """
    _check(model, prompts, options, batch_size)
    questions = [_question(prompt, row) for prompt, row in zip(prompts, options, strict=True)]
    run = packed(model)
    scores = [np.zeros(0, np.float32)] * len(questions)
    lengths = [len(question.prompt) + question.agreed for question in questions]
    # The longest first: the last batch, filled up, is the cheapest.
    for batch in batches(lengths, batch_size, longest_first=True):
        some = [questions[i] for i in batch.rows]
        first, cache = _score_prompts(run, some, batch.size)
        rest = _score_options(run, cache, some, batch_size)
        for i, common, own in zip(batch.rows, first, rest, strict=True):
            scores[i] = common + own
        if on_batch:
            on_batch(len(batch.rows))
    return scores


@dataclass(frozen=True)
class Question:
    """A prompt and its options, as token ids. All options begin with the same `agreed` tokens, and
    each has at least one more.
    """

    prompt: list[int]
    options: list[list[int]]
    agreed: int

    def next_tokens(self) -> list[int]:
        """The token of each option that follows the agreed ones."""
        return [option[self.agreed] for option in self.options]

    def rest(self, option: list[int]) -> list[int]:
        """What phase 2 feeds of an option: all but its last token, which nothing follows."""
        return option[self.agreed : -1]


def _question(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> Question:
    rows = [[int(t) for t in option] for option in options]
    return Question([int(t) for t in prompt], rows, _agreement(rows))


# --- the two phases -------------------------------------------------------------------------------


def _score_prompts(
    run: Model, questions: list[Question], size: int
) -> tuple[list[np.ndarray], KVCache | None]:
    """Phase 1: the prompts, and the tokens that their options agree in.

    Returns:
      (for each question log p of those agreed tokens and of the next token of each option, float32
      [number of options]; the cache that phase 2 continues, None where no option has more).
    """
    pieces = [
        Piece(0, q.prompt + q.options[0][: q.agreed], q.agreed, q.next_tokens()) for q in questions
    ]
    more = any(q.rest(option) for q in questions for option in q.options)
    return _feed(run, None, pieces, size, SHORTEST_PROMPT, keep=more)


def _score_options(
    run: Model, cache: KVCache | None, questions: list[Question], batch_size: int
) -> list[np.ndarray]:
    """Phase 2: log p of what phase 1 left of each option, float32 [number of options] per question;
    0 where it left nothing. `cache`: that of phase 1, a row per question.
    """
    scores = [np.zeros(len(q.options), np.float32) for q in questions]
    if cache is None:
        return scores
    left = [
        (row, k, Piece(row, q.rest(option), len(q.rest(option)) - 1, option[-1:]))
        for row, q in enumerate(questions)
        for k, option in enumerate(q.options)
        if q.rest(option)
    ]
    left.sort(key=lambda entry: len(entry[2].tokens))
    size = min(_length(len(left), 1), batch_size)
    for first in range(0, len(left), size):
        some = left[first : first + size]
        pieces = [piece for *_, piece in some]
        found, _ = _feed(run, cache, pieces, size, SHORTEST_OPTION, keep=False)
        for (row, k, _), (value,) in zip(some, found, strict=True):
            scores[row][k] = value
    return scores


# --- one call -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One row of a call.

    Attributes:
      parent: row of the cache that the tokens continue.
      tokens: to feed.
      scored: how many of them, at the end, are scored, each given all before it.
      candidates: tokens that are scored each as the one after `tokens`.
    """

    parent: int
    tokens: list[int]
    scored: int
    candidates: list[int]

    def asked(self, length: int) -> list[tuple[int, int]]:
        """(position, token that is to follow it) of all that is scored, the candidates last, in a
        row that is left-padded to `length`.
        """
        own = self.tokens[len(self.tokens) - self.scored :]
        first = length - 1 - self.scored
        return [*enumerate(own, first), *((length - 1, token) for token in self.candidates)]


def _feed(
    run: Model, past: KVCache | None, pieces: list[Piece], size: int, least: int, *, keep: bool
) -> tuple[list[np.ndarray], KVCache | None]:
    """Feed pieces, filled up to `size` rows of at least `least` tokens, and score them; `past` and
    `keep` as for `feed_pieces`.

    Returns:
      (for each piece log p of its candidates, each with that of its scored tokens, float32 [number
      of candidates]; the cache if `keep`).
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
    """The layers over pieces.

    Args:
      config: of the model, its layers unrolled.
      params: of the model.
      past: a full cache; None: the pieces continue nothing.
      parents: [N] int32, the row of `past` that each continues.
      tokens: [N, T] int32, left-padded.
      valid: [N, T] bool, False at padding.
      keep: whether to return a cache, of `past` and the tokens.

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
    """log p of tokens, each after a position of hidden states.

    Args:
      config: The model's config.
      params: The model's parameters.
      hidden: Final hidden states [N, T, d].
      rows: [P] int32.
      positions: [P] int32.
      wanted: [P] int32, the tokens.

    Returns:
      [P] float32, nats.
    """
    states = divide(hidden[rows, positions], "data")
    model: Any = Llama(config)
    logits = model.apply({"params": params}, states[:, None], method="logits")[:, 0]
    found = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
    return found - jax.nn.logsumexp(logits, axis=-1)


# --- lengths and checks ---------------------------------------------------------------------------


def _agreement(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with, the last token of the shortest left out: every row keeps
    one of its own.
    """
    low, high = min(rows), max(rows)  # in lexicographic order; where these two agree, all do
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return min(same, min(map(len, rows)) - 1)


def _length(n: int, least: int) -> int:
    """The smallest power of two that holds n, at least `least`; beyond 64 `padded_length`."""
    return max(least, power_of_two(n) if n <= 64 else padded_length(n))


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
    config, limit = model.config, model.config.max_position_embeddings

    def check(ids: Sequence[int], name: str, why: str) -> None:
        listed = not isinstance(ids, str) and hasattr(ids, "__len__")
        require(
            listed,
            f"{name} is {ids!r}: expected a list of token ids, e.g. [1, 2]; encode texts with the"
            " model's tokenizer first.",
        )
        require(len(ids) > 0, f"{name} is empty: {why}.")
        check_ids(ids, config.vocab_size, name, model.tokenizer)

    for i, (prompt, row) in enumerate(zip(prompts, options, strict=True)):
        check(
            prompt,
            f"prompt {i}",
            "the first token of an option needs at least one before it (e.g. the BOS token)",
        )
        require(len(row) > 0, f"prompt {i} has no options: give at least one list of token ids.")
        for k, option in enumerate(row):
            check(option, f"option {k} of prompt {i}", "there is nothing to score; leave it out")
            total = len(prompt) + len(option)
            require(
                total <= limit,
                f"prompt {i} and its option {k} have {total} tokens, {len(prompt)} + {len(option)};"
                f" the model's context holds {limit}. Shorten the prompt.",
            )
