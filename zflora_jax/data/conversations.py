"""Conversations to token ids: all turns in the tokenizer's chat template, loss on what the
assistant says.

What that is, the template marks ({% generation %}), or it is what the conversation up to and with
an answer has more than the conversation before it. Either way the tokens are those of the whole
conversation, and those before an answer are checked to be the ones that generation will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.prompts import (
    encode_prompt_texts,
    end_token,
    marked_turns,
    marks_answers,
    render_turns,
    with_bos,
)
from zflora_jax.data.task import Example

_LITERAL = ("system", "user")  # roles whose text every template writes as it is


def encode_conversations(
    tokenizer: Any, examples: Sequence[Example], date: str | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokenise conversations.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      examples: with turns.
      date: the date that the template is told; None: today.

    Returns:
      (tokens [n] int32, mask [n] bool, True at what the assistant says) of each. The turns before
      an example's `context` have no True.

    Raises:
      ConfigError: the template refuses a conversation, leaves out a turn of it, or writes the turns
        before an answer otherwise than where the answer follows. The message quotes it.
    """
    by_marks = marks_answers(tokenizer)
    rows = []
    for example in examples:
        try:
            text = render_turns(tokenizer, example.turns, date, example.tools, answered=True)
            _require_all_turns(example, text)
            find = _marked if by_marks else _between_prefixes
            rows.append(find(tokenizer, example, text, date))
        except ConfigError as error:
            start = example.turns[0]["content"][:60]
            raise ConfigError(f"the conversation that starts {start!r}: {error}") from error
    return rows


def cut_at_a_turn(
    tokens: np.ndarray, mask: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The conversation up to its last answer that ends within `limit` tokens; None if none does.

    Args:
      tokens: of `encode_conversations`, as mask.
      mask: True at what the assistant says.
      limit: tokens.
    """
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
    fitting = ends[ends <= limit]
    return (tokens[: fitting[-1]], mask[: fitting[-1]]) if len(fitting) else None


def answer_prompt(tokenizer: Any, example: Example, date: str | None = None) -> str:
    """The text that a model is given before the last answer of a conversation."""
    return render_turns(tokenizer, example.turns[: last_answer(example)], date, example.tools)


def last_answer(example: Example) -> int:
    """The index of the assistant's last turn."""
    return max(i for i, turn in enumerate(example.turns) if turn["role"] == "assistant")


def _require_all_turns(example: Example, text: str) -> None:
    at = 0
    for number, turn in enumerate(example.turns, 1):
        said = turn["content"].strip()
        if turn["role"] not in _LITERAL:
            continue
        found = text.find(said, at)
        require(
            found >= 0,
            f"the tokenizer's chat template leaves out or changes turn {number}"
            f" ({turn['role']}: {said[:60]!r}). Move its text into a user turn, or use another"
            " template.",
        )
        at = found + len(said)


def _marked(
    tokenizer: Any, example: Example, text: str, date: str | None
) -> tuple[np.ndarray, np.ndarray]:
    ids, marks = marked_turns(tokenizer, example.turns, date, example.tools)
    (with_start,) = with_bos(tokenizer, [ids])
    mask = np.pad(np.asarray(marks, bool), (len(with_start) - len(ids), 0))
    if example.context:
        before = example.turns[: example.context]
        given = render_turns(tokenizer, before, date, example.tools)
        mask[: _common(encode_prompt_texts(tokenizer, [given])[0], with_start)] = False
    require(
        bool(mask.any()),
        "the chat template marks nothing of it as the assistant's: its generation marks are not"
        " around the answers.",
    )
    return np.asarray(with_start, np.int32), mask


def _between_prefixes(
    tokenizer: Any, example: Example, text: str, date: str | None
) -> tuple[np.ndarray, np.ndarray]:
    turns = example.turns
    said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    said = [i for i in said if i >= example.context]
    require(
        said[0] > 0,
        "it begins with the assistant, and what it says there answers nothing. Remove that turn, or"
        " put one of the user before it.",
    )
    befores = [render_turns(tokenizer, turns[:i], date, example.tools) for i in said]
    afters = [
        render_turns(tokenizer, turns[: i + 1], date, example.tools, answered=True) for i in said
    ]
    ids, *prefixes = encode_prompt_texts(tokenizer, [text, *befores, *afters])
    mask = np.zeros(len(ids), bool)
    for i, before, after in zip(said, prefixes, prefixes[len(said) :], strict=False):
        start = _common(before, ids)
        if start < len(before):
            there, here = (tokenizer.decode(x[start : start + 8]) for x in (before, ids))
            raise ConfigError(
                f"before turn {i + 1} the tokens are not those that the model is given when it has"
                f" to answer: {there!r} there, {here!r} where the answer follows. Strip the answer"
                " (white space may merge with the template's), or use a chat template with"
                " {% generation %} marks."
            )
        # Of an earlier answer some templates leave out parts that they write of the last one.
        end = len(after) if _common(after, ids) == len(after) else _end(tokenizer, ids, start, i)
        require(end > start, f"turn {i + 1} has no tokens of its own.")
        mask[start:end] = True
    return np.asarray(ids, np.int32), mask


def _end(tokenizer: Any, ids: Sequence[int], start: int, turn: int) -> int:
    """Behind the token that ends the answer that begins at `start`."""
    end = end_token(tokenizer, "chat")
    require(
        end in ids[start:],
        f"where turn {turn + 1} ends cannot be told: the chat template writes it in another way"
        " when more turns follow, and ends it with no token of its own. Use a template with"
        " {% generation %} marks.",
    )
    return list(ids).index(end, start) + 1


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
