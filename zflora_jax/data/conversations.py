"""Conversations to token ids: all turns in the tokenizer's chat template, loss on what the
assistant says.

What that is, the template marks ({% generation %}), or it is what the conversation up to and with
an answer has more than the conversation before it. The tokens are those of the whole conversation;
those before an answer are compared with the ones that generation starts from.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.prompts import (
    chat_template,
    common_prefix,
    encode_prompt_texts,
    end_token,
    marked_turns,
    render_turns,
    with_bos,
)
from zflora_jax.data.task import Example

log = logging.getLogger(__name__)

Pair = tuple[np.ndarray, np.ndarray]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates take out of a text on purpose: SmolLM3's and Qwen3's switches, earlier thoughts.
_TAKEN_OUT = re.compile(r"/(?:no_)?think\b|<think>.*?</think>", re.DOTALL)


def encode_conversations(
    tokenizer: Any, examples: Sequence[Example], date: str | None = None
) -> list[Pair]:
    """Tokenise conversations.

    Logged, once in a process, are answers that end with no token of their own, so that a model
    would not learn to stop, and marks behind other tokens than generation starts from.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      examples: with turns.
      date: the date that the template is told; None: today.

    Returns:
      (tokens [n] int32, mask [n] bool, True at what the assistant says) of each. The turns before
      an example's `context` have no True.

    Raises:
      ConfigError: the template refuses a conversation, leaves out a part of it, or, if it has no
        marks, writes the turns before an answer otherwise than where the answer follows.
    """
    rows, odd = list[Pair](), Counter[str]()
    endings = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for example in examples:
        try:
            row, same = _encode(tokenizer, example, date)
        except ConfigError as error:
            where = example.where or f"conversation {example.turns[0]['content'][:60]!r}"
            raise ConfigError(f"{where}: {error}") from error
        odd["is marked behind other tokens than generation starts from"] += not same
        ending = {*row[0][np.flatnonzero(row[1])[-3:]].tolist()}
        odd["ends with no token of its own, so a model does not learn to stop"] += not (
            endings & ending
        )
        rows.append(row)
    for what, count in odd.items():
        if count:
            _warn(what)
    return rows


@cache
def _warn(what: str) -> None:
    """Once in a process: examples come in thousands of batches."""
    log.warning("chat template: the last answer of some conversations %s", what)


def _encode(tokenizer: Any, example: Example, date: str | None) -> tuple[Pair, bool]:
    """(Tokens and mask of a conversation, whether its last answer follows the tokens that
    generation starts from.)
    """
    settings = dict(example.settings)

    def written(count: int, answered: bool) -> str:
        """The first `count` turns; if they are not answered, with the header of an answer."""
        turns = example.turns[:count]
        return render_turns(tokenizer, turns, date, example.tools, settings, answered)

    text = written(len(example.turns), True)
    _require_all_said(tokenizer, example, text, date)
    if not _MARKS.search(chat_template(tokenizer, example.tools)):
        return _between_prefixes(tokenizer, example, text, written), True
    ids, marks = marked_turns(tokenizer, example.turns, date, example.tools, settings)
    row = _marked(tokenizer, example, ids, marks, written)
    (prompt,) = encode_prompt_texts(tokenizer, [written(last_answer(example), False)])
    return row, common_prefix(prompt, row[0].tolist()) == len(prompt)


def cut_at_a_turn(tokens: np.ndarray, mask: np.ndarray, limit: int) -> Pair | None:
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
    turns, settings = example.turns[: last_answer(example)], dict(example.settings)
    return render_turns(tokenizer, turns, date, example.tools, settings)


def last_answer(example: Example) -> int:
    """The index of the assistant's last turn."""
    return max(i for i, turn in enumerate(example.turns) if turn["role"] == "assistant")


def _require_all_said(tokenizer: Any, example: Example, text: str, date: str | None) -> None:
    """Refuse a template that leaves out a turn, a call, or the tools."""

    def require_part(part: str, what: str) -> None:
        spellings = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
        require(
            any(spelling in text for spelling in spellings),
            f"the tokenizer's chat template leaves out or changes {what}: {part[:60]!r}. Use a"
            " template that writes it, or leave it out of the row (a system turn's text can stand"
            " at the start of the first user turn).",
        )

    for number, turn in enumerate(example.turns, 1):
        for part in _TAKEN_OUT.split(turn["content"]):
            if part and part.strip():
                require_part(part.strip(), f"turn {number} ({turn['role']})")
    for what, other in _without_calls(example):
        settings = dict(example.settings)
        require(
            render_turns(tokenizer, other.turns, date, other.tools, settings, True) != text,
            f"the tokenizer's chat template leaves out {what}. Use a template that writes it, or"
            " leave it out of the row.",
        )


def _without_calls(example: Example) -> Iterator[tuple[str, Example]]:
    """The tools, and each turn's calls, by name, with the example that lacks them."""
    if example.tools:
        yield "the tools", replace(example, tools=())
    for i, turn in enumerate(example.turns):
        if turn.get("tool_calls"):
            turns = [*example.turns]
            turns[i] = {name: x for name, x in turn.items() if name != "tool_calls"}
            yield f"the tool calls of turn {i + 1}", replace(example, turns=tuple(turns))


def _marked(
    tokenizer: Any,
    example: Example,
    ids: list[int],
    marks: list[int],
    written: Callable[[int, bool], str],
) -> Pair:
    (tokens,) = with_bos(tokenizer, [ids])
    mask = np.pad(np.asarray(marks, bool), (len(tokens) - len(ids), 0))
    if example.context:
        given = encode_prompt_texts(tokenizer, [written(example.context, False)])[0]
        mask[: common_prefix(given, tokens)] = False
    require(
        bool(mask.any()),
        "the chat template marks nothing of it as the assistant's: its generation marks are not"
        " around the answers.",
    )
    return np.asarray(tokens, np.int32), mask


def _between_prefixes(
    tokenizer: Any, example: Example, text: str, written: Callable[[int, bool], str]
) -> Pair:
    said = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
    said = [i for i in said if i >= example.context]
    require(
        said[0] > 0,
        "it begins with the assistant, and what it says there answers nothing. Remove that turn, or"
        " put one of the user before it.",
    )
    texts = [text, *(written(i, False) for i in said), *(written(i + 1, True) for i in said)]
    ids, *prefixes = encode_prompt_texts(tokenizer, texts)
    mask = np.zeros(len(ids), bool)
    for i, before, after in zip(said, prefixes, prefixes[len(said) :], strict=False):
        start = common_prefix(before, ids)
        if start < len(before):
            there, here = (tokenizer.decode(x[start : start + 12]) for x in (before, ids))
            raise ConfigError(
                f"before turn {i + 1} the model is given other tokens when it has to answer"
                f" ({there!r}) than where the answer follows ({here!r}). White space at the start"
                " of the answer may merge with the template's: strip it. Or the template writes"
                " earlier turns, or what a reasoning model begins with, in another way there: use"
                " one with {% generation %} marks."
            )
        # Of an earlier answer some templates leave out parts that they write of the last one.
        whole = common_prefix(after, ids) == len(after)
        end = len(after) if whole else _end(tokenizer, example, i, ids, start)
        require(end > start, f"turn {i + 1} has no tokens of its own.")
        mask[start:end] = True
    return np.asarray(ids, np.int32), mask


def _end(tokenizer: Any, example: Example, i: int, ids: list[int], start: int) -> int:
    """Behind the token that ends the answer of turn `i`, which begins at `start`."""
    end = end_token(tokenizer, "chat")
    stop = ids.index(end, start) + 1 if end in ids[start:] else start
    said = tokenizer.decode(ids[start:stop])
    answer = (_TAKEN_OUT.split(example.turns[i]["content"])[-1] or "").strip()
    after = example.turns[i + 1]["content"].strip() if i + 1 < len(example.turns) else ""
    require(
        answer in said and not (after and after in said.replace(answer, "", 1)),
        f"where turn {i + 1} ends cannot be told: the chat template writes it in another way when"
        " more turns follow, and it does not end with the first token that ends the last answer."
        " Use a template with {% generation %} marks.",
    )
    return stop
