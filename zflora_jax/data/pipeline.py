"""Sequences to batches: packed, shuffled by grain, padded to a few fixed lengths.

Shapes below: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.encoding import Encoded, TokenizedSequence

Batch = dict[str, np.ndarray]
"""tokens [B, T] int32, right-padded; loss_mask [B, T] bool, True where the token at that position
is learned (the loss shifts by one); segments [B, T] int32, the number of the example in its row,
0 at padding.
"""

# Endless in practice; grain's endless repeat() overflows in a batch of one row.
_EPOCHS = 2**30


def pack_sequences(encoded: Encoded, capacity: int) -> Encoded:
    """Joins sequences into rows of at most `capacity` tokens, best fit by decreasing length, within
    each task. The loss is that of the separate sequences: `segments` number the examples of a row,
    and nothing predicts the first token of a sequence, so it is masked.
    """
    packed: list[TokenizedSequence] = []
    parts, start = [], 0
    for size in encoded.parts:
        rows = encoded.rows[start : start + size]
        start += size
        room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
        bins: list[list[TokenizedSequence]] = []
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
    return replace(encoded, rows=tuple(packed), parts=tuple(parts))


def _join(rows: Sequence[TokenizedSequence]) -> TokenizedSequence:
    masks = [row.loss_mask & (np.arange(len(row.tokens)) > 0) for row in rows]
    segments = [np.full(len(row.tokens), i, np.int32) for i, row in enumerate(rows, 1)]
    tokens = np.concatenate([row.tokens for row in rows])
    return TokenizedSequence(tokens, np.concatenate(masks), np.concatenate(segments))


def train_batches(
    encoded: Encoded, data: DataConfig, start_step: int = 0, own: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Iterates over training batches, without an end.

    The batch of a step is a pure function of (sequences, data.seed, step), so a run that resumes at
    step k sees the batches of the uninterrupted run. Every epoch is a new permutation of all
    sequences, and batches run across its end. With weights, each task has its own epochs.

    Args:
      encoded: The sequences.
      data: Settings, of which batch_size, bucket_lengths and seed are read.
      start_step: The step of the first batch, from 0.
      own: Indices of the rows of each batch to yield, for one process of several; None: all. They
        are padded to the length of the whole batch.
    """
    import grain

    require(len(encoded) > 0, "the dataset is empty: there is nothing to train on.")

    def endless(rows: Sequence[TokenizedSequence]) -> Any:
        return grain.MapDataset.source(rows).seed(data.seed).shuffle().repeat(_EPOCHS)

    if encoded.weights is None:
        examples = endless(encoded.rows)
    else:
        tasks = [
            endless(encoded.rows[end - size : end])
            for end, size in zip(accumulate(encoded.parts), encoded.parts, strict=True)
        ]
        examples = grain.MapDataset.mix(tasks, encoded.weights)
    batches = examples.batch(
        data.batch_size, batch_fn=lambda x: pad(x, data.bucket_lengths, encoded.pad_id, own)
    )
    # One thread is plenty for a few copies; its buffer hides them behind the step.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(batches.slice(slice(start_step, None)).to_iter_dataset(options))


def eval_batches(encoded: Encoded, batch_size: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """Iterates over all sequences once, in order, in batches of `batch_size` rows padded to one of
    `lengths`. Copies of the last row, with a loss_mask of False, fill the last batch: attention to
    nothing but padding would be undefined. ConfigError if there is no sequence or one is too long.
    """
    require(len(encoded) > 0, "the dataset is empty: there is nothing to evaluate.")

    def batch(start: int) -> Batch:
        rows = encoded.rows[start : start + batch_size]
        idle = rows[-1]._replace(loss_mask=np.zeros_like(rows[-1].loss_mask))
        return pad([*rows, *[idle] * (batch_size - len(rows))], lengths, encoded.pad_id)

    return map(batch, range(0, len(encoded), batch_size))


def pad(
    rows: Sequence[TokenizedSequence],
    lengths: Sequence[int],
    pad_id: int,
    own: Sequence[int] | None = None,
) -> Batch:
    """Makes a Batch of sequences, padded on the right to the smallest of `lengths` that holds the
    longest, and returns its rows `own` (None: all). ConfigError if none of `lengths` holds it.
    """
    longest = max(len(row.tokens) for row in rows)
    length = min((n for n in lengths if n >= longest), default=0)
    require(length > 0, f"a row has {longest} tokens, more than the longest of {list(lengths)}.")
    rows = rows if own is None else [rows[i] for i in own]
    shape = (len(rows), length)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, np.bool_),
        "segments": np.zeros(shape, np.int32),
    }
    for i, row in enumerate(rows):
        for name, values in row._asdict().items():
            batch[name][i, : len(values)] = values
    return batch
