"""Examples to batches: tokenised once, shuffled by grain in an order that is a function of (seed, step), padded to a few fixed lengths."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.config import DataConfig
from zflora_jax.data.prompts import encode, encode_prompt_texts, render
from zflora_jax.data.tasks import Example
from zflora_jax.fields import require

log = logging.getLogger(__name__)

Row = tuple[np.ndarray, np.ndarray]  # tokens [n] int32, loss_mask [n] bool
Batch = dict[str, np.ndarray]
"""tokens [B, T] int32, right-padded; loss_mask [B, T] bool, True where the token at that position is to be learned (the loss shifts by one);
valid [B, T] bool, False at padding."""

_CHUNK = 1000  # rows per tokenizer call
_EPOCHS = 2**30  # endless in practice; the length of grain's own endless repeat() overflows in a batch of one row
_BAR_FROM = 5000  # rows; fewer are tokenised in about a second


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples in the order of their source; `kept[i]` is the source's index of row i, `dropped` how many were too long."""

    rows: tuple[Row, ...]
    kept: tuple[int, ...]
    dropped: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """sha256 (hex) of all rows: what a resumed run compares, so that it does not go on with other data."""
        digest = hashlib.sha256()
        for tokens, loss_mask in self.rows:
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + loss_mask.tobytes())
        return digest.hexdigest()


def tokenize_examples(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> Encoded:
    """Tokenise every example, prompt and target, and drop the ones longer than the longest of `data.lengths`.

    A row is never truncated: it would teach the model to stop in the middle, or lose its question. How many were dropped is logged.

    Raises:
      ConfigError: no examples, or all of them too long.
    """
    require(len(examples) > 0, "the dataset is empty: there is nothing to tokenise. Check data.task and data.data_dir.")
    rows: list[Row] = []
    for start in _progress(range(0, len(examples), _CHUNK), len(examples)):
        chunk = [examples[i] for i in range(start, min(start + _CHUNK, len(examples)))]
        prompts = [render(tokenizer, data.prompt_style, e.prompt, e.input) for e in chunk]
        rows += encode(tokenizer, data.prompt_style, prompts, [e.target for e in chunk], data.train_on_prompt)
    limit = data.lengths[-1]
    kept = tuple(i for i, (tokens, _) in enumerate(rows) if len(tokens) <= limit)
    shortest, longest = (f([len(tokens) for tokens, _ in rows]) for f in (min, max))
    require(
        len(kept) > 0,
        f"all {len(rows)} examples are longer than the longest of data.lengths={list(data.lengths)}: they have {shortest} to {longest} tokens. "
        f"Add a length, e.g. data.lengths={[*data.lengths, -(-longest // 64) * 64]}.",
    )
    dropped = len(rows) - len(kept)
    if dropped:
        log.warning("dropped %d of %d examples longer than %d tokens (the longest has %d); see data.lengths", dropped, len(rows), limit, longest)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Encoded(tuple(rows[i] for i in kept), kept, dropped, int(pad_id or 0))


def encode_prompts(examples: Sequence[Example], tokenizer: Any, prompt_style: str) -> list[list[int]]:
    """Token ids of each example's prompt, ready to generate from: exactly the prompt tokens of training."""
    return encode_prompt_texts(tokenizer, [render(tokenizer, prompt_style, e.prompt, e.input) for e in examples])


def train_batches(encoded: Encoded, data: DataConfig, start_step: int = 0) -> Iterator[Batch]:
    """Endless training batches of exactly `data.batch_size` rows, from step `start_step` on.

    The batch of a step is a pure function of (rows, data.seed, step): a run that resumes at step k calls this with start_step=k and goes on
    with what the uninterrupted run saw, at no cost. Every epoch is a new permutation of all rows; batches run across its end, so no row is
    skipped and a dataset smaller than a batch works.

    Raises:
      ConfigError: no rows, or a negative start_step or seed.
    """
    import grain

    require(len(encoded) > 0, "the dataset is empty: there is nothing to train on.")
    require(start_step >= 0, f"start_step={start_step}: must be at least 0.")
    require(data.seed >= 0, f"data.seed={data.seed}: must be at least 0.")

    def collate(rows: Sequence[Row]) -> Batch:
        return pad(rows, data.lengths, encoded.pad_id)

    batches = grain.MapDataset.source(encoded.rows).seed(data.seed).shuffle().repeat(_EPOCHS).batch(data.batch_size, batch_fn=collate)
    # One thread is plenty (a batch is a few copies) and keeps the other cores for the step; its buffer hides the copies behind the step.
    return iter(batches.slice(slice(start_step, None)).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(encoded: Encoded, batch_size: int, lengths: Sequence[int]) -> Iterator[Batch]:
    """All rows once, in order, as batches of exactly `batch_size`.

    The last batch is filled up with copies of its last row whose loss_mask is False everywhere: well-formed inputs (no row of padding alone,
    for which attention is undefined) that count nowhere.

    Raises:
      ConfigError: no rows, batch_size below 1, or a row longer than max(lengths).
    """
    require(len(encoded) > 0, "the dataset is empty: there is nothing to evaluate.")
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1.")
    return (_fill(encoded.rows[i : i + batch_size], batch_size, lengths, encoded.pad_id) for i in range(0, len(encoded), batch_size))


def _fill(rows: Sequence[Row], batch_size: int, lengths: Sequence[int], pad_id: int) -> Batch:
    tokens, mask = rows[-1]
    return pad([*rows, *[(tokens, np.zeros_like(mask))] * (batch_size - len(rows))], lengths, pad_id)


def pad(rows: Sequence[Row], lengths: Sequence[int], pad_id: int) -> Batch:
    """Rows as one Batch, right-padded to the smallest of `lengths` that holds the longest row."""
    longest = max(len(tokens) for tokens, _ in rows)
    fitting = [length for length in lengths if length >= longest]
    require(bool(fitting), f"a row has {longest} tokens, more than the longest of lengths={list(lengths)}.")
    shape = (len(rows), min(fitting))
    batch = {"tokens": np.full(shape, pad_id, np.int32), "loss_mask": np.zeros(shape, np.bool_), "valid": np.zeros(shape, np.bool_)}
    for i, (tokens, loss_mask) in enumerate(rows):
        batch["tokens"][i, : len(tokens)] = tokens
        batch["loss_mask"][i, : len(tokens)] = loss_mask
        batch["valid"][i, : len(tokens)] = True
    return batch


def _progress(chunks: range, total: int) -> Iterator[int]:
    if total <= _BAR_FROM:
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import track

    # On stderr: commands print their results to stdout.
    yield from track(chunks, description=f"tokenising {total} examples", console=Console(stderr=True), transient=True)
