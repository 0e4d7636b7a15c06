"""Examples to token ids: prompt and target together, documents cut to fit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.data.encoding import cut_to_fit, encode_examples
from zflora_jax.data.mixture import Mixture
from zflora_jax.data.tasks import Example

log = logging.getLogger(__name__)

_CHUNK = 1000  # examples per tokenizer call
_BAR_FROM = 5000  # examples; fewer are tokenised in about a second


class TokenizedExample(NamedTuple):
    """One training sequence: an example, or several that are packed together.

    Attributes:
      tokens: [n] int32.
      loss_mask: [n] bool, True where the token at that position is learned.
      segments: [n] int32, the number of the example that a token belongs to, from 1.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    segments: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, in the order of their source.

    Attributes:
      rows: the sequences.
      kept: the source's index of each sequence; empty if they are packed.
      dropped: number of examples that were too long.
      pad_id: the token id that fills short rows of a batch.
      truncated: number of documents and conversations that were cut to fit.
      parts: number of sequences of each task of a mixture; `rows` holds one task after the other.
      weights: how often a training step draws from each task; None: by number of sequences.
    """

    rows: tuple[TokenizedExample, ...]
    kept: tuple[int, ...]
    dropped: int
    pad_id: int
    truncated: int = 0
    parts: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """sha256 (hex) of all sequences. A resumed run compares it, so that it never continues with
        other data.
        """
        digest = hashlib.sha256(repr((self.parts, self.weights)).encode())
        for row in self.rows:
            digest.update(
                len(row.tokens).to_bytes(8, "little") + b"".join(part.tobytes() for part in row)
            )
        return digest.hexdigest()


@dataclass(frozen=True)
class Share:
    """The part of the examples that one of several processes reads and tokenises.

    Attributes:
      index: the number of this process.
      count: how many there are.
      exchange: this process's bytes -> those of all processes, in their order.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[bytes], list[bytes]] = lambda own: [own]

    def of(self, size: int) -> range:
        """The indices of this process among `size`."""
        return range(self.index * size // self.count, (self.index + 1) * size // self.count)


ALONE = Share()


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    data: DataConfig,
    vocab_size: int | None = None,
    share: Share = ALONE,
) -> Encoded:
    """Tokenise examples, prompt and target.

    A sequence longer than the longest of `data.bucket_lengths` is dropped. Its target is never cut,
    because that would teach the model to stop in the middle, nor is a question; but the `input` of
    an example with a `document` is cut at its end until the sequence fits, and a conversation
    behind its last answer that fits. The numbers of dropped and cut examples are logged.

    Args:
      examples: of one task, or a Mixture.
      tokenizer: a Hugging Face tokenizer.
      data: bucket_lengths, prompt_style, train_on_prompt and date are read.
      vocab_size: rows of the model's embedding; None: token ids are not checked.
      share: the part of them that this process reads and tokenises. All processes call this
        together, with the same examples, and all get the sequences of all.

    Raises:
      ConfigError: there are no examples, all are too long, or a token id (or the padding's) has no
        embedding.
    """
    require(
        len(examples) > 0,
        "the dataset is empty: there is nothing to tokenise. Check data.task and data.data_dir.",
    )
    limit = data.bucket_lengths[-1]
    if share.count > 1:
        rows, truncated = _shared(examples, tokenizer, data, share)
    else:
        rows, truncated = _tokenized(examples, range(len(examples)), tokenizer, data)
    kept = tuple(i for i, row in enumerate(rows) if len(row.tokens) <= limit)
    _report_lengths([len(row.tokens) for row in rows], len(kept), truncated, data)
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    pad_id = int(pad_id or 0)
    if vocab_size is not None:
        found = np.unique(np.concatenate([rows[i].tokens for i in kept]))
        check_ids(np.append(found, pad_id), vocab_size, "the tokenised data", tokenizer)
    sizes, weights = [len(rows)], None
    if isinstance(examples, Mixture):
        sizes, weights = list(map(len, examples.parts)), examples.weights
    ends = np.searchsorted(kept, np.cumsum(sizes))
    of_tasks = tuple(int(n) for n in np.diff(ends, prepend=0))
    require(
        weights is None or min(of_tasks) > 0,
        "a task of the mixture has no example left that fits data.bucket_lengths; add a length or"
        " leave it out.",
    )
    fitting = tuple(rows[i] for i in kept)
    return Encoded(fitting, kept, len(rows) - len(kept), pad_id, truncated, of_tasks, weights)


def _tokenized(
    examples: Sequence[Example], indices: range, tokenizer: Any, data: DataConfig
) -> tuple[list[TokenizedExample], int]:
    """(The sequences of the examples at `indices`, how many documents were cut.)"""
    rows: list[TokenizedExample] = []
    truncated = 0
    for first in _progress(range(0, len(indices), _CHUNK), len(indices)):
        chunk = [examples[i] for i in indices[first : first + _CHUNK]]
        for example, whole in zip(chunk, encode_examples(chunk, tokenizer, data), strict=True):
            cut = cut_to_fit(example, whole, tokenizer, data)
            tokens, mask = cut or whole
            segments = np.ones(len(tokens), np.int32)
            rows.append(TokenizedExample(tokens, mask | data.train_on_prompt, segments))
            truncated += cut is not None
    return rows, truncated


def _shared(
    examples: Sequence[Example], tokenizer: Any, data: DataConfig, share: Share
) -> tuple[list[TokenizedExample], int]:
    """`_tokenized` of all examples, of which this process does its share. What one process refuses,
    all refuse: none waits for it.
    """
    own = share.of(len(examples))
    try:
        sent = b"\0" + _packed(*_tokenized(examples, own, tokenizer, data))
    except ConfigError as error:
        sent = b"\1" + str(error).encode()
    except Exception as error:  # a bug
        share.exchange(b"\1" + repr(error).encode())
        raise
    found = share.exchange(sent)
    for part in found:
        if part[:1] == b"\1":
            raise ConfigError(part[1:].decode())
    parts = [_unpacked(part[1:]) for part in found]
    return [row for part, _ in parts for row in part], sum(count for _, count in parts)


def _packed(rows: Sequence[TokenizedExample], truncated: int) -> bytes:
    """Rows of one example each, and a number, as bytes."""
    lengths = np.asarray([truncated, len(rows), *(len(row.tokens) for row in rows)], np.int64)
    tokens = b"".join(row.tokens.tobytes() for row in rows)
    return lengths.tobytes() + tokens + b"".join(row.loss_mask.tobytes() for row in rows)


def _unpacked(data: bytes) -> tuple[list[TokenizedExample], int]:
    """The inverse of `_packed`."""
    truncated, count = np.frombuffer(data, np.int64, 2).tolist()
    lengths = np.frombuffer(data, np.int64, count, 16)
    total, ends = int(lengths.sum()), np.cumsum(lengths)[:-1]
    tokens = np.frombuffer(data, np.int32, total, 16 + 8 * count)
    mask = np.frombuffer(data, np.bool_, total, 16 + 8 * count + 4 * total)
    pairs = zip(np.split(tokens, ends), np.split(mask, ends), strict=True)
    rows = [TokenizedExample(ids, learned, np.ones(len(ids), np.int32)) for ids, learned in pairs]
    return rows[:count], truncated


def _report_lengths(lengths: Sequence[int], kept: int, truncated: int, data: DataConfig) -> None:
    """Log how many examples were dropped and cut; ConfigError if none is left."""
    limit, longest = data.bucket_lengths[-1], max(lengths)
    require(
        kept > 0,
        f"all {len(lengths)} examples are longer than the longest of"
        f" data.bucket_lengths={list(data.bucket_lengths)}: they have {min(lengths)} to {longest}"
        " tokens. Add a length, e.g."
        f" data.bucket_lengths={[*data.bucket_lengths, -(-longest // 64) * 64]}.",
    )
    if kept < len(lengths):
        log.warning(
            "dropped %d of %d examples longer than %d tokens (the longest has %d); see"
            " data.bucket_lengths",
            len(lengths) - kept,
            len(lengths),
            limit,
            longest,
        )
    if truncated:
        log.warning(
            "cut %d of %d documents or conversations so that they fit %d tokens, answers whole; see"
            " data.bucket_lengths",
            truncated,
            len(lengths),
            limit,
        )


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
