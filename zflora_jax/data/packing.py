"""Packing: short sequences joined into rows of one length."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from zflora_jax.data.tokenization import Encoded, TokenizedExample


def pack_sequences(encoded: Encoded, capacity: int) -> Encoded:
    """Join sequences into rows, best fit by decreasing length, within each task.

    The loss is that of the sequences apart. Nothing predicts the first token of a sequence; in a
    packed row a token of another example precedes it, so it is masked.

    Args:
      encoded: unpacked sequences of at most `capacity` tokens.
      capacity: tokens of a row, at most.

    Returns:
      The same tokens in fewer rows, whose `segments` number the examples.
    """
    packed: list[TokenizedExample] = []
    parts, start = [], 0
    for size in encoded.parts:
        rows = encoded.rows[start : start + size]
        start += size
        room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
        bins: list[list[TokenizedExample]] = []
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


def _join(rows: Sequence[TokenizedExample]) -> TokenizedExample:
    masks = [row.loss_mask & (np.arange(len(row.tokens)) > 0) for row in rows]
    segments = [np.full(len(row.tokens), i, np.int32) for i, row in enumerate(rows, 1)]
    return TokenizedExample(
        np.concatenate([row.tokens for row in rows]),
        np.concatenate(masks),
        np.concatenate(segments),
    )
