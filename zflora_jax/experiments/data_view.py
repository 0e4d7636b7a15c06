"""What a run will train on, before it trains: counts, lengths, padding, and rows as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.packing import pack_sequences
from zflora_jax.data.pipeline import train_batches
from zflora_jax.data.tokenization import Encoded, TokenizedExample, tokenize_examples

SAMPLE = 200  # batches in which padding is counted
Spans = list[tuple[str, bool]]


@dataclass(frozen=True)
class DataView:
    """The training rows of a run.

    Attributes:
      facts: what is counted, by name.
      histogram: lengths in tokens of the sequences by the bucket that holds them: label -> number
        of sequences; of packed rows, before they are packed.
      rows: the first training rows; of each, runs of text and whether they are trained.
    """

    facts: dict[str, Any]
    histogram: dict[str, int]
    rows: list[Spans]


def data_view(
    run: RunConfig, tokenizer: Any, vocab_size: int | None = None, rows: int = 3
) -> DataView:
    """Read and tokenise the training rows of a run, as training does.

    Args:
      run: its settings; data is read.
      tokenizer: of the run's model.
      vocab_size: rows of its embedding; None: token ids are not checked.
      rows: how many of them to show.

    Raises:
      ConfigError: as for training on them, or `rows` is negative.
    """
    require(rows >= 0, f"rows={rows}: must be at least 0.")
    require(tokenizer is not None, f"model {run.model!r} has no tokenizer.")
    examples = load_mixture(run.data, "train")
    apart = tokenize_examples(examples, tokenizer, run.data, vocab_size)
    lengths = [len(row.tokens) for row in apart.rows]
    trained = sum(int(row.loss_mask.sum()) for row in apart.rows)
    forms = dict.fromkeys(example.form for example in examples)
    facts: dict[str, Any] = {
        "task": run.data.task,
        "form of the rows": ", ".join(forms),
        "examples": len(examples),
        "sequences": len(apart),
        "dropped, too long": apart.dropped,
        "documents and conversations cut": apart.truncated,
        "tokens": sum(lengths),
        "trained tokens": trained,
        "trained, %": round(100 * trained / sum(lengths), 1),
        "tokens of a sequence: median": int(np.median(lengths)),
        "longest": max(lengths),
    }
    whole = pack_sequences(apart, run.data.bucket_lengths[-1]) if run.data.packing else apart
    if run.data.packing:
        facts["packed rows"] = len(whole)
    facts["padding, %"] = round(100 * _padding(run, whole), 1)
    if whole.weights is None:  # with weights, tasks have epochs of their own
        facts["steps of an epoch"] = -(-len(whole) // run.data.batch_size)
    shown = [spans(row, tokenizer) for row in whole.rows[:rows]]
    return DataView(facts, _histogram(run.data.bucket_lengths, lengths), shown)


def _padding(run: RunConfig, encoded: Encoded) -> float:
    """The share of positions that hold padding, in the batches of the first epoch, or in the first
    SAMPLE of them.
    """
    steps = min(SAMPLE, max(1, len(encoded) // run.data.batch_size))
    found = islice(train_batches(encoded, run.data), steps)
    empty, positions = np.sum([(np.sum(b["segments"] == 0), b["segments"].size) for b in found], 0)
    return float(empty / positions)


def _histogram(buckets: Sequence[int], lengths: Sequence[int]) -> dict[str, int]:
    edges = [0, *buckets]
    return {
        f"{low + 1}-{high}": sum(low < length <= high for length in lengths)
        for low, high in pairwise(edges)
    }


def spans(row: TokenizedExample, tokenizer: Any) -> Spans:
    """A row as text: runs of tokens that are trained, or not.

    Args:
      row: of the data.
      tokenizer: that made it.

    Returns:
      (text, whether its tokens are trained) of each run, special tokens written out.
    """
    changes = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8))) + 1
    found = []
    for part in np.split(np.arange(len(row.tokens)), changes):
        text = tokenizer.decode(row.tokens[part].tolist(), skip_special_tokens=False)
        found.append((text, bool(row.loss_mask[part[0]])))
    return found
