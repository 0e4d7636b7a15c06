"""Log-likelihoods of given answers: how probable a model finds each option of a multiple-choice
question.

Every token is computed once wherever options agree. What all prompts begin with (a chat template,
worked examples) is fed once, and its keys and values are copied to each row; a prompt and what its
options begin with is fed once for all of them; only what is left of each option, where that is more
than one token, is fed per option. The head, as wide as the vocabulary, sees no more positions than
predict tokens of an option.

Shapes: N rows of a call, T tokens fed per row, S cache slots, C candidates for the next token, d
residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree
from zflora_jax.inference.decode import packed, padded_length
from zflora_jax.nn.kv_cache import KVCache, init_cache
from zflora_jax.nn.llama import Llama
from zflora_jax.ops.precision import at_config_precision
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use, require_local

Array = jax.Array
# Keys and values that one call may copy for options; a batch's worth of options may always.
CACHE_BYTES = 1 << 30
HEAD_POSITIONS = (
    256  # positions whose logits exist at one time, or one row's: 50 MB for a vocabulary of 49152
)
WORTH_SHARING = 16  # tokens that all prompts must begin with to be fed by a call of their own


def option_log_likelihoods(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Sum of log p (nats, float32) of each option's tokens after its prompt: one array [n_options]
    per prompt.

    prompts: token ids of each prompt. options: for each prompt its options, of any number, each a
    list of token ids of any length. log p(option | prompt) sums log_softmax(logits) over the
    option's tokens: no BOS or EOS is added, nothing is divided by a length. Float32 products are as
    exact as config.execution.matmul_precision says, as in training and decode. Prompts of similar
    length share a batch; the results come back in the order of `prompts` and depend neither on
    batch_size nor on the other prompts (up to float rounding). on_batch(n) is called after each
    batch with its number of prompts. Raises ConfigError for an empty prompt or option, a prompt
    without options, ids outside the vocabulary, or more tokens than the context holds.
    """
    _check(model, prompts, options, batch_size)
    require_local(model.params, "score options")
    starts = [_ints(prompt) for prompt in prompts]
    ends = [[_ints(option) for option in row] for row in options]
    scores = [np.zeros(len(row), np.float32) for row in ends]
    run, past, shared = packed(model), None, _shared_prefix(starts)
    if shared:
        _, past = _call(run, None, [Piece(0, starts[0][:shared], 0, [0])], 1, keep=True)
    agreed = [_agreement(row) for row in ends]
    # The longest first: the last batch, filled up, is the cheapest.
    order = sorted(range(len(starts)), key=lambda i: -len(starts[i]) - agreed[i])
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        pieces = [
            Piece(
                0,
                starts[i][shared:] + ends[i][0][: agreed[i]],
                agreed[i],
                [option[agreed[i]] for option in ends[i]],
            )
            for i in rows
        ]
        left = [
            (i, k, Piece(n, e[agreed[i] : -1], len(e) - agreed[i] - 2, e[-1:]))
            for n, i in enumerate(rows)
            for k, e in enumerate(ends[i])
        ]
        left = sorted((x for x in left if x[2].tokens), key=lambda x: len(x[2].tokens))
        found, cache = _call(
            run, past, pieces, batch_size if len(order) > batch_size else len(rows), keep=bool(left)
        )
        for row, i in zip(found, rows, strict=True):
            scores[i] += row[: len(ends[i])]
        per_call = max(batch_size, CACHE_BYTES // _row_bytes(cache)) if cache else 1
        for first in range(0, len(left), per_call):
            some = left[first : first + per_call]
            found, _ = _call(
                run,
                cache,
                [piece for *_, piece in some],
                min(_bucket(len(some)), per_call),
                keep=False,
            )
            for (i, k, _), value in zip(some, found[:, 0], strict=True):
                scores[i][k] += value
        if on_batch:
            on_batch(len(rows))
    return scores


@dataclass(frozen=True)
class Piece:
    """One row of a call: `tokens` to feed after what row `parent` of the cache holds. Scored are
    the last `scored` of them, each given all before it, and each of `candidates` as the token
    after.
    """

    parent: int
    tokens: list[int]
    scored: int
    candidates: list[int]


def _call(
    model: Model, past: KVCache | None, pieces: list[Piece], size: int, *, keep: bool
) -> tuple[np.ndarray, KVCache | None]:
    """`advance` over `pieces`, filled up to `size` rows, in shapes that few calls differ in:
    (scores [pieces, C], cache if `keep`).
    """
    size = fill_rows(size, model.params) if size > 1 else size
    longest, scored = max(len(p.tokens) for p in pieces), max(p.scored for p in pieces)
    length = padded_length(longest) if past is None or longest > 16 else _bucket(longest)
    tokens, valid = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    candidates = np.zeros((size, _bucket(max(len(p.candidates) for p in pieces))), np.int32)
    parents, counts = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for n, p in enumerate(pieces):
        tokens[n, length - len(p.tokens) :], valid[n, length - len(p.tokens) :] = p.tokens, True
        candidates[n, : len(p.candidates)] = p.candidates
        parents[n], counts[n] = p.parent, p.scored
    span = min(_bucket(scored), length - 1)
    with mesh_in_use(model.params):
        scores, cache = advance(
            model.config, span, keep, model.params, past, parents, tokens, valid, counts, candidates
        )
    return np.asarray(scores)[: len(pieces)], cache


@jax.jit(static_argnums=(0, 1, 2))
@at_config_precision
def advance(
    config: LlamaConfig,
    span: int,
    keep: bool,
    params: Tree,
    past: KVCache | None,
    parents: Array,
    tokens: Array,
    valid: Array,
    scored: Array,
    candidates: Array,
) -> tuple[Array, KVCache | None]:
    """Feed tokens [N, T] int32, left-padded (valid [N, T] bool), after rows `parents` [N] of
    `past`, an unrolled model's full cache, or after nothing.

    Returns log p, [N, C] float32: of the row's last scored[n] <= span tokens, each given all before
    it, plus that of candidates[n, c] as the next token. And, with `keep`, the cache of `past` and
    the tokens.
    """
    llama, (batch, length) = Llama(config), tokens.shape
    cache = init_cache(config, batch, length) if keep and past is None else None
    if past is not None:
        cache = past.continue_rows(parents, length)
    out: Any = llama.apply({"params": params}, tokens, valid, cache, method="hidden")
    hidden, cache = out

    def log_p(x: Array, wanted: Array) -> Array:
        """Hidden states [P, d], wanted [P, C] -> log p of the wanted tokens [P, C]."""
        logits: Any = llama.apply({"params": params}, x[None], method="logits")
        return jnp.take_along_axis(logits[0], wanted, axis=1) - jax.nn.logsumexp(
            logits[0], axis=-1, keepdims=True
        )

    total = log_p(hidden[:, -1], candidates)
    if span:
        counted = jnp.arange(span)[None, :] >= span - scored[:, None]
        each = jax.lax.map(
            lambda row: log_p(*row)[:, 0],
            (hidden[:, -span - 1 : -1], tokens[:, -span:, None]),
            batch_size=max(1, HEAD_POSITIONS // span),
        )
        total = total + jnp.sum(jnp.where(counted, each, 0.0), axis=1, keepdims=True)
    return total, cache if keep else None


def _ints(ids: Sequence[int]) -> list[int]:
    return [int(t) for t in ids]


def _agreement(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with, the last token of the shortest left out: every row keeps
    one of its own.
    """
    low, high = min(rows), max(rows)  # in lexicographic order; where these two agree, all do
    same = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return min(same, min(map(len, rows)) - 1)


def _shared_prefix(prompts: list[list[int]]) -> int:
    """How many tokens of all prompts to feed once; 0 where it is not worth a call."""
    same = _agreement(prompts) if len(prompts) > 1 else 0
    return same if same >= WORTH_SHARING else 0


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
