"""Examples to token ids, one by one: what is learned of them, prompts to answer, what is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.conversations import answer_prompt, cut_at_a_turn, encode_conversations
from zflora_jax.data.prompts import common_prefix, encode, encode_prompt_texts, render
from zflora_jax.data.tasks import Example

Pair = tuple[np.ndarray, np.ndarray]
CONVERSATION = "conversation"  # beside the `prompts.STYLES`


def encode_examples(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[Pair]:
    """Tokenise examples of any length.

    Args:
      examples: the examples.
      tokenizer: a Hugging Face tokenizer.
      data: prompt_style and date are read.

    Returns:
      (tokens [n] int32, mask [n] bool, True at what is learned) of each.
    """
    rows: list[Any] = [None] * len(examples)
    styles = [prompt_style_of(e, data.prompt_style) for e in examples]
    for style in dict.fromkeys(styles):
        at = [i for i, other in enumerate(styles) if other == style]
        chosen = [examples[i] for i in at]
        if style == CONVERSATION:
            pairs = encode_conversations(tokenizer, chosen, data.date)
        else:
            prompts = [render(tokenizer, style, e.prompt, e.input, data.date) for e in chosen]
            pairs = encode(tokenizer, style, prompts, [e.target for e in chosen])
        for i, pair in zip(at, pairs, strict=True):
            rows[i] = pair
    return rows


def prompt_style_of(example: Example, style: str) -> str:
    """How the prompt of an example is written.

    Args:
      example: an instruction, a conversation or a text.
      style: data.prompt_style, which instructions follow.

    Returns:
      `CONVERSATION`, or one of `prompts.STYLES`.

    Raises:
      ConfigError: a conversation in another style than chat.
    """
    if not example.turns:
        return "plain" if example.plain else style
    require(
        style == "chat",
        f"conversations are written by the tokenizer's chat template: data.prompt_style={style!r}"
        " must be 'chat'.",
    )
    return CONVERSATION


def cut_to_fit(example: Example, row: Pair, tokenizer: Any, data: DataConfig) -> Pair | None:
    """Cut the document of an example, or its last turns, so that it fits.

    Args:
      example: the example.
      row: of `encode_examples`.
      tokenizer: a Hugging Face tokenizer.
      data: bucket_lengths, prompt_style and date are read.

    Returns:
      As `row`; None if it fits, has nothing that may be cut, or would have nothing left of it.
    """
    limit = data.bucket_lengths[-1]
    if len(row[0]) <= limit:
        return None
    if example.turns:
        return cut_at_a_turn(*row, limit)
    if not example.document:
        return None
    short = shorten(
        example, tokenizer, limit, lambda e: len(encode_examples([e], tokenizer, data)[0][0])
    )
    return encode_examples([short], tokenizer, data)[0] if short.input.strip() else None


def shorten(
    example: Example, tokenizer: Any, limit: int, length: Callable[[Example], int]
) -> Example:
    """Cut the document of an example (its `input`) at its end.

    Args:
      example: the example.
      tokenizer: counts and cuts the tokens of the document.
      limit: the largest length that fits, in tokens.
      length: the length of an example in tokens.

    Returns:
      The example, cut until its length is at most `limit` or nothing of the document is left.
    """
    while (excess := length(example) - limit) > 0 and example.input:
        ids = tokenizer(example.input, add_special_tokens=False)["input_ids"]
        # A cut may fall inside a character, which decodes to U+FFFD.
        example = replace(
            example,
            input=tokenizer.decode(
                ids[: max(0, len(ids) - excess)], skip_special_tokens=False
            ).rstrip("\ufffd"),
        )
    return example


def encode_prompts(
    examples: Sequence[Example], tokenizer: Any, prompt_style: str, date: str | None = None
) -> list[list[int]]:
    """Tokenise the prompts of examples: the same tokens as in training.

    Args:
      examples: the examples.
      tokenizer: a Hugging Face tokenizer.
      prompt_style: one of `prompts.STYLES`.
      date: the day that a chat template is told, "2026-11-26"; None: today.

    Returns:
      The token ids of each prompt.
    """
    texts = []
    for e in examples:
        style = prompt_style_of(e, prompt_style)
        texts.append(
            answer_prompt(tokenizer, e, date)
            if style == CONVERSATION
            else render(tokenizer, style, e.prompt, e.input, date)
        )
    prompts = encode_prompt_texts(tokenizer, texts)
    require(
        all(e.prompt or e.turns for e in examples),
        "a row has no prompt (its form is 'text', or its prompt is empty), so no answer can be"
        " generated to it; it has a loss alone (eval.generate=False).",
    )
    return prompts


def encode_options(
    example: Example, prompt: list[int], tokenizer: Any
) -> tuple[list[int], list[list[int]]]:
    """Tokenise the options of an example as training tokenises its target.

    Args:
      example: with options.
      prompt: its token ids, of `encode_prompts`.
      tokenizer: a Hugging Face tokenizer.

    Returns:
      (The token ids that all options follow, those of each option after them.) Where the example is
      plain, prompt and option are one text: what an option changes of the prompt's last tokens is
      its own, so the first may be shorter than `prompt`.
    """
    if not example.plain:
        ids = tokenizer(list(example.options), add_special_tokens=False)["input_ids"]
        return prompt, ids
    rows = encode_prompt_texts(tokenizer, [example.prompt + text for text in example.options])
    start = min(common_prefix(prompt, row) for row in rows)
    return prompt[:start], [row[start:] for row in rows]


def fit_documents(
    examples: Sequence[Example],
    tokenizer: Any,
    prompt_style: str,
    limit: int,
    date: str | None = None,
) -> list[Example]:
    """Cut documents at their end so that each prompt has at most `limit` tokens.

    Args:
      examples: the examples.
      tokenizer: a Hugging Face tokenizer.
      prompt_style: one of `prompts.STYLES`.
      limit: tokens.
      date: the day that a chat template is told; None: today.

    Returns:
      The examples; one that fits is the same object.
    """

    def length(example: Example) -> int:
        return len(encode_prompts([example], tokenizer, prompt_style, date)[0])

    return [
        shorten(example, tokenizer, limit, length) if example.document else example
        for example in examples
    ]
