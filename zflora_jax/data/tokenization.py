"""A dataset to token ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.data.encoding import cut_to_fit, encode_examples
from zflora_jax.data.mixture import Mixture
from zflora_jax.data.task import Example

log = logging.getLogger(__name__)

_CHUNK = 1000  # examples per tokenizer call
_SLOW = 5000  # examples; fewer are tokenised in about a second


class TokenizedExample(NamedTuple):
    """One training sequence, of an example or of several that are packed together: token ids [n]
    int32, loss mask [n] bool, True where the token at that position is learned, and the number of
    each token's example, from 1, [n] int32.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    segments: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, in the order of their source.

    Attributes:
      rows: The sequences.
      dropped: The number of examples that were too long.
      pad_id: The token id that fills short rows of a batch.
      truncated: The number of documents and conversations that were cut to fit.
      parts: The number of sequences of each task of a mixture, whose rows follow each other.
      weights: How often a training step draws from each task; None: by number of sequences.
    """

    rows: tuple[TokenizedExample, ...]
    dropped: int
    pad_id: int
    truncated: int = 0
    parts: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Returns the sha256 (hex) of all sequences. A resumed run compares it, so that it never
        continues with other data.
        """
        digest = hashlib.sha256(repr((self.parts, self.weights)).encode())
        for row in self.rows:
            digest.update(
                len(row.tokens).to_bytes(8, "little") + b"".join(part.tobytes() for part in row)
            )
        return digest.hexdigest()


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    data: DataConfig,
    vocab_size: int | None = None,
) -> Encoded:
    """Tokenises examples, prompt and target.

    A sequence longer than the longest of `data.bucket_lengths` is dropped. Its target is never cut,
    because that would teach the model to stop in the middle, nor is a question; but the `input` of
    an example with a `document` is cut at its end until the sequence fits, and a conversation
    behind its last answer that fits. The numbers of dropped and cut examples are logged.

    Args:
      examples: Examples of one task, or a Mixture.
      tokenizer: A Hugging Face tokenizer.
      data: bucket_lengths, prompt_style, train_on_prompt and date are read.
      vocab_size: Rows of the model's embedding; None: token ids are not checked.

    Raises:
      ConfigError: There are no examples, all are too long, or a token id (or the padding's) has no
        embedding.
    """
    require(
        len(examples) > 0,
        "the dataset is empty: there is nothing to tokenise. Check data.task and data.data_dir.",
    )
    rows, truncated, limit = list[TokenizedExample](), 0, data.bucket_lengths[-1]
    if len(examples) > _SLOW:
        log.info("tokenising %d examples", len(examples))
    for start in range(0, len(examples), _CHUNK):
        chunk = list(examples[start : start + _CHUNK])
        for example, whole in zip(chunk, encode_examples(chunk, tokenizer, data), strict=True):
            cut = cut_to_fit(example, whole, tokenizer, data)
            tokens, mask = cut or whole
            segments = np.ones(len(tokens), np.int32)
            rows.append(TokenizedExample(tokens, mask | data.train_on_prompt, segments))
            truncated += cut is not None
    kept = [i for i, row in enumerate(rows) if len(row.tokens) <= limit]
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
    parts = tuple(int(n) for n in np.diff(ends, prepend=0))
    require(
        weights is None or min(parts) > 0,
        "a task of the mixture has no example left that fits data.bucket_lengths; add a length or"
        " leave it out.",
    )
    fitting = tuple(rows[i] for i in kept)
    return Encoded(fitting, len(rows) - len(kept), pad_id, truncated, parts, weights)


def _report_lengths(lengths: Sequence[int], kept: int, truncated: int, data: DataConfig) -> None:
    """Logs how many examples were dropped and cut; ConfigError if none is left."""
    limit, longest, count = data.bucket_lengths[-1], max(lengths), len(lengths)
    require(
        kept > 0,
        f"all {count} examples are longer than the longest of"
        f" data.bucket_lengths={list(data.bucket_lengths)}: they have {min(lengths)} to {longest}"
        " tokens. Add a length, e.g."
        f" data.bucket_lengths={[*data.bucket_lengths, -(-longest // 64) * 64]}.",
    )
    if kept < count:
        log.warning(
            f"dropped {count - kept} of {count} examples longer than {limit} tokens (the longest"
            f" has {longest}); see data.bucket_lengths"
        )
    if truncated:
        log.warning(
            f"cut {truncated} of {count} documents or conversations so that they fit {limit}"
            " tokens, answers whole; see data.bucket_lengths"
        )
