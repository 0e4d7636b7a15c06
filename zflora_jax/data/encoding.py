"""Examples to token ids: sequences to learn, prompts to answer, cuts to fit.

The tokenizer's chat template writes a conversation whole, with loss on the assistant's turns. The
template marks their tokens ({% generation %}); without marks they are those that each answer adds.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.data import prompts
from zflora_jax.data.mixture import Mixture
from zflora_jax.data.prompts import common_length, encode_prompt_texts
from zflora_jax.data.task import Example

log = logging.getLogger(__name__)

Pair = tuple[np.ndarray, np.ndarray]  # tokens [n] int32; mask [n] bool, True at learned tokens
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Texts that templates remove on purpose: SmolLM3's and Qwen3's switches, earlier thoughts.
_TAKEN_OUT = re.compile(r"/(?:no_)?think\b|<think>.*?</think>", re.DOTALL)
# Fields of turns that a model would write, in any spelling close to these. The text is checked
# separately, and other fields are metadata or references.
_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thoughts")
_UNWRITTEN = frozenset(("role", "content", "id", "tool_call_id"))

# --- sequences to learn ---------------------------------------------------------------------------


def encode_examples(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[Pair]:
    """Tokenises examples of any length, by prompt_style and date of `data`.

    Returns:
      (tokens [n] int32, mask [n] bool, True at learned tokens) for each: prompt, target and one
      `prompts.end_token`, or the conversation, whose turns before `context` are not learned. The
      mask refers to the token at the same position; the loss shifts by one.

    Raises:
      ConfigError: A conversation has another style than chat; or the template refuses it, leaves
        out a part, or, without marks, writes the turns before an answer in two ways.
    """
    rows = dict[int, Pair]()
    for plain in (False, True):
        at = [i for i, e in enumerate(examples) if e.plain == plain and not e.turns]
        pairs = _prompts_and_targets(tokenizer, [examples[i] for i in at], data) if at else []
        rows |= zip(at, pairs, strict=True)
    rows |= {i: _conversation(tokenizer, e, data) for i, e in enumerate(examples) if e.turns}
    return [rows[i] for i in range(len(examples))]


def _prompts_and_targets(
    tokenizer: Any, examples: Sequence[Example], data: DataConfig
) -> list[Pair]:
    """Tokenises prompts and targets separately. Plain ones are one text, as in TRL, because a
    tokenizer may write a space before a text; changed last tokens of the prompt are learned.
    """
    style = "plain" if examples[0].plain else data.prompt_style
    end = prompts.end_token(tokenizer, style)
    texts = [_prompt(e, tokenizer, data) for e in examples]
    given = encode_prompt_texts(tokenizer, texts)
    if style == "plain":
        targets = [e.target.removesuffix(tokenizer.eos_token) for e in examples]
        whole = [text + target for text, target in zip(texts, targets, strict=True)]
        rows = encode_prompt_texts(tokenizer, whole)
    else:
        ids = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
        rows = [prompt + target for prompt, target in zip(given, ids, strict=True)]
    starts = [common_length(prompt, row) for prompt, row in zip(given, rows, strict=True)]
    return [
        (np.asarray([*row, end], np.int32), np.arange(len(row) + 1) >= start)
        for row, start in zip(rows, starts, strict=True)
    ]


# --- conversations --------------------------------------------------------------------------------


def last_answer(example: Example) -> int:
    """Returns the index of the assistant's last turn in a conversation."""
    return max(i for i, turn in enumerate(example.turns) if turn["role"] == "assistant")


@contextlib.contextmanager
def _row_named(example: Example) -> Iterator[None]:
    """Puts the row's position before the messages of errors."""
    try:
        yield
    except ConfigError as error:
        where = example.where or f"the row {example.prompt or example.turns[0]['content']!r:.60}"
        raise ConfigError(f"{where}: {error}") from error


def _conversation(tokenizer: Any, example: Example, data: DataConfig) -> Pair:
    with _row_named(example):
        _require_all_written(tokenizer, example, data)
        marked = _MARKS.search(prompts.chat_template(tokenizer, example.tools))
        tokens, mask = (_by_marks if marked else _by_prefixes)(tokenizer, example, data)
    if prompts.added_tokens(tokenizer).isdisjoint(tokens[np.flatnonzero(mask)[-3:]].tolist()):
        _warn("ends with no token of its own, so a model does not learn to stop")
    return tokens, mask


@cache  # once in a process: there are thousands of batches
def _warn(problem: str) -> None:
    log.warning("chat template: the last answer of some conversations %s", problem)


def _written(
    tokenizer: Any, e: Example, data: DataConfig, count: int, answered: bool, **options: bool
) -> Any:
    """Writes the first `count` turns, and the header of an answer if not `answered`."""
    require(
        data.prompt_style == "chat",
        "conversations are written by the tokenizer's chat template:"
        f" data.prompt_style={data.prompt_style!r} must be 'chat'.",
    )
    prompts.require_settings(tokenizer, e.tools, e.settings)
    settings = {**e.settings, "add_generation_prompt": not answered, **options}
    return prompts.render_turns(tokenizer, e.turns[:count], data.date, e.tools, **settings)


def _require_all_written(tokenizer: Any, example: Example, data: DataConfig) -> None:
    """Raises ConfigError if the template leaves out a turn, a field of one, or the tools."""
    count, turns = len(example.turns), example.turns
    text = _written(tokenizer, example, data, count, True)
    # Another turn may contain the text of an omitted one, but not its mark.
    marks = [f" zflora-{i}-mark" if turn["content"].strip() else "" for i, turn in enumerate(turns)]
    marked = [
        {**turn, "content": turn["content"] + x} for turn, x in zip(turns, marks, strict=True)
    ]
    with_marks = _written(tokenizer, replace(example, turns=tuple(marked)), data, count, True)
    for i, turn in enumerate(turns):
        for part in map(str.strip, _TAKEN_OUT.split(turn["content"])):
            spellings = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
            require(
                any(spelling in text for spelling in spellings) and marks[i] in with_marks,
                f"the tokenizer's chat template leaves out or changes turn {i + 1}"
                f" ({turn['role']}): {part[:60]!r}. Use a template that writes it, or leave it out"
                " of the row (a system turn's text can stand at the start of the first user turn).",
            )
    without = {"the tools": (replace(example, tools=()), count)} if example.tools else {}
    for i, turn in enumerate(turns):
        for name in [x for x in turn if x not in _UNWRITTEN and turn[x] not in (None, "", [], {})]:
            if not difflib.get_close_matches(name, _SAID, 1, 0.75):  # metadata, such as ratings
                continue
            rest = {key: x for key, x in turn.items() if key != name}
            other = replace(example, turns=(*turns[:i], rest, *turns[i + 1 :]))
            if name == "tool_calls":
                without[f"the tool calls of turn {i + 1}"] = other, count
            else:  # templates may write only the last answer's thoughts
                without[f"{name!r} of turn {i + 1}"] = other, i + 1
    for what, (other, least) in without.items():
        require(
            any(_differ(tokenizer, example, other, data, n) for n in (count, least)),
            f"the tokenizer's chat template leaves out {what}. Use a template that writes it, or"
            " leave it out of the row.",
        )


def _differ(tokenizer: Any, a: Example, b: Example, data: DataConfig, count: int) -> bool:
    """Returns whether the template writes the first `count` turns of `a` and `b` differently."""
    text, other = "", None
    with contextlib.suppress(ConfigError):
        text = _written(tokenizer, a, data, count, True)
        other = _written(tokenizer, b, data, count, True)
    return text not in ("", other)


def _by_marks(tokenizer: Any, example: Example, data: DataConfig) -> Pair:
    """Masks by the template's marks."""
    require(
        tokenizer.is_fast,
        f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell which tokens a chat"
        " template marks. Save the model's tokenizer as tokenizer.json.",
    )
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = _written(tokenizer, example, data, len(example.turns), True, **options)
    (tokens,) = prompts.with_bos(tokenizer, [found["input_ids"]])
    added = len(tokens) - len(found["input_ids"])
    mask = np.pad(np.asarray(found["assistant_masks"], bool), (added, 0))
    last = last_answer(example)
    texts = [_written(tokenizer, example, data, i, False) for i in (example.context or last, last)]
    given, prompt = encode_prompt_texts(tokenizer, texts)
    if example.context:
        mask[: common_length(given, tokens)] = False
    require(
        bool(mask.any()),
        "the chat template marks none of its tokens as the assistant's: its generation marks are"
        " not around the answers.",
    )
    if common_length(prompt, tokens) < len(prompt):
        _warn("is marked behind other tokens than generation starts from")
    return np.asarray(tokens, np.int32), mask


def _by_prefixes(tokenizer: Any, example: Example, data: DataConfig) -> Pair:
    """Masks the tokens that each answer adds to the conversation before it."""
    answers = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
    answers = [i for i in answers if i >= example.context]
    require(
        answers[0] > 0,
        "it begins with a turn of the assistant, which answers nothing. Remove that turn, or"
        " put one of the user before it.",
    )
    parts = [part for i in answers for part in ((i, False), (i + 1, True))]
    texts = [_written(tokenizer, example, data, *x) for x in ((len(example.turns), True), *parts)]
    ids, *prefixes = encode_prompt_texts(tokenizer, texts)
    mask = np.zeros(len(ids), bool)
    for i, before, after in zip(answers, prefixes[::2], prefixes[1::2], strict=True):
        start = common_length(before, ids)
        if start < len(before):
            there, here = (tokenizer.decode(x[start : start + 12]) for x in (before, ids))
            raise ConfigError(
                f"before turn {i + 1} the template writes other tokens when the model has to answer"
                f" ({there!r}) than when the answer follows ({here!r}). Strip white space at the"
                " start of the answer, or use a template with {% generation %} marks."
            )
        # Some templates write parts of an answer only if it is the last one.
        goes_on = common_length(after, ids) == len(after)
        end = len(after) if goes_on else _end(tokenizer, example, i, ids, start)
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
        f"the end of turn {i + 1} cannot be found: the chat template writes it in another way when"
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
      examples: The examples. The prompt of a conversation is the text before its last answer.
      tokenizer, prompt_style, date: Arguments of `prompts.render`.

    Raises:
      ConfigError: An example has no prompt.
    """
    require(
        all(e.prompt or e.turns for e in examples),
        "a row has no prompt (its form is 'text', or its prompt is empty), so no answer can be"
        " generated to it; it only has a loss (eval.generate=False).",
    )
    data = DataConfig(prompt_style=prompt_style, date=date)  # type: ignore[arg-type]
    return encode_prompt_texts(tokenizer, [_prompt(e, tokenizer, data) for e in examples])


def _prompt(e: Example, tokenizer: Any, data: DataConfig) -> str:
    with _row_named(e):
        if e.turns:
            _require_all_written(tokenizer, e, data)
            return _written(tokenizer, e, data, last_answer(e), False)
        style = "plain" if e.plain else data.prompt_style
        return prompts.render(tokenizer, style, e.prompt, e.input, data.date)


def encode_options(
    example: Example, prompt: list[int], tokenizer: Any
) -> tuple[list[int], list[list[int]]]:
    """Tokenises the options of an example as training tokenises its target.

    Returns:
      (Token ids before all options, token ids of each option.) The first may be shorter than
      `prompt`, the ids of `encode_prompts`: a plain prompt and its option are one text, and prompt
      tokens that an option changes belong to the option.
    """
    if not example.plain:
        return prompt, tokenizer(list(example.options), add_special_tokens=False)["input_ids"]
    rows = encode_prompt_texts(tokenizer, [example.prompt + text for text in example.options])
    start = min(common_length(prompt, row) for row in rows)
    return prompt[:start], [row[start:] for row in rows]


# --- cuts to fit ----------------------------------------------------------------------------------


def cut_to_fit(example: Example, row: Pair, tokenizer: Any, data: DataConfig) -> Pair:
    """Cuts the end of a document, or a conversation after the last answer that fits, to
    max(data.bucket_lengths) tokens. Returns `row`, the pair of `encode_examples`, unchanged if it
    fits, has no part that may be cut, or nothing would be left.
    """
    (tokens, mask), limit = row, data.bucket_lengths[-1]
    if len(tokens) <= limit:
        return row
    if example.turns:
        ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
        end = max(ends[ends <= limit], default=None)
        return row if end is None else (tokens[:end], mask[:end])

    def encoded(e: Example) -> Pair:
        return encode_examples([e], tokenizer, data)[0]

    short = _shorten(example, tokenizer, limit, lambda e: len(encoded(e)[0]))
    return encoded(short) if short.document and short.input.strip() else row


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

    def length(e: Example) -> int:
        return len(encode_prompts([e], tokenizer, prompt_style, date)[0])

    return [_shorten(e, tokenizer, limit, length) for e in examples]


def _shorten(
    example: Example, tokenizer: Any, limit: int, length: Callable[[Example], int]
) -> Example:
    """Cuts a document until `length` is at most `limit`, or nothing is left."""
    while example.document and example.input and (excess := length(example) - limit) > 0:
        ids = tokenizer(example.input, add_special_tokens=False)["input_ids"]
        kept = tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=False)
        # A cut may fall inside a character, which decodes to U+FFFD.
        example = replace(example, input=kept.rstrip("\ufffd"))
    return example


# --- a dataset ------------------------------------------------------------------------------------

_CHUNK = 1000  # examples per tokenizer call


class TokenizedSequence(NamedTuple):
    """One training sequence, of one example or several packed ones."""

    tokens: np.ndarray  # int32 [n]
    loss_mask: np.ndarray  # bool [n], True where the token at that position is learned
    segments: np.ndarray  # int32 [n], the number of each token's example, from 1


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, in the order of their source."""

    rows: tuple[TokenizedSequence, ...]
    dropped: int  # examples that were too long
    pad_id: int  # the token id that fills short rows of a batch
    truncated: int = 0  # documents and conversations that were cut to fit
    parts: tuple[int, ...] = ()  # sequences of each task of a mixture, one task after the other
    weights: tuple[float, ...] | None = None  # draws of each task; None: by number of sequences

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
    pairs: bool = False,
) -> Encoded:
    """Tokenises examples of one task or a Mixture, prompt and target.

    A sequence longer than the longest of `data.bucket_lengths` is cut by `cut_to_fit` (a pair by
    `_pair`) or dropped, because a cut target would teach the model to stop in the middle. Both
    counts are logged.

    Args:
      examples: The examples.
      tokenizer: A Hugging Face tokenizer.
      data: Settings, of which bucket_lengths, prompt_style, train_on_prompt and date are read.
      vocab_size: Rows of the model's embedding; None: token ids are not checked.
      pairs: Whether a row is an example and its rejected one, for train.loss=dpo.

    Raises:
      ConfigError: There are no examples, all are too long, a token id has no embedding, or some
        are pairs or not, contrary to `pairs`.
    """
    require(
        len(examples) > 0,
        "the dataset is empty: there is nothing to tokenise. Check data.task and data.data_dir.",
    )
    rows, truncated = list[TokenizedSequence](), 0
    for start in range(0, len(examples), _CHUNK):
        chunk = list(examples[start : start + _CHUNK])
        for row, size in _sequences(chunk, tokenizer, data, pairs):
            rows.append(row)
            truncated += len(row.tokens) < size
    kept = [i for i, row in enumerate(rows) if len(row.tokens) <= data.bucket_lengths[-1]]
    _report_lengths([len(row.tokens) for row in rows], len(kept), truncated, data, pairs)
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


def _report_lengths(
    lengths: Sequence[int], kept: int, truncated: int, data: DataConfig, pairs: bool
) -> None:
    """Logs how many examples were dropped and cut; ConfigError if none is left."""
    limit, longest, count = data.bucket_lengths[-1], max(lengths), len(lengths)
    more = [*data.bucket_lengths, -(-longest // 64) * 64]
    require(
        kept > 0,
        f"all {count} examples are longer than data.bucket_lengths={more[:-1]}: they have"
        f" {min(lengths)} to {longest} tokens. Add a length, e.g. data.bucket_lengths={more}.",
    )
    if kept < count:
        log.warning(
            f"dropped {count - kept} of {count} examples longer than {limit} tokens (the longest"
            f" has {longest}); see data.bucket_lengths"
        )
    if truncated:
        what = "pairs to {} tokens in all, at the ends of long answers"
        what = what if pairs else "documents or conversations to {} tokens, answers whole"
        log.warning(f"cut {truncated} of {count} {what.format(limit)}; see data.bucket_lengths")


def _sequences(
    examples: Sequence[Example], tokenizer: Any, data: DataConfig, pairs: bool
) -> Iterator[tuple[TokenizedSequence, int]]:
    """Yields the sequence of each example, cut to fit, and the number of its tokens before that."""
    _require_pairs(examples, pairs)
    if pairs:
        worse = [replace(e.rejected, where=e.where) for e in examples if e.rejected]
        encoded = encode_examples([*examples, *worse], tokenizer, data)
        half = len(examples)
        for chosen, rejected in zip(encoded[:half], encoded[half:], strict=True):
            row = _pair(chosen, rejected, data.bucket_lengths[-1])
            yield row, len(chosen[0]) + len(rejected[0])
        return
    for example, whole in zip(examples, encode_examples(examples, tokenizer, data), strict=True):
        tokens, mask = cut_to_fit(example, whole, tokenizer, data)
        segments = np.ones(len(tokens), np.int32)
        yield TokenizedSequence(tokens, mask | data.train_on_prompt, segments), len(whole[0])


def _require_pairs(examples: Sequence[Example], pairs: bool) -> None:
    """Raises ConfigError for examples that are no pairs if `pairs`, and for pairs if not."""
    wrong = next((e for e in examples if pairs != (e.rejected is not None)), None)
    if wrong is not None:
        with _row_named(wrong):
            require(
                not pairs,
                "train.loss=dpo needs pairs, and this row has no 'rejected' answer. Use rows of"
                " 'prompt', 'chosen' and 'rejected' (data.task=rows), or train.loss=cross_entropy.",
            )
            raise ConfigError(
                "it is a pair of answers: train.loss=dpo learns from those. To learn only the"
                " chosen one, give 'prompt' and 'completion'; to score answers set eval.loss=False."
            )


def _pair(chosen: Pair, rejected: Pair, limit: int) -> TokenizedSequence:
    """Joins two answers to one prompt: segment 1 is the chosen one, 2 the rejected one.

    As in TRL, both are learned from the first token in which one differs from the prompt. The end
    of the longer one, or of both, is cut to `limit` tokens in all. A pair is returned whole if the
    cut would remove all learned tokens of one, or all tokens in which they differ.
    """
    pair = chosen, rejected
    shorter, longer = sorted(len(tokens) for tokens, _ in pair)
    room = max(limit // 2, limit - shorter) if shorter + longer > limit else longer
    start = min(int(np.argmax(mask)) for _, mask in pair)
    parts: list[tuple[np.ndarray, ...]] = []
    for number, (tokens, mask) in enumerate(pair, 1):
        at = np.arange(len(tokens))
        learned = mask | ((start <= at) & (at < np.argmax(mask)))
        parts.append((tokens, learned & (at > 0), np.full(len(tokens), number, np.int32)))
    cut = [tuple(x[:room] for x in part) for part in parts]
    if start < room and not np.array_equal(cut[0][0], cut[1][0]):
        parts = cut
    return TokenizedSequence(*map(np.concatenate, zip(*parts, strict=True)))
