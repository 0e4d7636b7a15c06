"""The user's rows: instructions, questions, conversations, prompts with completions, texts, or
pairs of answers.

The columns of a file's first row decide its form, unless data.row_format gives it. A new form is a
reader and a line of FORMS.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from zflora_jax.core.fields import require, require_in
from zflora_jax.data.builders.files import Raw
from zflora_jax.data.builders.published import FORMATS, Format, Row, field, gsm8k, instruction
from zflora_jax.data.prompts import common_length

Turn = dict[str, Any]

# The names of ShareGPT and its followers.
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_SHAREGPT |= dict.fromkeys(("function", "function_response", "observation"), "tool")
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | _SHAREGPT
_SYSTEM = ("system", "system_prompt")  # columns that may hold the system turn
_RESULT = re.compile(r"^####[ \t]*[-+]?[$€£]?\d[\d,]*(?:\.\d+)?%?\s*\Z", re.MULTILINE)
_MORE = (*_SYSTEM, "history", "context")  # columns that may hold a part of the prompt


def read_rows(rows: Iterable[tuple[str, Raw]], format: str = "") -> Iterator[Row]:
    """Reads (position, row) pairs as rows of a task.

    Args:
      rows: The rows of a file or dataset, each with its position for messages.
      format: A key of FORMATS or, for the user's rows, of FORMS; "" for the form of the first
        row.

    Raises:
      ConfigError: A row is malformed; the message names its position. None is ever skipped.
    """
    for where, given in rows:
        row = {name: x for name, x in given.items() if x is not None}  # tables have every column
        format = format or form_of(row, where)
        form = {"form": format} if format in FORMS else {}
        yield from (found | form for found in (FORMATS | FORMS)[format].rows(row, where))


def form_of(row: Raw, where: str) -> str:
    """Returns the form of a row: the first in FORMS all of whose columns it has, or else the first
    of which it has some, whose reader reports the missing ones; ConfigError if there is none.
    """
    there = {column for column, value in row.items() if value is not None}
    found = [name for name, form in FORMS.items() if form.columns[0] in there]
    whole = [name for name in found if there.issuperset(FORMS[name].columns)]
    require(
        bool(found),
        f"{where}: the columns {', '.join(map(repr, row)) or 'of an empty row'} fit no known form."
        f" Expected one of: {'; '.join(form.fields for form in FORMS.values())}.",
    )
    return (whole or found)[0]


def _text(row: Raw) -> list[Row]:
    _require_all_read(row)
    return _as_they_are("", field(row, "text"))


def _completion(row: Raw) -> list[Row]:
    prompt, completion = row["prompt"], row["completion"]
    turns = [_from_json(prompt), _from_json(completion)]
    if all(map(_is_turns, turns)):
        prompt, completion = turns
    if isinstance(prompt, str):
        _require_all_read(row)
        return _as_they_are(prompt, field(row, "completion"))
    context = _turns(prompt, "prompt") if prompt else []
    return _conversation([*context, *_turns(completion, "completion")], row, len(context))


def _preference(row: Raw) -> list[Row]:
    """Reads a pair of answers in TRL's forms: the prompt may be their common beginning."""
    pair = [_from_json(row[name]) for name in ("chosen", "rejected")]
    require(pair[0] != pair[1], "the chosen and the rejected answer are the same. Remove the row.")
    rows, single = (_pair_of_turns if all(map(_is_turns, pair)) else _pair_of_texts)(row)
    options = [answer["target"] for answer in rows] if single else []  # scored by likelihood
    return [{**rows[0], "rejected": rows[1], "options": options}]


def _pair_of_turns(row: Raw) -> tuple[list[Row], bool]:
    """Returns both answers with their prompt, and whether each is a single turn."""
    pair = [_turns(_from_json(row[name]), name) for name in ("chosen", "rejected")]
    prompt = _from_json(row.get("prompt") or "")
    context = _turns(prompt, "prompt") if _is_turns(prompt) else []
    if not context:
        shared = _shared(*pair)
        context, pair = pair[0][:shared], [turns[shared:] for turns in pair]
        require(
            prompt == "" or any(turn["content"] == row["prompt"] for turn in context),
            "'prompt' differs from the turns before the answers. Make it a list of turns,"
            " or remove it.",
        )
    require(
        bool(context) and all(turns[0]["role"] == "assistant" for turns in pair),
        "the chosen and the rejected answer have different prompts, or none: both must continue"
        " the same turns with one of the assistant.",
    )
    rows = [_conversation([*context, *turns], row, len(context))[0] for turns in pair]
    return rows, {len(turns) for turns in pair} == {1}


def _pair_of_texts(row: Raw) -> tuple[list[Row], bool]:
    """`_pair_of_turns` for two texts."""
    _require_all_read(row)
    pair = [field(row, "chosen"), field(row, "rejected")]
    prompt = field(row, "prompt") if row.get("prompt") else ""
    if not prompt:  # as TRL: a space before the difference belongs to the answers
        shared = _shared(*pair)
        differ = pair[0][shared] != pair[1][shared]
        shared -= shared > 0 and differ and pair[0][shared - 1] == " "
        prompt, pair = pair[0][:shared], [text[shared:] for text in pair]
    return [_as_they_are(prompt, text)[0] for text in pair], True


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns the length of the common prefix, less than that of either."""
    return min(common_length(a, b), len(a) - 1, len(b) - 1)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _is_object(value[0]) and "role" in value[0]


def _as_they_are(prompt: str, target: str) -> list[Row]:
    require(bool(target.strip()), "the text to learn is empty.")
    return [{"prompt": prompt, "target": target, "plain": True, "unit": prompt or target}]


def _question(read: Callable[[Raw], list[Row]], row: Raw) -> list[Row]:
    _require_all_read(row)
    [found] = read(row)
    return [found | {"unit": "\n".join(filter(None, (found["prompt"], found["input"])))}]


def _asked(row: Raw) -> list[Row]:
    """Reads question and answer: GSM8K's if the answer's last line is "#### N", else a text."""
    require(bool(field(row, "answer").strip()), "'answer' is empty, so there is nothing to learn.")
    if _RESULT.search(row["answer"]):
        return gsm8k(row)
    return instruction({**row, "instruction": field(row, "question"), "output": row["answer"]})


def _require_all_read(row: Raw) -> None:
    more = [name for name in _MORE if str(row.get(name) or "").strip() not in ("", "[]", "{}")]
    require(
        not more,
        f"this form would leave out {', '.join(map(repr, more))}. Put it into the prompt (of an"
        " instruction: 'input'), give the row as 'messages', or remove the column.",
    )


def _messages(column: str, row: Raw) -> list[Row]:
    return _conversation(_turns(_from_json(row[column]), column), row)


def _conversation(turns: list[Turn], row: Raw, context: int = 0) -> list[Row]:
    roles = [turn["role"] for turn in turns]
    require(
        "assistant" in roles[context:],
        "there is no turn of the assistant, so there is nothing to learn. Remove the row.",
    )
    system = next((row[name] for name in _SYSTEM if row.get(name)), "")
    require(isinstance(system, str), f"a system column must be text; got {system!r:.80}.")
    if system.strip() and roles[0] != "system":
        turns, context = [{"role": "system", "content": system}, *turns], context + bool(context)
        roles = ["system", *roles]
    require(
        not system.strip() or turns[0]["content"] == system,
        "a system turn and another text in a column: keep one of them.",
    )
    tools, settings = (_from_json(row.get(x)) for x in ("tools", "chat_template_kwargs"))
    require(
        not tools or (isinstance(tools, list) and all(map(_is_object, tools))),
        f"'tools' must be a list of JSON schemas of functions; got {tools!r:.80}.",
    )
    require(
        not settings or _is_object(settings),
        f"'chat_template_kwargs' must be an object, got {settings!r:.80}.",
    )
    last = len(roles) - 1 - roles[::-1].index("assistant")
    users = [i for i, role in enumerate(roles) if role == "user"]
    asked = [turns[i]["content"] for i in users if i < last]
    found = {
        "prompt": asked[-1] if asked else "",
        "target": turns[last]["content"],
        # A hold-out keeps dialogues with the same beginning together.
        "unit": "\n".join(turn["content"] for turn in turns[: [*users, 0][0] + 1]),
        "turns": turns,
        "tools": tools or [],
        # Tables have null for keys that only other rows have.
        "settings": {name: x for name, x in (settings or {}).items() if x is not None},
        "context": context,
    }
    return [found]


def _turns(value: Any, column: str) -> list[Turn]:
    """Returns turns in the form of chat templates."""
    if _is_object(value) and all(isinstance(x, list) for x in value.values()):
        # A table of columns, as TFDS and the hub may have them.
        sizes = {name: len(cells) for name, cells in value.items()}
        require(
            len(set(sizes.values())) < 2,
            f"{column!r} is a table whose columns have different lengths:"
            f" {', '.join(f'{name} {size}' for name, size in sizes.items())}. Every turn needs all"
            " of them.",
        )
        value = [
            dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)
        ]
    require(
        isinstance(value, list),
        f"{column!r} must be a list of turns, got {type(value).__name__} {value!r:.80}.",
    )
    require(len(value) > 0, f"{column!r} is empty. Remove the row.")
    return [_turn(turn, f"{column!r}, turn {i}") for i, turn in enumerate(value, 1)]


def _turn(value: Any, where: str) -> Turn:
    require(_is_object(value), f"{where}: expected an object, got {value!r:.80}.")
    given = {name: x for name, x in value.items() if x is not None}  # Arrow fills up with None
    name = given.pop("role", given.pop("from", None))
    require(
        isinstance(name, str),
        f"{where} has no role: expected 'role' (or 'from'), got {', '.join(map(repr, given))}.",
    )
    hint = " Calls of functions are 'tool_calls' of the assistant."
    require_in(_ROLES, name, f"{where}: unknown role {name!r}", hint)
    require(
        given.pop("weight", 1) == 1,
        f"{where} has a weight other than 1: put the turns not to learn into 'prompt', and the"
        " rest into 'completion'.",
    )
    role, content = _ROLES[name], given.pop("content", given.pop("value", None))
    if isinstance(content, list):
        parts = [x.get("text") if _is_object(x) and x.get("type") == "text" else x for x in content]
        wrong = next((x for x in parts if not isinstance(x, str)), "")
        require(wrong == "", f"{where}: {wrong!r:.80} is no text, and models here read only text.")
        content = "".join(parts)
    calls = role == "assistant" and bool(given.get("tool_calls"))
    content = "" if content is None and calls else content
    require(
        isinstance(content, str),
        f"{where} has no text: expected a string in 'content' (or 'value'), got {content!r:.80}.",
    )
    require(
        role != "assistant" or calls or bool(content.strip()),
        f"{where} is an empty answer: the model would learn to say nothing. Remove it.",
    )
    return {"role": role, "content": content, **given}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _from_json(value: Any) -> Any:
    """Returns the value of a JSON text, as CSV files hold objects; other values as they are."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


_TURNS = 'a list of turns, such as {"role": "user", "content": "Hello"} (in CSV as JSON)'
FORMS = {
    "preference": Format(
        _preference,
        "chosen and rejected: two texts, or two lists of turns, and their prompt, if it is not the"
        " common beginning",
        ("chosen", "rejected"),
    ),
    "messages": Format(partial(_messages, "messages"), f"messages: {_TURNS}", ("messages",)),
    "conversations": Format(
        partial(_messages, "conversations"), "conversations (ShareGPT)", ("conversations",)
    ),
    "prompt-completion": Format(
        _completion,
        "prompt and completion: two texts, or two lists of turns (an empty cell is no field)",
        ("prompt", "completion"),
    ),
    "instruction": Format(
        partial(_question, instruction),
        "instruction, output and, if there are any, input and answer",
        ("instruction", "output"),
    ),
    "question": Format(
        partial(_question, _asked),
        "question and answer (any text, or GSM8K's, which ends with '#### N')",
        ("question", "answer"),
    ),
    "text": Format(_text, "text", ("text",)),
}
