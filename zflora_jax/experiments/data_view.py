"""Preview of a run's training rows: counts, lengths, padding, and rows as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, islice
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
BUCKETS = 4  # most lengths that are suggested
Span = tuple[int, str, bool, int]  # sequence in the row, text, whether it is trained, its tokens


@dataclass(frozen=True)
class DataView:
    """The training rows of a run."""

    facts: dict[str, Any]  # counts, by name
    histogram: dict[str, int]  # range of lengths in tokens -> sequences, before packing
    settings: dict[str, tuple[float, str]]  # for --set -> (padding in %, note): the run's, others
    rows: list[list[Span]]  # of the first


def data_view(
    run: RunConfig, tokenizer: Any, config: LlamaConfig | None = None, rows: int = 3
) -> DataView:
    """Reads and tokenises the training rows of a run, as training does.

    Args:
      run: Its settings.
      tokenizer: The tokenizer of the run's model.
      config: The model's; None: neither token ids nor its context are looked at.
      rows: How many rows to show.

    Raises:
      ConfigError: As for training on them, or `rows` is negative.
    """
    require(rows >= 0, f"rows={rows}: must be at least 0.")
    if config is not None:
        require_fit(run, Model(config, {}, tokenizer))
    examples, data = load_mixture(run.data, "train"), run.data
    pairs, size = run.train.pairs, config.vocab_size if config else None
    encoded = tokenize_examples(examples, tokenizer, data, size, pairs)
    packed = pack_sequences(encoded, data.bucket_lengths[-1]) if data.packing else encoded
    uncut, context = encoded, config.max_position_embeddings if config else 2**30
    if encoded.dropped or encoded.truncated:
        whole = replace(data, bucket_lengths=(context,))
        uncut = tokenize_examples(examples, tokenizer, whole, pairs=pairs)
    settings = _settings(data, encoded, uncut, context, pairs)
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
        "padding, %": next(iter(settings.values()))[0],
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
    return DataView(facts, histogram, settings, [_spans(x, tokenizer) for x in packed.rows[:rows]])


def _settings(
    data: DataConfig, encoded: Encoded, uncut: Encoded, context: int, pairs: bool
) -> dict[str, tuple[float, str]]:
    """Returns the padding with the run's lengths, then with lengths that fit its rows."""
    found, own = dict[str, tuple[float, str]](), data.bucket_lengths
    tries = [(encoded, data.packing, "now"), (encoded, data.packing, "")]
    beyond = uncut.dropped + uncut.truncated
    fits = f"{beyond} rows exceed the context" if beyond else "drops and cuts no row"
    if not pairs:
        tries.append((encoded, not data.packing, ""))
    tries += [(uncut, data.packing, fits)] * (uncut is not encoded)
    for rows, packing, note in tries:
        longest = max(len(row.tokens) for row in rows.rows)
        top = own[-1] if note == "now" else min(_up(longest), context)
        if packing:
            top = max(top, own[-1])
            rows = pack_sequences(rows, top)
        steps = min(SAMPLE, max(1, len(rows) // data.batch_size))
        batches = islice(train_batches(rows, replace(data, bucket_lengths=(top,))), steps)
        filled = np.stack([np.sum(batch["segments"] > 0, axis=1) for batch in batches])
        lengths = own if note == "now" else fitting_lengths(filled, top)
        name = f"'data.bucket_lengths=[{','.join(map(str, lengths))}]'"
        name += f" data.packing={packing}" * (packing != data.packing)
        found.setdefault(name, (round(padding(filled, lengths), 1), note))
    return found


def padding(filled: np.ndarray, lengths: Sequence[int]) -> float:
    """Returns the padding, in %, of batches with `filled` [batches, rows] tokens in their rows."""
    computed = np.take(lengths, np.searchsorted(lengths, filled.max(axis=1)))
    return 100 * (1 - float(filled.sum() / (computed.sum() * filled.shape[1])))


def fitting_lengths(filled: np.ndarray, top: int) -> tuple[int, ...]:
    """Returns the fewest lengths that pad within 1% of the least that BUCKETS lengths allow, the
    last of them `top`. filled: As of `padding`.
    """
    longest = np.quantile(filled.max(axis=1), np.linspace(0, 1, 25), method="higher")
    sizes = sorted({_up(int(size)) for size in longest if _up(int(size)) < top})
    tries = [[(*x, top) for x in combinations(sizes, count)] for count in range(BUCKETS)]
    best = [min((padding(filled, lengths), lengths) for lengths in some) for some in tries if some]
    return next(lengths for share, lengths in best if share <= best[-1][0] + 1)


def _up(length: int) -> int:
    step = 8 if length <= 1024 else 128  # attention to longer rows is computed in blocks of these
    return -(-length // step) * step


def _spans(row: TokenizedSequence, tokenizer: Any) -> list[Span]:
    at = np.flatnonzero(np.diff(2 * row.segments + row.loss_mask)) + 1
    parts = zip(*(np.split(part, at) for part in row), strict=True)
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    return [(int(n[0]), decode(x.tolist()), bool(m[0]), len(x)) for x, m, n in parts]
