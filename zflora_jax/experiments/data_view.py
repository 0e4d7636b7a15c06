"""Preview of a run's training rows: counts, lengths, padding, and rows as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model, require_fit
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import DataConfig, RunConfig
from zflora_jax.data.encoding import Encoded, TokenizedSequence, tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import pack_sequences, train_batches

SAMPLE = 200  # most batches in which padding is counted
BARS = 8  # most ranges of the histogram
Span = tuple[int, str, bool, int]  # sequence in the row, text, whether it is trained, its tokens


@dataclass(frozen=True)
class DataView:
    """The training rows of a run."""

    facts: dict[str, Any]  # counts, by name
    histogram: dict[str, int]  # range of lengths in tokens -> sequences, before packing
    rows: list[list[Span]]  # the first rows


def data_view(
    run: RunConfig, tokenizer: Any, config: LlamaConfig | None = None, rows: int = 3
) -> DataView:
    """Reads and tokenises the training rows of a run, as training does.

    Args:
      run: The run's settings.
      tokenizer: The tokenizer of the run's model.
      config: The model's config; None: token ids and context are not checked.
      rows: Number of rows to show.

    Raises:
      ConfigError: An error of training on these rows, or `rows` is negative.
    """
    require(rows >= 0, f"rows={rows}: must be at least 0.")
    if config is not None:
        require_fit(run, Model(config, {}, tokenizer))
    examples, data = load_mixture(run.data, "train"), run.data
    pairs, size = run.train.pairs, config.vocab_size if config else None
    encoded = tokenize_examples(examples, tokenizer, data, size, pairs)
    packed = pack_sequences(encoded, data.bucket_lengths[-1]) if data.packing else encoded
    lengths = np.asarray([len(row.tokens) for row in encoded.rows])
    trained = sum(int(row.loss_mask.sum()) for row in encoded.rows)
    facts: dict[str, Any] = {
        "task": data.task,
        "form of the rows": ", ".join(dict.fromkeys(x.form or "the task's own" for x in examples)),
        "examples": len(examples),
        "dropped, too long": encoded.dropped,
        "cut to fit": encoded.truncated,
        "sequences": len(encoded),
        "tokens": int(lengths.sum()),
        "trained tokens": trained,
        "trained, %": round(100 * trained / int(lengths.sum()), 1),
        "tokens of a sequence: median": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "padding, %": round(_padding(packed, data), 1),
    }
    if data.packing:
        facts["packed rows"] = len(packed)
        facts["sequences of a packed row: mean"] = round(len(encoded) / len(packed), 1)
    if packed.weights is None:  # with weights, each task has its own epochs
        facts["steps of an epoch"] = -(-len(packed) // data.batch_size)
    width = -(-int(np.ptp(lengths) + 1) // BARS)
    histogram = {
        f"{low}-{low + width - 1}": int(np.sum((low <= lengths) & (lengths < low + width)))
        for low in range(int(lengths.min()), int(lengths.max()) + 1, width)
    }
    return DataView(facts, histogram, [_spans(x, tokenizer) for x in packed.rows[:rows]])


def _padding(rows: Encoded, data: DataConfig) -> float:
    """The padding of an epoch's first batches, in %."""
    steps = min(SAMPLE, max(1, len(rows) // data.batch_size))
    batches = [batch["segments"] > 0 for batch in islice(train_batches(rows, data), steps)]
    return 100 * (1 - sum(x.sum() for x in batches) / sum(x.size for x in batches))


def _spans(row: TokenizedSequence, tokenizer: Any) -> list[Span]:
    at = np.flatnonzero(np.diff(2 * row.segments + row.loss_mask)) + 1
    parts = zip(*(np.split(part, at) for part in row), strict=True)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    return [(int(n[0]), decode(x.tolist()), bool(m[0]), len(x)) for x, m, n in parts]
