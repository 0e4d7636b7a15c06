"""Examples to token ids, one by one: what is learned of them, prompts to answer, what is cut.

A conversation is written whole by the tokenizer's chat template, with loss on what the assistant
says. The template marks these tokens ({% generation %}); without marks they are what the
conversation up to and with an answer has more than the conversation before it. The tokens before an
answer are compared with those that generation starts from.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import prompts
from zflora_jax.data.prompts import encode_prompt_texts
from zflora_jax.data.task import Example

log = logging.getLogger(__name__)

Pair = tuple[np.ndarray, np.ndarray]  # tokens [n] int32; mask [n] bool, True at what is learned
_Write = Callable[[int, bool], str]  # (number of turns, whether they are answered) -> their text

_CONVERSATION = "conversation"  # a style next to `prompts.STYLES`
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What templates take out of a text on purpose: SmolLM3's and Qwen3's switches, earlier thoughts.
_TAKEN_OUT = re.compile(r"/(?:no_)?think\b|<think>.*?</think>", re.DOTALL)

# --- sequences to learn ---------------------------------------------------------------------------


def encode_examples(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[Pair]:
    """Tokenises examples of any length.

    Args:
      examples: The examples.
      tokenizer: A Hugging Face tokenizer.
      data: prompt_style and date are read.

    Returns:
      (tokens [n] int32, mask [n] bool, True at what is learned) of each: prompt, target and one
      `prompts.end_token`, or the conversation, whose turns before `context` are not learned. The
      mask is about the token at its own position; the loss shifts by one.

    Raises:
      ConfigError: A conversation is in another style than chat; or the template refuses it, leaves
        out a part of it, or, if it has no marks, writes the turns before an answer otherwise than
        where the answer follows.
    """
    rows = dict[int, Pair]()
    styles = [_style_of(e, data.prompt_style) for e in examples]
    for style in dict.fromkeys(styles):
        at = [i for i, other in enumerate(styles) if other == style]
        chosen = [examples[i] for i in at]
        if style == _CONVERSATION:
            pairs = [_conversation(tokenizer, example, data.date) for example in chosen]
        else:
            pairs = _prompts_and_targets(tokenizer, style, chosen, data.date)
        rows |= zip(at, pairs, strict=True)
    return [rows[i] for i in range(len(examples))]


def _style_of(example: Example, style: str) -> str:
    """Returns how an example is written; `style` is that of instructions."""
    if not example.turns:
        return "plain" if example.plain else style
    require(
        style == "chat",
        f"conversations are written by the tokenizer's chat template: data.prompt_style={style!r}"
        " must be 'chat'.",
    )
    return _CONVERSATION


def _prompts_and_targets(
    tokenizer: Any, style: str, examples: Sequence[Example], date: str | None
) -> list[Pair]:
    """Tokenises prompts and targets separately. With "plain" they are one text, because a tokenizer
    may write a space before a text: what the target changes of the prompt's last tokens is learned,
    as TRL has it.
    """
    end = prompts.end_token(tokenizer, style)
    texts = [prompts.render(tokenizer, style, e.prompt, e.input, date) for e in examples]
    given = encode_prompt_texts(tokenizer, texts)
    if style == "plain":
        # A target may end as the sequence will.
        targets = [e.target.removesuffix(tokenizer.eos_token) for e in examples]
        whole = [text + target for text, target in zip(texts, targets, strict=True)]
        rows = encode_prompt_texts(tokenizer, whole)
    else:
        ids = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        rows = [prompt + target for prompt, target in zip(given, ids, strict=True)]
    starts = [_common(prompt, row) for prompt, row in zip(given, rows, strict=True)]
    return [
        (np.asarray([*row, end], np.int32), np.arange(len(row) + 1) >= start)
        for row, start in zip(rows, starts, strict=True)
    ]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common prefix of two lists of token ids."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


# --- conversations --------------------------------------------------------------------------------


def _conversation(tokenizer: Any, example: Example, date: str | None) -> Pair:
    def write(count: int, answered: bool) -> str:
        """The first `count` turns; if they are not answered, with the header of an answer."""
        return _write(tokenizer, replace(example, turns=example.turns[:count]), date, answered)

    try:
        text = write(len(example.turns), True)
        _require_all_written(tokenizer, example, text, date)
        if _MARKS.search(prompts.chat_template(tokenizer, example.tools)):
            tokens, mask = _by_marks(tokenizer, example, write, date)
        else:
            tokens, mask = _by_prefixes(tokenizer, example, write, text)
    except ConfigError as error:
        where = example.where or f"conversation {example.turns[0]['content'][:60]!r}"
        raise ConfigError(f"{where}: {error}") from error
    if prompts.added_tokens(tokenizer).isdisjoint(tokens[np.flatnonzero(mask)[-3:]].tolist()):
        _warn("ends with no token of its own, so a model does not learn to stop")
    return tokens, mask


@cache
def _warn(problem: str) -> None:
    """Warns once in a process: examples come in thousands of batches."""
    log.warning("chat template: the last answer of some conversations %s", problem)


def _write(tokenizer: Any, e: Example, date: str | None, answered: bool) -> str:
    return prompts.render_turns(tokenizer, e.turns, date, e.tools, e.settings, answered)


def last_answer(example: Example) -> int:
    """Returns the index of the assistant's last turn in a conversation."""
    return max(i for i, turn in enumerate(example.turns) if turn["role"] == "assistant")


def _require_all_written(tokenizer: Any, example: Example, text: str, date: str | None) -> None:
    """Refuses a template that leaves out a turn, a call, or the tools."""
    without = {"the tools": replace(example, tools=())} if example.tools else {}
    for i, turn in enumerate(example.turns):
        for part in map(str.strip, _TAKEN_OUT.split(turn["content"])):
            spellings = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
            require(
                any(spelling in text for spelling in spellings),
                f"the tokenizer's chat template leaves out or changes turn {i + 1}"
                f" ({turn['role']}): {part[:60]!r}. Use a template that writes it, or leave it out"
                " of the row (a system turn's text can stand at the start of the first user turn).",
            )
        if turn.get("tool_calls"):
            bare = {name: x for name, x in turn.items() if name != "tool_calls"}
            turns = (*example.turns[:i], bare, *example.turns[i + 1 :])
            without[f"the tool calls of turn {i + 1}"] = replace(example, turns=turns)
    for name, other in without.items():
        require(
            _write(tokenizer, other, date, answered=True) != text,
            f"the tokenizer's chat template leaves out {name}. Use a template that writes it, or"
            " leave it out of the row.",
        )


def _by_marks(tokenizer: Any, example: Example, write: _Write, date: str | None) -> Pair:
    """Masks what the template marks."""
    require(
        tokenizer.is_fast,
        f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell which tokens a chat"
        " template marks. Save the model's tokenizer as tokenizer.json.",
    )
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    options |= example.settings
    found = prompts.apply_template(tokenizer, example.turns, date, example.tools, **options)
    (tokens,) = prompts.with_bos(tokenizer, [found["input_ids"]])
    mask = np.pad(
        np.asarray(found["assistant_masks"], bool), (len(tokens) - len(found["input_ids"]), 0)
    )
    if example.context:
        (given,) = encode_prompt_texts(tokenizer, [write(example.context, False)])
        mask[: _common(given, tokens)] = False
    require(
        bool(mask.any()),
        "the chat template marks nothing of it as the assistant's: its generation marks are not"
        " around the answers.",
    )
    (prompt,) = encode_prompt_texts(tokenizer, [write(last_answer(example), False)])
    if _common(prompt, tokens) < len(prompt):
        _warn("is marked behind other tokens than generation starts from")
    return np.asarray(tokens, np.int32), mask


def _by_prefixes(tokenizer: Any, example: Example, write: _Write, text: str) -> Pair:
    """Masks what each answer adds to the conversation before it."""
    answers = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
    answers = [i for i in answers if i >= example.context]
    require(
        answers[0] > 0,
        "it begins with the assistant, and what it says there answers nothing. Remove that turn, or"
        " put one of the user before it.",
    )
    texts = [text, *(write(i, False) for i in answers), *(write(i + 1, True) for i in answers)]
    ids, *prefixes = encode_prompt_texts(tokenizer, texts)
    mask = np.zeros(len(ids), bool)
    for i, before, after in zip(answers, prefixes, prefixes[len(answers) :], strict=False):
        start = _common(before, ids)
        if start < len(before):
            there, here = (tokenizer.decode(x[start : start + 12]) for x in (before, ids))
            raise ConfigError(
                f"before turn {i + 1} the model is given other tokens when it has to answer"
                f" ({there!r}) than where the answer follows ({here!r}). White space at the start"
                " of the answer may merge with the template's: strip it. Or the template writes"
                " earlier turns, or what a reasoning model begins with, in another way there: use"
                " one with {% generation %} marks."
            )
        # Some templates leave out parts of an earlier answer that they write of the last one.
        whole = _common(after, ids) == len(after)
        end = len(after) if whole else _end(tokenizer, example, i, ids, start)
        require(end > start, f"turn {i + 1} has no tokens of its own.")
        mask[start:end] = True
    return np.asarray(ids, np.int32), mask


def _end(tokenizer: Any, example: Example, i: int, ids: list[int], start: int) -> int:
    """Returns the end of the answer of turn `i`, which begins at `start`: behind its end token."""
    end = prompts.end_token(tokenizer, "chat")
    stop = ids.index(end, start) + 1 if end in ids[start:] else start
    written = tokenizer.decode(ids[start:stop])
    answer = _TAKEN_OUT.split(example.turns[i]["content"])[-1].strip()
    after = example.turns[i + 1]["content"].strip() if i + 1 < len(example.turns) else ""
    require(
        answer in written and not (after and after in written.replace(answer, "", 1)),
        f"where turn {i + 1} ends cannot be told: the chat template writes it in another way when"
        " more turns follow, and it does not end with the first token that ends the last answer."
        " Use a template with {% generation %} marks.",
    )
    return stop


# --- prompts and options --------------------------------------------------------------------------


def encode_prompts(
    examples: Sequence[Example], tokenizer: Any, prompt_style: str, date: str | None = None
) -> list[list[int]]:
    """Tokenises the prompts of examples: the same tokens as in training.

    Args:
      examples: The examples.
      tokenizer: A Hugging Face tokenizer.
      prompt_style: One of `prompts.STYLES`.
      date: The day that a chat template is told, "2026-11-26"; None for today.

    Returns:
      The token ids of each prompt; of a conversation, what is before its last answer.

    Raises:
      ConfigError: An example has no prompt.
    """

    def text(e: Example) -> str:
        style = _style_of(e, prompt_style)
        if style == _CONVERSATION:
            before = replace(e, turns=e.turns[: last_answer(e)])
            return _write(tokenizer, before, date, answered=False)
        return prompts.render(tokenizer, style, e.prompt, e.input, date)

    found = encode_prompt_texts(tokenizer, [text(e) for e in examples])
    require(
        all(e.prompt or e.turns for e in examples),
        "a row has no prompt (its form is 'text', or its prompt is empty), so no answer can be"
        " generated to it; it has a loss alone (eval.generate=False).",
    )
    return found


def encode_options(
    example: Example, prompt: list[int], tokenizer: Any
) -> tuple[list[int], list[list[int]]]:
    """Tokenises the options of an example as training tokenises its target.

    Args:
      example: An example with options.
      prompt: Its token ids, of `encode_prompts`.
      tokenizer: A Hugging Face tokenizer.

    Returns:
      (The token ids that all options follow, those of each option after them.) Where the example is
      plain, prompt and option are one text: what an option changes of the prompt's last tokens
      belongs to the option, so the first may be shorter than `prompt`.
    """
    if not example.plain:
        ids = tokenizer(list(example.options), add_special_tokens=False)["input_ids"]
        return prompt, ids
    rows = encode_prompt_texts(tokenizer, [example.prompt + text for text in example.options])
    start = min(_common(prompt, row) for row in rows)
    return prompt[:start], [row[start:] for row in rows]


# --- what does not fit ----------------------------------------------------------------------------


def cut_to_fit(example: Example, row: Pair, tokenizer: Any, data: DataConfig) -> Pair | None:
    """Cuts the document of an example at its end, or a conversation behind the last answer that
    fits data.bucket_lengths. `row` is of `encode_examples`.

    Returns:
      As `row`; None if it fits, has nothing that may be cut, or would have nothing left of it.
    """
    (tokens, mask), limit = row, data.bucket_lengths[-1]
    if len(tokens) <= limit:
        return None
    if example.turns:
        ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
        end = max(ends[ends <= limit], default=None)
        return None if end is None else (tokens[:end], mask[:end])
    if not example.document:
        return None

    def encoded(example: Example) -> Pair:
        return encode_examples([example], tokenizer, data)[0]

    short = _shorten(example, tokenizer, limit, lambda e: len(encoded(e)[0]))
    return encoded(short) if short.input.strip() else None


def fit_documents(
    examples: Sequence[Example],
    tokenizer: Any,
    prompt_style: str,
    limit: int,
    date: str | None = None,
) -> list[Example]:
    """Cuts documents at their end so that each prompt has at most `limit` tokens.

    Args:
      examples: The examples.
      tokenizer: A Hugging Face tokenizer.
      prompt_style: One of `prompts.STYLES`.
      limit: The largest number of tokens.
      date: The day that a chat template is told; None for today.

    Returns:
      The examples; one that fits is the same object.
    """

    def length(example: Example) -> int:
        return len(encode_prompts([example], tokenizer, prompt_style, date)[0])

    return [_shorten(e, tokenizer, limit, length) if e.document else e for e in examples]


def _shorten(
    example: Example, tokenizer: Any, limit: int, length: Callable[[Example], int]
) -> Example:
    """Cuts the document until the example's `length` is at most `limit`, or nothing is left."""
    while (excess := length(example) - limit) > 0 and example.input:
        ids = tokenizer(example.input, add_special_tokens=False)["input_ids"]
        kept = tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=False)
        # A cut may fall inside a character, which decodes to U+FFFD.
        example = replace(example, input=kept.rstrip("\ufffd"))
    return example
