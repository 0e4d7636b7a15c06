"""Sequences to batches: shuffled by grain, padded to a few fixed lengths.

The order is a function of (seed, step). Shapes below: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tokenization import Encoded, TokenizedExample

Batch = dict[str, np.ndarray]
"""tokens [B, T] int32, right-padded; loss_mask [B, T] bool, True where the token at that position
is learned (the loss shifts by one); segments [B, T] int32, the number of the example in its row,
0 at padding.
"""

# Endless in practice; the length of grain's own endless repeat() overflows in a batch of one row.
_EPOCHS = 2**30


def train_batches(
    encoded: Encoded, data: DataConfig, start_step: int = 0, own: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Iterate over training batches, without an end.

    The batch of a step is a pure function of (sequences, data.seed, step): a run that resumes at
    step k passes start_step=k and sees the batches of the uninterrupted run. Every epoch is a new
    permutation of all sequences. Batches run across its end, so no sequence is skipped and a
    dataset smaller than a batch works. With weights, each task has its own permutations and epochs.

    Args:
      encoded: the sequences.
      data: batch_size, bucket_lengths and seed are read.
      start_step: the step of the first batch, from 0.
      own: the rows of each batch to return, for a process of several; None: all. They are padded to
        the length of the whole batch.

    Yields:
      Batches of `data.batch_size` rows, or of those in `own`.

    Raises:
      ConfigError: there is no sequence, or start_step or the seed is negative.
    """
    import grain

    require(len(encoded) > 0, "the dataset is empty: there is nothing to train on.")
    require(start_step >= 0, f"start_step={start_step}: must be at least 0.")
    require(data.seed >= 0, f"data.seed={data.seed}: must be at least 0.")

    def collate(rows: Sequence[TokenizedExample]) -> Batch:
        return pad(rows, data.bucket_lengths, encoded.pad_id, own)

    def endless(rows: Sequence[TokenizedExample]) -> Any:
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


def one_sequence_a_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of rows that were not packed, without its segments: a row is one sequence then,
    padded on the right, and attention is causal alone, which flash kernels take best.
    """
    return {name: x for name, x in batch.items() if name != "segments"}


def eval_batches(encoded: Encoded, batch_size: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """Iterate over all sequences once, in order.

    The last batch is filled up with copies of its last row whose loss_mask is False: a row of
    padding alone would have undefined attention.

    Args:
      encoded: the sequences.
      batch_size: rows of each batch.
      lengths: allowed values of T.

    Yields:
      Batches of `batch_size` rows.

    Raises:
      ConfigError: there is no sequence, batch_size is below 1, or a sequence is longer than
        max(lengths).
    """
    require(len(encoded) > 0, "the dataset is empty: there is nothing to evaluate.")
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1.")
    return (
        _fill(encoded.rows[i : i + batch_size], batch_size, lengths, encoded.pad_id)
        for i in range(0, len(encoded), batch_size)
    )


def _fill(
    rows: Sequence[TokenizedExample], batch_size: int, lengths: Sequence[int], pad_id: int
) -> Batch:
    idle = rows[-1]._replace(loss_mask=np.zeros_like(rows[-1].loss_mask))
    return pad([*rows, *[idle] * (batch_size - len(rows))], lengths, pad_id)


def pad(
    rows: Sequence[TokenizedExample],
    lengths: Sequence[int],
    pad_id: int,
    own: Sequence[int] | None = None,
) -> Batch:
    """Make one Batch of sequences.

    Args:
      rows: the sequences of the batch.
      lengths: allowed values of T; the smallest that holds the longest sequence is taken.
      pad_id: the token id at padding.
      own: indices of the rows to return; None: all.

    Returns:
      The batch, padded on the right.

    Raises:
      ConfigError: a sequence is longer than max(lengths).
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
