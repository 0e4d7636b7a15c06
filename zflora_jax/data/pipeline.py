"""Examples to batches: tokenised once, shuffled by grain in an order that is a function of (seed,
step), padded or packed to a few fixed lengths.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.data.mixture import Mixture
from zflora_jax.data.prompts import encode, encode_prompt_texts, render
from zflora_jax.data.tasks import Example

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One training row: tokens [n] int32, loss_mask [n] bool, segments [n] int32 (all 1, or 1, 2,
    ... in a packed row).
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    segments: np.ndarray


Batch = dict[str, np.ndarray]
"""tokens [B, T] int32, right-padded; loss_mask [B, T] bool, True where the token at that position
is to be learned (the loss shifts by one); segments [B, T] int32, 0 at padding and the number of the
example in its row elsewhere.
"""

_CHUNK = 1000  # rows per tokenizer call
# Endless in practice; the length of grain's own endless repeat() overflows in a batch of one row.
_EPOCHS = 2**30
_BAR_FROM = 5000  # rows; fewer are tokenised in about a second


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples in the order of their source.

    kept[i]: the source's index of row i (of an unpacked dataset). dropped: how many examples were
    too long. truncated: how many documents were cut to fit. parts: the rows of each task of a
    mixture, one task after the other; weights: how often a step draws from each, None by rows.
    """

    rows: tuple[Row, ...]
    kept: tuple[int, ...]
    dropped: int
    pad_id: int
    truncated: int = 0
    parts: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """sha256 (hex) of all rows: what a resumed run compares, so that it does not go on with
        other data.
        """
        digest = hashlib.sha256(repr((self.parts, self.weights)).encode())
        for row in self.rows:
            digest.update(
                len(row.tokens).to_bytes(8, "little") + b"".join(part.tobytes() for part in row)
            )
        return digest.hexdigest()


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Any, data: DataConfig, vocab_size: int | None = None
) -> Encoded:
    """Tokenise every example, prompt and target; drop the ones longer than the longest of
    `data.bucket_lengths`.

    A target is never truncated: it would teach the model to stop in the middle. Nor is a question;
    but the `input` of an example with a `document` is cut at its end until the row fits. How many
    were dropped and cut is logged. vocab_size: of the model that is to read them.

    Raises:
      ConfigError: no examples, all of them too long, or tokens (the padding's too) that the model
        has no embedding for.
    """
    require(
        len(examples) > 0,
        "the dataset is empty: there is nothing to tokenise. Check data.task and data.data_dir.",
    )
    limit, rows, truncated = data.bucket_lengths[-1], list[Row](), 0

    def encoded(chunk: Sequence[Example]) -> list[Row]:
        prompts = [
            render(tokenizer, data.prompt_style, e.prompt, e.input, data.date) for e in chunk
        ]
        pairs = encode(
            tokenizer, data.prompt_style, prompts, [e.target for e in chunk], data.train_on_prompt
        )
        return [Row(tokens, mask, np.ones(len(tokens), np.int32)) for tokens, mask in pairs]

    for start in _progress(range(0, len(examples), _CHUNK), len(examples)):
        chunk = [examples[i] for i in range(start, min(start + _CHUNK, len(examples)))]
        for example, row in zip(chunk, encoded(chunk), strict=True):
            if len(row.tokens) > limit and example.document:
                short = shorten(example, tokenizer, limit, lambda e: len(encoded([e])[0].tokens))
                if (
                    short.input.strip()
                ):  # else the row has no room for any of it, and stays too long
                    row = encoded([short])[0]
                    truncated += 1
            rows.append(row)
    kept = tuple(i for i, row in enumerate(rows) if len(row.tokens) <= limit)
    shortest, longest = (f([len(row.tokens) for row in rows]) for f in (min, max))
    require(
        len(kept) > 0,
        f"all {len(rows)} examples are longer than the longest of"
        f" data.bucket_lengths={list(data.bucket_lengths)}: they have {shortest} to {longest}"
        " tokens. Add a length, e.g."
        f" data.bucket_lengths={[*data.bucket_lengths, -(-longest // 64) * 64]}.",
    )
    dropped = len(rows) - len(kept)
    if dropped:
        log.warning(
            "dropped %d of %d examples longer than %d tokens (the longest has %d); see"
            " data.bucket_lengths",
            dropped,
            len(rows),
            limit,
            longest,
        )
    if truncated:
        log.warning(
            "cut %d of %d documents so that they fit %d tokens with their prompt and target; see"
            " data.bucket_lengths",
            truncated,
            len(rows),
            limit,
        )
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    if vocab_size is not None:
        found = np.unique(np.concatenate([rows[i].tokens for i in kept]))
        check_ids(np.append(found, int(pad_id or 0)), vocab_size, "the tokenised data", tokenizer)
    sizes, weights = (
        (list(map(len, examples.parts)), examples.weights)
        if isinstance(examples, Mixture)
        else ([len(rows)], None)
    )
    ends = np.searchsorted(kept, np.cumsum(sizes))
    parts = tuple(int(n) for n in np.diff(ends, prepend=0))
    require(
        weights is None or min(parts) > 0,
        "a task of the mixture has no example left that fits data.bucket_lengths; add a length or"
        " leave it out.",
    )
    return Encoded(
        tuple(rows[i] for i in kept), kept, dropped, int(pad_id or 0), truncated, parts, weights
    )


def shorten(
    example: Example, tokenizer: Any, limit: int, length: Callable[[Example], int]
) -> Example:
    """`example` with its document (its `input`) cut at the end until `length` of the example is at
    most `limit`, or nothing is left of it.
    """
    while (excess := length(example) - limit) > 0 and example.input:
        ids = tokenizer(example.input, add_special_tokens=False)["input_ids"]
        # A cut may fall inside a character, which decodes to U+FFFD.
        example = replace(
            example,
            input=tokenizer.decode(
                ids[: max(0, len(ids) - excess)], skip_special_tokens=False
            ).rstrip("\ufffd"),
        )
    return example


def encode_prompts(
    examples: Sequence[Example], tokenizer: Any, prompt_style: str, date: str | None = None
) -> list[list[int]]:
    """Token ids of each example's prompt, ready to generate from: exactly the prompt tokens of
    training on `date` (see `render`).
    """
    return encode_prompt_texts(
        tokenizer, [render(tokenizer, prompt_style, e.prompt, e.input, date) for e in examples]
    )


def fit_documents(
    examples: Sequence[Example],
    tokenizer: Any,
    prompt_style: str,
    limit: int,
    date: str | None = None,
) -> list[Example]:
    """The examples, documents cut at their end so that each prompt has at most `limit` tokens; an
    example that fits is the same object.
    """

    def length(example: Example) -> int:
        return len(encode_prompts([example], tokenizer, prompt_style, date)[0])

    return [
        shorten(example, tokenizer, limit, length) if example.document else example
        for example in examples
    ]


def pack_sequences(encoded: Encoded, capacity: int) -> Encoded:
    """Rows joined into rows of at most `capacity` tokens, best fit by decreasing length, within
    each task; the loss is that of the rows apart.

    The first token of a row is predicted by nothing, so it counts nowhere; in a packed row it has
    something before it and is masked.
    """
    packed: list[Row] = []
    parts, start = [], 0
    for size in encoded.parts:
        rows = encoded.rows[start : start + size]
        start += size
        room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
        bins: list[list[Row]] = []
        for i in sorted(range(size), key=lambda i: (-len(rows[i].tokens), i)):
            need = len(rows[i].tokens)
            at = bisect.bisect_left(room, (need, -1))
            free, target = room.pop(at) if at < len(room) else (capacity, len(bins))
            if target == len(bins):
                bins.append([])
            bins[target].append(rows[i])
            bisect.insort(room, (free - need, target))
        packed += [_join(rows) for rows in bins]
        parts.append(len(bins))
    return replace(encoded, rows=tuple(packed), parts=tuple(parts), kept=())


def _join(rows: Sequence[Row]) -> Row:
    masks = [row.loss_mask & (np.arange(len(row.tokens)) > 0) for row in rows]
    segments = [np.full(len(row.tokens), i, np.int32) for i, row in enumerate(rows, 1)]
    return Row(
        np.concatenate([row.tokens for row in rows]),
        np.concatenate(masks),
        np.concatenate(segments),
    )


def train_batches(
    encoded: Encoded, data: DataConfig, start_step: int = 0, own: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Endless training batches of exactly `data.batch_size` rows, from step `start_step` on; of
    each only the rows `own`, if given, in the shape of the whole batch's.

    The batch of a step is a pure function of (rows, data.seed, step): a run that resumes at step k
    calls this with start_step=k and goes on with what the uninterrupted run saw, at no cost. Every
    epoch is a new permutation of all rows; batches run across its end, so no row is skipped and a
    dataset smaller than a batch works. With weights each task has its own permutations and epochs.

    Raises:
      ConfigError: no rows, or a negative start_step or seed.
    """
    import grain

    require(len(encoded) > 0, "the dataset is empty: there is nothing to train on.")
    require(start_step >= 0, f"start_step={start_step}: must be at least 0.")
    require(data.seed >= 0, f"data.seed={data.seed}: must be at least 0.")

    def collate(rows: Sequence[Row]) -> Batch:
        return pad(rows, data.bucket_lengths, encoded.pad_id, own)

    def endless(rows: Sequence[Row]) -> Any:
        return grain.MapDataset.source(rows).seed(data.seed).shuffle().repeat(_EPOCHS)

    if encoded.weights is None:
        examples = endless(encoded.rows)
    else:
        ends = accumulate(encoded.parts)
        tasks = [
            endless(encoded.rows[end - size : end])
            for end, size in zip(ends, encoded.parts, strict=True)
        ]
        examples = grain.MapDataset.mix(tasks, encoded.weights)
    batches = examples.batch(data.batch_size, batch_fn=collate)
    # One thread is plenty (a batch is a few copies) and keeps the other cores for the step; its
    # buffer hides the copies behind the step.
    return iter(
        batches.slice(slice(start_step, None)).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        )
    )


def eval_batches(encoded: Encoded, batch_size: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """All rows once, in order, as batches of exactly `batch_size`.

    The last batch is filled up with copies of its last row whose loss_mask is False everywhere:
    well-formed inputs (no row of padding alone, for which attention is undefined) that count
    nowhere.

    Raises:
      ConfigError: no rows, batch_size below 1, or a row longer than max(lengths).
    """
    require(len(encoded) > 0, "the dataset is empty: there is nothing to evaluate.")
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1.")
    return (
        _fill(encoded.rows[i : i + batch_size], batch_size, lengths, encoded.pad_id)
        for i in range(0, len(encoded), batch_size)
    )


def _fill(rows: Sequence[Row], batch_size: int, lengths: Sequence[int], pad_id: int) -> Batch:
    idle = rows[-1]._replace(loss_mask=np.zeros_like(rows[-1].loss_mask))
    return pad([*rows, *[idle] * (batch_size - len(rows))], lengths, pad_id)


def pad(
    rows: Sequence[Row], lengths: Sequence[int], pad_id: int, own: Sequence[int] | None = None
) -> Batch:
    """Rows, or those numbered `own`, as one Batch, right-padded to the smallest of `lengths` that
    holds the longest of all rows.
    """
    longest = max(len(row.tokens) for row in rows)
    fitting = [length for length in lengths if length >= longest]
    require(
        bool(fitting),
        f"a row has {longest} tokens, more than the longest of lengths={list(lengths)}.",
    )
    rows = rows if own is None else [rows[i] for i in own]
    shape = (len(rows), min(fitting))
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, np.bool_),
        "segments": np.zeros(shape, np.int32),
    }
    for i, row in enumerate(rows):
        for name, values in row._asdict().items():
            batch[name][i, : len(values)] = values
    return batch


def _progress(chunks: range, total: int) -> Iterator[int]:
    if total <= _BAR_FROM:
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import track

    # On stderr: commands print their results to stdout.
    yield from track(
        chunks,
        description=f"tokenising {total} examples",
        console=Console(stderr=True),
        transient=True,
    )
