"""Rows of one's own: instructions, questions, conversations, prompts with completions, or texts.

The form of a file is recognised by the columns of its first row, or named (data.row_format). A new
form is one more reader and a line of `FORMS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.data.builders.files import FileBuilder, field, table_rows
from zflora_jax.data.builders.formats import local_row

Row = dict[str, str]
Turn = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names, and those that its followers added
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_MESSAGES = 'a list of turns, such as {"role": "user", "content": "Hello"}'


class Form(NamedTuple):
    """One form of rows.

    Attributes:
      column: by which it is recognised.
      read: (row, where) -> its texts, of `Rows.FIELDS`; ConfigError where it is malformed.
    """

    column: str
    read: Callable[[Mapping[str, Any], str], Row]


def _messages(row: Mapping[str, Any], where: str) -> Row:
    return _conversation(turns_of(_listed(row["messages"]), where, "messages"), row)


def _sharegpt(row: Mapping[str, Any], where: str) -> Row:
    turns = turns_of(_listed(row["conversations"]), where, "conversations")
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": system}, *turns]
    return _conversation(turns, row)


def _completion(row: Mapping[str, Any], where: str) -> Row:
    prompt, completion = (_listed(row.get(name)) for name in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = turns_of(prompt, where, "prompt", answered=False) if prompt else []
        after = turns_of(completion, where, "completion")
        return _conversation([*before, *after], row, len(before))
    expected = "prompt and completion: two texts, or two lists of turns"
    texts = [field(row, name, where, expected) for name in ("prompt", "completion")]
    require(bool(texts[1].strip()), f"{where}: the completion is empty: there is nothing to learn.")
    return {"instruction": texts[0], "output": texts[1], "unit": texts[0] or texts[1]}


def _text(row: Mapping[str, Any], where: str) -> Row:
    text = field(row, "text", where, "text")
    require(bool(text.strip()), f"{where}: the text is empty: there is nothing to learn.")
    return {"output": text, "unit": text}


def _local(row: Mapping[str, Any], where: str) -> Row:
    found = local_row(row, where)
    return found | {"unit": "\n".join(filter(None, (found["instruction"], found["input"])))}


FORMS: dict[str, Form] = {
    "messages": Form("messages", _messages),
    "conversations": Form("conversations", _sharegpt),
    "prompt-completion": Form("prompt", _completion),
    "instruction": Form("instruction", _local),
    "question": Form("question", _local),
    "text": Form("text", _text),
}
_KNOWN = (
    "messages; conversations (ShareGPT); prompt and completion; instruction, output and, if there"
    " are any, input and answer; question and answer (GSM8K); text"
)


def form_of(row: Mapping[str, Any], where: str) -> str:
    """The key in `FORMS` of a row, by its columns.

    Raises:
      ConfigError: no form has them.
    """
    for name, form in FORMS.items():
        if row.get(form.column) is not None:
            return name
    raise ConfigError(
        f"{where}: the columns {', '.join(map(repr, row)) or 'of an empty row'} are of no form"
        f" that is known. Expected the columns of one of: {_KNOWN}."
    )


def read_form(rows: Iterable[tuple[str, Mapping[str, Any]]], form: str = "") -> Iterator[Row]:
    """Rows of any form as texts.

    Args:
      rows: (position for messages, row) of each.
      form: a key of `FORMS`; "" for what the first row has.

    Yields:
      `Rows.FIELDS` of each.

    Raises:
      ConfigError: an unknown form, or a malformed row.
    """
    require(not form or form in FORMS, f"data.row_format={form!r}: {nearest(form, FORMS)}.")
    for where, row in rows:
        form = form or form_of(row, where)
        column = FORMS[form].column
        require(
            row.get(column) is not None,
            f"{where}: no column {column!r}, by which rows are of the form {form!r}; the row has"
            f" {', '.join(map(repr, row)) or 'none'}.",
        )
        empty = dict.fromkeys(Rows.FIELDS, "")
        yield empty | FORMS[form].read(row, where) | {"form": form}


def turns_of(value: Any, where: str, column: str, *, answered: bool = True) -> list[Turn]:
    """The turns of a conversation as chat templates read them.

    Args:
      value: of the column: a list of {"role", "content"}, or of ShareGPT's {"from", "value"}.
      where: the position of the row, for messages.
      column: its name, for messages.
      answered: whether a turn of the assistant is asked for.

    Returns:
      Role, content and what else each turn has (tool_calls, reasoning_content, name, ...).

    Raises:
      ConfigError: no turns, a malformed one, an unknown role, or nothing that an assistant says.
    """
    require(
        isinstance(value, list),
        f"{where}: {column!r} must be {_MESSAGES}; got {type(value).__name__} {value!r:.80}.",
    )
    require(
        len(value) > 0,
        f"{where}: {column!r} is empty: a conversation needs a turn of the user and one of the"
        " assistant. Remove the row.",
    )
    turns = [_turn(turn, f"{where}: {column!r}, turn {i}") for i, turn in enumerate(value, 1)]
    require(
        not answered or any(turn["role"] == "assistant" for turn in turns),
        f"{where}: {column!r} has no turn of the assistant, so there is nothing to learn. Remove"
        " the row.",
    )
    return turns


def _turn(value: Any, where: str) -> Turn:
    require(isinstance(value, Mapping), f"{where}: expected an object, got {value!r:.80}.")
    given = {name: x for name, x in value.items() if x is not None}  # Arrow fills up with None
    role = given.pop("role", given.pop("from", None))
    require(
        isinstance(role, str),
        f"{where} has no role: expected 'role' (or 'from'), got {', '.join(map(repr, given))}.",
    )
    known = _SHAREGPT.get(role, role)
    allowed = [*ROLES, *_SHAREGPT]
    require(known in ROLES, f"{where}: unknown role {role!r}: {nearest(role, allowed)}.")
    content = given.pop("content", given.pop("value", None))
    if isinstance(content, list):
        content = _joined(content, where)
    if content is None and known == "assistant" and given.get("tool_calls"):
        content = ""
    require(
        isinstance(content, str),
        f"{where} has no text: expected a string in 'content' (or 'value'), got {content!r:.80}.",
    )
    return {"role": known, "content": content, **given}


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content that is given in parts."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        require(
            isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str),
            f"{where} has content of type {kind!r}; the models here read text alone.",
        )
    return "".join(part["text"] for part in parts)


def _conversation(turns: list[Turn], row: Mapping[str, Any], context: int = 0) -> Row:
    tools = _listed(row.get("tools"))
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
    return {
        "instruction": asked[-1] if asked else "",
        "output": turns[last]["content"],
        "unit": "\n".join(asked) or turns[0]["content"],
        "messages": json.dumps(turns, ensure_ascii=False),
        "tools": json.dumps(tools, ensure_ascii=False) if tools else "",
        "context": str(context),
    }


def _listed(value: Any) -> Any:
    """A column of lists, which CSV files hold as JSON, and TFDS as a table of columns."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, Mapping):
        columns = [list(column) for column in value.values()]
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return value


class Rows(FileBuilder):
    """Rows of one's own, of any of `FORMS`."""

    # messages and tools: JSON. context: turns that are given, not learned. form: of `FORMS`.
    FIELDS = (
        "instruction",
        "input",
        "output",
        "answer",
        "messages",
        "tools",
        "context",
        "form",
        "unit",
    )

    def rows(self) -> Iterable[Mapping[str, Any]]:
        return read_form(table_rows(self.builder_config.path), self.builder_config.form)
