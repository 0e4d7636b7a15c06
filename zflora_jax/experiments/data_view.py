"""What a run will train on, before it trains: counts, lengths, padding, and rows as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.encoding import TokenizedSequence, tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import pack_sequences, train_batches

SAMPLE = 200  # most batches in which padding is counted


@dataclass(frozen=True)
class DataView:
    """The training rows of a run."""

    facts: dict[str, Any]  # counts, by name
    histogram: dict[str, int]  # bucket of lengths in tokens -> sequences, before packing
    rows: list[list[tuple[str, bool]]]  # of the first: (text, whether it is trained) of its parts


def data_view(
    run: RunConfig, tokenizer: Any, vocab_size: int | None = None, rows: int = 3
) -> DataView:
    """Reads and tokenises the training rows of a run, as training does.

    Args:
      run: Its settings.
      tokenizer: The tokenizer of the run's model.
      vocab_size: Rows of the model's embedding; None: token ids are not checked.
      rows: How many rows to show.

    Raises:
      ConfigError: As for training on them, or `rows` is negative.
    """
    require(rows >= 0, f"rows={rows}: must be at least 0.")
    require(tokenizer is not None, f"model {run.model!r} has no tokenizer.")
    examples, buckets = load_mixture(run.data, "train"), run.data.bucket_lengths
    encoded = tokenize_examples(examples, tokenizer, run.data, vocab_size)
    packed = pack_sequences(encoded, buckets[-1]) if run.data.packing else encoded
    lengths = np.asarray([len(row.tokens) for row in encoded.rows])
    trained = sum(int(row.loss_mask.sum()) for row in encoded.rows)
    facts: dict[str, Any] = {
        "task": run.data.task,
        "form of the rows": ", ".join(dict.fromkeys(example.form for example in examples)),
        "examples": len(examples),
        "sequences": len(encoded),
        "dropped, too long": encoded.dropped,
        "documents and conversations cut": encoded.truncated,
        "tokens": int(lengths.sum()),
        "trained tokens": trained,
        "trained, %": round(100 * trained / int(lengths.sum()), 1),
        "tokens of a sequence: median": int(np.median(lengths)),
        "longest": int(lengths.max()),
    }
    if run.data.packing:
        facts["packed rows"] = len(packed)
    steps = min(SAMPLE, max(1, len(packed) // run.data.batch_size))
    segments = [b["segments"].ravel() for b in islice(train_batches(packed, run.data), steps)]
    facts["padding, %"] = round(100 * float(np.mean(np.concatenate(segments) == 0)), 1)
    if packed.weights is None:  # with weights, each task has its own epochs
        facts["steps of an epoch"] = -(-len(packed) // run.data.batch_size)
    histogram = {
        f"{low + 1}-{high}": int(np.sum((low < lengths) & (lengths <= high)))
        for low, high in pairwise([0, *buckets])
    }
    return DataView(facts, histogram, [_spans(row, tokenizer) for row in packed.rows[:rows]])


def _spans(row: TokenizedSequence, tokenizer: Any) -> list[tuple[str, bool]]:
    changes = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8))) + 1
    parts = zip(np.split(row.tokens, changes), np.split(row.loss_mask, changes), strict=True)
    return [(tokenizer.decode(x.tolist(), skip_special_tokens=False), bool(m[0])) for x, m in parts]
