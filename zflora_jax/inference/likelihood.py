"""Log-likelihoods of given answers: how probable a model finds each option of a multiple-choice
question.

Every token is computed once wherever options agree, in three phases:

1. shared start: what all prompts begin with (a chat template, worked examples) is fed once, and its
   keys and values are copied to each row;
2. prompts: the rest of a prompt and what its options begin with is fed once for all its options;
3. options: what is left of each option, where that is more than one token, is fed per option.

The head, as wide as the vocabulary, sees no more positions than predict tokens of an option.

Letters: N rows of a call, T tokens fed per row, S cache slots, C candidates for the next token, d
residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree, gathered
from zflora_jax.inference import model_call
from zflora_jax.inference.batching import batches, pad_left, padded_length
from zflora_jax.nn.kv_cache import KVCache, init_cache
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use

Array = jax.Array
# Keys and values that one call may copy for options; a batch's worth of options may always.
CACHE_BYTES = 1 << 30
# Positions whose logits exist at one time, or one row's: 50 MB for a vocabulary of 49152.
HEAD_POSITIONS = 256
WORTH_SHARING = 16  # tokens that all prompts must begin with to be fed by a call of their own


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
    run = model_call.packed(model)
    shared, start = _feed_shared_start(run, [question.prompt for question in questions])
    scores = [np.zeros(0, np.float32)] * len(questions)
    lengths = [len(question.prompt) + question.agreed for question in questions]
    # The longest first: the last batch, filled up, is the cheapest.
    for batch in batches(lengths, batch_size, longest_first=True):
        some = [questions[i] for i in batch.rows]
        first, cache = _score_prompts(run, start, shared, some, batch.size)
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
        """What phase 3 feeds of an option: all but its last token, which nothing follows."""
        return option[self.agreed : -1]


def _question(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> Question:
    rows = [[int(t) for t in option] for option in options]
    return Question([int(t) for t in prompt], rows, _agreement(rows))


# --- the three phases -----------------------------------------------------------------------------


def _feed_shared_start(run: Model, prompts: list[list[int]]) -> tuple[int, KVCache | None]:
    """Phase 1. Returns (how many tokens of all prompts are fed here, their cache of one row); (0,
    None) where that is not worth a call.
    """
    shared = _agreement(prompts) if len(prompts) > 1 else 0
    if shared < WORTH_SHARING:
        return 0, None
    _, cache = _feed(run, None, [Piece(0, prompts[0][:shared], 0, [0])], 1, keep=True)
    return shared, cache


def _score_prompts(
    run: Model, start: KVCache | None, shared: int, questions: list[Question], size: int
) -> tuple[list[np.ndarray], KVCache | None]:
    """Phase 2: the prompts after their `shared` tokens, and the tokens that their options agree in.

    Returns:
      (for each question log p of those agreed tokens and of the next token of each option, float32
      [number of options]; the cache that phase 3 continues, None where no option has more).
    """
    pieces = [
        Piece(0, q.prompt[shared:] + q.options[0][: q.agreed], q.agreed, q.next_tokens())
        for q in questions
    ]
    more = any(q.rest(option) for q in questions for option in q.options)
    found, cache = _feed(run, start, pieces, size, keep=more)
    rows = [row[: len(q.options)] for row, q in zip(found, questions, strict=True)]
    return rows, cache


def _score_options(
    run: Model, cache: KVCache | None, questions: list[Question], batch_size: int
) -> list[np.ndarray]:
    """Phase 3: log p of what phase 2 left of each option, float32 [number of options] per question;
    0 where it left nothing. `cache`: that of phase 2, a row per question.
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
    per_call = max(batch_size, CACHE_BYTES // _row_bytes(cache))
    for first in range(0, len(left), per_call):
        some = left[first : first + per_call]
        size = min(_bucket(len(some)), per_call)
        found, _ = _feed(run, cache, [piece for *_, piece in some], size, keep=False)
        for (row, k, _), value in zip(some, found[:, 0], strict=True):
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


@flax.struct.dataclass
class PieceBatch:
    """Pieces as arrays.

    Attributes:
      parents: [N] int32.
      tokens: [N, T] int32, left-padded.
      valid: [N, T] bool, False at padding.
      scored: [N] int32.
      candidates: [N, C] int32.
    """

    parents: Array
    tokens: Array
    valid: Array
    scored: Array
    candidates: Array


def _feed(
    run: Model, past: KVCache | None, pieces: list[Piece], size: int, *, keep: bool
) -> tuple[np.ndarray, KVCache | None]:
    """`score_pieces` over `pieces`, filled up to `size` rows, in shapes that few calls differ in.

    Returns:
      (scores [len(pieces), C] float32, the cache if `keep`).
    """
    size = fill_rows(size, run.params) if size > 1 else size
    longest, scored = max(len(p.tokens) for p in pieces), max(p.scored for p in pieces)
    length = padded_length(longest) if past is None or longest > 16 else _bucket(longest)
    tokens, valid = pad_left([p.tokens for p in pieces], size, length)
    candidates = np.zeros((size, _bucket(max(len(p.candidates) for p in pieces))), np.int32)
    parents, counts = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for n, p in enumerate(pieces):
        candidates[n, : len(p.candidates)] = p.candidates
        parents[n], counts[n] = p.parent, p.scored
    batch = PieceBatch(parents, tokens, valid, counts, candidates)  # type: ignore[arg-type]
    span = min(_bucket(scored), length - 1)
    with mesh_in_use(run.params):
        scores, cache = score_pieces(run.config, run.params, past, batch, span, keep)
    return gathered(scores)[: len(pieces)], cache


@partial(jax.jit, static_argnames=("config", "span", "keep"))
def score_pieces(
    config: LlamaConfig,
    params: Tree,
    past: KVCache | None,
    batch: PieceBatch,
    span: int,
    keep: bool,
) -> tuple[Array, KVCache | None]:
    """Feed pieces after rows of a cache, and score them.

    Args:
      config: of the model, its layers unrolled.
      params: of the model.
      past: a full cache that batch.parents are rows of; None: the pieces continue nothing.
      batch: the pieces.
      span: at least the largest of batch.scored.
      keep: whether to return a cache.

    Returns:
      (log p [N, C] float32: the sum over a row's scored tokens, plus that of each candidate; with
      `keep` the cache of `past` and the tokens, else None).
    """
    variables, (rows, length) = {"params": params}, batch.tokens.shape
    cache = init_cache(config, rows, length) if keep and past is None else None
    if past is not None:
        cache = past.continue_rows(batch.parents, length)
    hidden, cache = model_call.hidden(config, None, variables, batch.tokens, batch.valid, cache)

    def log_p(states: Array, wanted: Array) -> Array:
        """Hidden states [P, d], wanted [P, C] -> log p of the wanted tokens [P, C]."""
        logits = model_call.logits(config, None, variables, states[None])[0]
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return jnp.take_along_axis(logits, wanted, axis=1) - total

    scores = log_p(hidden[:, -1], batch.candidates)
    if span:
        counted = jnp.arange(span)[None, :] >= span - batch.scored[:, None]
        each = jax.lax.map(
            lambda row: log_p(*row)[:, 0],
            (hidden[:, -span - 1 : -1], batch.tokens[:, -span:, None]),
            batch_size=max(1, HEAD_POSITIONS // span),
        )
        scores = scores + jnp.sum(jnp.where(counted, each, 0.0), axis=1, keepdims=True)
    return scores, cache if keep else None


# --- lengths and checks ---------------------------------------------------------------------------


def _agreement(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with, the last token of the shortest left out: every row keeps
    one of its own.
    """
    low, high = min(rows), max(rows)  # in lexicographic order; where these two agree, all do
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return min(same, min(map(len, rows)) - 1)


def _bucket(n: int) -> int:
    """0, 1, 2, 4, 8, 16 or a length of `padded_length`: the smallest that holds n."""
    return padded_length(n) if n > 16 else 1 << (n - 1).bit_length() if n else 0


def _row_bytes(cache: KVCache) -> int:
    return sum(x.nbytes // x.shape[0] for x in jax.tree.leaves(cache.layers))


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
