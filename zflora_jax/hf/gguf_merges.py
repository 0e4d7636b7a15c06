"""Merges of a BPE tokenizer as the scores of a sentencepiece vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from zflora_jax.core.fields import require

_NORMAL = 1
_NEVER_MERGED = -1e6  # the score of single characters, which no merge makes


def merges_as_scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]]
) -> list[float]:
    """Scores that make llama.cpp merge in the order of `merges`.

    llama.cpp joins the two neighbours whose joined token has the highest score, whatever the two
    are. So the merges that make one token must follow each other, and be all of them.

    Args:
      tokens: of the vocabulary, by id.
      types: llama.cpp's type of each.
      merges: pairs, the first to merge first.

    Returns:
      A score for each token.

    Raises:
      ConfigError: no scores give this order.
    """
    rank: dict[str, int] = {}
    last = None
    for pair in merges:
        token = "".join(pair)
        require(
            token == last or token not in rank,
            f"the tokenizer's merges of {token!r} do not follow each other, so a sentencepiece"
            " vocabulary, in which the order is that of the merged tokens, cannot express it. Set"
            " model.tokenizer = None to write the file without one.",
        )
        rank.setdefault(token, len(rank))
        last = token
    _require_all(tokens, types, set(merges))
    return [-float(rank[token]) if token in rank else _NEVER_MERGED for token in tokens]


def _require_all(tokens: Sequence[str], types: Sequence[int], merges: set[tuple[str, ...]]) -> None:
    """ConfigError where two tokens that make a third have no merge."""
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    for token in normal:
        for i in range(1, len(token)):
            pair = (token[:i], token[i:])
            require(
                pair in merges or not (pair[0] in normal and pair[1] in normal),
                f"the tokenizer does not merge {pair[0]!r} and {pair[1]!r}, which a sentencepiece"
                f" vocabulary that has {token!r} would. Set model.tokenizer = None to write the"
                " file without one.",
            )
