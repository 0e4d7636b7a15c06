"""Examples to token ids: what is learned, prompts to answer, what is cut to fit.

The tokenizer's chat template writes a conversation whole, with loss on the assistant's turns. The
template marks their tokens ({% generation %}); without marks they are what each answer adds to the
conversation before it. The tokens before an answer are compared with those that generation sees.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.data import prompts
from zflora_jax.data.mixture import Mixture
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
    """Tokenises examples of any length; prompt_style and date of `data` are read.

    Returns:
      (tokens [n] int32, mask [n] bool, True at what is learned) of each: prompt, target and one
      `prompts.end_token`, or the conversation, whose turns before `context` are not learned. The
      mask is about the token at its own position; the loss shifts by one.

    Raises:
      ConfigError: A conversation is in another style than chat; or the template refuses it, leaves
        out a part, or, without marks, writes the turns before an answer in two ways.
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
    """Returns how an example is written, where instructions are in `style`."""
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
    """Tokenises prompts and targets separately. With "plain" they are one text, as in TRL, because
    a tokenizer may write a space before a text; changed last tokens of the prompt are learned.
    """
    end = prompts.end_token(tokenizer, style)
    texts = [prompts.render(tokenizer, style, e.prompt, e.input, date) for e in examples]
    given = encode_prompt_texts(tokenizer, texts)
    if style == "plain":
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
        """Writes the first `count` turns; if not answered, with the header of an answer."""
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
    """Warns once in a process: there are thousands of batches."""
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
    added = len(tokens) - len(found["input_ids"])
    mask = np.pad(np.asarray(found["assistant_masks"], bool), (added, 0))
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
    """Tokenises prompts, with the same tokens as in training.

    Args:
      examples: The examples. The prompt of a conversation is what precedes its last answer.
      tokenizer: A Hugging Face tokenizer.
      prompt_style: One of `prompts.STYLES`.
      date: The date that a chat template is told, "2026-11-26"; None for today.

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

    Returns:
      (The token ids that all options follow, those of each option after them.) A plain prompt and
      its option are one text, and prompt tokens that an option changes belong to the option: the
      first may be shorter than `prompt`, the ids of `encode_prompts`.
    """
    if not example.plain:
        ids = tokenizer(list(example.options), add_special_tokens=False)["input_ids"]
        return prompt, ids
    rows = encode_prompt_texts(tokenizer, [example.prompt + text for text in example.options])
    start = min(_common(prompt, row) for row in rows)
    return prompt[:start], [row[start:] for row in rows]


# --- what does not fit ----------------------------------------------------------------------------


def cut_to_fit(example: Example, row: Pair, tokenizer: Any, data: DataConfig) -> Pair | None:
    """Cuts the end of a document, or a conversation behind the last answer that fits.

    Returns:
      As `row`, a pair of `encode_examples`, in at most max(data.bucket_lengths) tokens; None if it
      fits, has nothing that may be cut, or nothing would be left.
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

    def encoded(e: Example) -> Pair:
        return encode_examples([e], tokenizer, data)[0]

    short = _shorten(example, tokenizer, limit, lambda e: len(encoded(e)[0]))
    return encoded(short) if short.input.strip() else None


def fit_documents(
    examples: Sequence[Example],
    tokenizer: Any,
    prompt_style: str,
    limit: int,
    date: str | None = None,
) -> list[Example]:
    """Cuts documents at their end so that each prompt has at most `limit` tokens; the other
    arguments are those of `encode_prompts`. An example that fits is returned as the same object.
    """

    def length(example: Example) -> int:
        return len(encode_prompts([example], tokenizer, prompt_style, date)[0])

    return [_shorten(e, tokenizer, limit, length) if e.document else e for e in examples]


def _shorten(
    example: Example, tokenizer: Any, limit: int, length: Callable[[Example], int]
) -> Example:
    """Cuts the document until `length` is at most `limit`, or nothing is left."""
    while (excess := length(example) - limit) > 0 and example.input:
        ids = tokenizer(example.input, add_special_tokens=False)["input_ids"]
        kept = tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=False)
        # A cut may fall inside a character, which decodes to U+FFFD.
        example = replace(example, input=kept.rstrip("\ufffd"))
    return example


# --- a dataset ------------------------------------------------------------------------------------

_CHUNK = 1000  # examples per tokenizer call
_SLOW = 5000  # examples; fewer are tokenised in about a second


class TokenizedExample(NamedTuple):
    """One training sequence, of one example or several packed ones: token ids [n] int32, loss mask
    [n] bool, True where the token at that position is learned, and the number of each token's
    example, from 1, [n] int32.
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
        """Returns the sha256 (hex) of all sequences, which a resumed run compares."""
        digest = hashlib.sha256(repr((self.parts, self.weights)).encode())
        for row in self.rows:
            size = len(row.tokens).to_bytes(8, "little")
            digest.update(size + b"".join(part.tobytes() for part in row))
        return digest.hexdigest()


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    data: DataConfig,
    vocab_size: int | None = None,
) -> Encoded:
    """Tokenises examples of one task or a Mixture, prompt and target.

    A sequence longer than the longest of `data.bucket_lengths` is dropped. Its target is never cut,
    which would teach the model to stop in the middle, nor is a question; but a document is cut at
    its end, and a conversation behind its last answer that fits. Both numbers are logged.

    Args:
      examples: The examples.
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
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    pad_id = int((eos_id if pad_id is None else pad_id) or 0)
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
