"""Rows of one's own: instructions, questions, conversations, prompts with completions, or texts.

The form of a file is recognised by the columns of its first row, or named (data.row_format). A new
form is one more reader and a line of `FORMS`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.data.builders.files import FileBuilder, field, table_rows
from zflora_jax.data.builders.formats import local_row

Row = dict[str, str]
Turn = dict[str, Any]
Raw = Mapping[str, Any]

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
_MESSAGES = 'a list of turns, such as {"role": "user", "content": "Hello"} (in CSV as JSON)'
_SYSTEM = ("system", "system_prompt")  # columns of a system turn beside the turns
_BESIDE = (*_SYSTEM, "history", "context")  # what a prompt may be in, besides its own column


class Form(NamedTuple):
    """One form of rows.

    Attributes:
      column: by which it is recognised.
      read: (row, where) -> its texts, of `Rows.FIELDS`; ConfigError where it is malformed.
      beside: a column that it has, too; "" for a form of one column.
    """

    column: str
    read: Callable[[Raw, str], Row]
    beside: str = ""


def _turns(column: str) -> Callable[[Raw, str], Row]:
    def read(row: Raw, where: str) -> Row:
        return _conversation(turns_of(listed(row[column]), where, column), row, where)

    return read


def _completion(row: Raw, where: str) -> Row:
    prompt, completion = (row.get(name) for name in ("prompt", "completion"))
    before, after = _said(prompt), _said(completion)
    # Texts, if both are: one may well be a list as text.
    if isinstance(before, list) and (isinstance(after, list) or not isinstance(prompt, str)):
        given = turns_of(before, where, "prompt", answered=False) if before else []
        said = turns_of(after, where, "completion")
        return _conversation([*given, *said], row, where, len(given))
    expected = (
        "prompt and completion: two texts, or two lists of turns; an empty cell of a table is no"
        " field"
    )
    _require_read(row, where, "prompt and completion")
    texts = [field(row, name, where, expected) for name in ("prompt", "completion")]
    require(bool(texts[1].strip()), f"{where}: the completion is empty: there is nothing to learn.")
    return {"instruction": texts[0], "output": texts[1], "unit": texts[0] or texts[1]}


def _said(value: Any) -> Any:
    """`listed`, of turns alone: other JSON that a text holds is a text."""
    found = listed(value)
    if isinstance(value, str) and isinstance(found, list):
        turns = ["role" in turn or {"from", "value"} <= turn.keys() for turn in found]
        return found if turns and all(turns) else value
    return found


def _text(row: Raw, where: str) -> Row:
    _require_read(row, where, "the form 'text'")
    text = field(row, "text", where, "text")
    require(bool(text.strip()), f"{where}: the text is empty: there is nothing to learn.")
    return {"output": text, "unit": text}


def _local(*columns: str) -> Callable[[Raw, str], Row]:
    def read(row: Raw, where: str) -> Row:
        _require_read(row, where, f"the form {columns[0]!r}")
        of_form = {name: x for name, x in row.items() if name in columns}
        found = local_row(of_form, where, published=False)
        return found | {"unit": "\n".join(filter(None, (found["instruction"], found["input"])))}

    return read


def _require_read(row: Raw, where: str, form: str) -> None:
    """Refuse a row with a part of the prompt that its form does not read."""
    more = [name for name in _BESIDE if (x := _object(row.get(name))) and str(x).strip()]
    require(
        not more,
        f"{where}: {form} would leave out {', '.join(map(repr, more))}. Put it into the prompt (of"
        " an instruction: 'input'), give the row as 'messages', or remove the column.",
    )


FORMS: dict[str, Form] = {
    "messages": Form("messages", _turns("messages")),
    "conversations": Form("conversations", _turns("conversations")),
    "prompt-completion": Form("prompt", _completion, "completion"),
    "instruction": Form(
        "instruction", _local("instruction", "input", "output", "answer"), "output"
    ),
    "question": Form("question", _local("question", "answer"), "answer"),
    "text": Form("text", _text),
}
_KNOWN = (
    "messages; conversations (ShareGPT); prompt and completion; instruction, output and, if there"
    " are any, input and answer; question and answer (GSM8K); text"
)


def form_of(row: Raw, where: str) -> str:
    """The key in `FORMS` of a row, by its columns: the first form that it has whole, or else the
    first that it has in part, whose reader says what is missing.

    Raises:
      ConfigError: no form has them.
    """
    there = {column for column, value in row.items() if value is not None}
    found = [name for name, form in FORMS.items() if form.column in there]
    whole = [name for name in found if FORMS[name].beside in ("", *there)]
    if found:
        return (whole or found)[0]
    raise ConfigError(
        f"{where}: the columns {', '.join(map(repr, row)) or 'of an empty row'} are of no form"
        f" that is known. Expected the columns of one of: {_KNOWN}."
    )


def read_form(rows: Iterable[tuple[str, Raw]], form: str = "") -> Iterator[Row]:
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
    for where, given in rows:
        row = {name: x for name, x in given.items() if x is not None}  # tables have every column
        form = form or form_of(row, where)
        column = FORMS[form].column
        require(
            column in row,
            f"{where}: nothing in column {column!r}, by which rows are of the form {form!r}; the"
            f" row has {', '.join(map(repr, row)) or 'nothing'}.",
        )
        found = dict.fromkeys(Rows.FIELDS, "") | FORMS[form].read(row, where) | {"form": form}
        for name, text in found.items():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{where}: {name} is no Unicode text: {error}.") from error
        yield found


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
    require(
        role != "function_call",
        f"{where}: role 'function_call' is not read: give the call as a turn of the assistant with"
        " 'tool_calls'.",
    )
    allowed = [*ROLES, *_SHAREGPT]
    require(known in ROLES, f"{where}: unknown role {role!r}: {nearest(role, allowed)}.")
    require(
        given.pop("weight", 1) == 1,
        f"{where} has a weight other than 1, which is not read: put what is not to be learned into"
        " 'prompt', and the rest into 'completion'.",
    )
    content = given.pop("content", given.pop("value", None))
    if isinstance(content, list):
        content = _joined(content, where)
    calls = known == "assistant" and bool(given.get("tool_calls"))
    content = "" if content is None and calls else content
    require(
        isinstance(content, str),
        f"{where} has no text: expected a string in 'content' (or 'value'), got {content!r:.80}.",
    )
    require(
        known != "assistant" or calls or bool(content.strip()),
        f"{where} is an empty answer: the model would learn to say nothing. Remove it.",
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


def _conversation(turns: list[Turn], row: Raw, where: str, context: int = 0) -> Row:
    system = next((row[name] for name in _SYSTEM if row.get(name)), "")
    require(isinstance(system, str), f"{where}: a system column must be text; got {system!r:.80}.")
    if system.strip() and turns[0]["role"] != "system":
        turns, context = [{"role": "system", "content": system}, *turns], context + bool(context)
    elif system.strip() and turns[0]["content"] != system:
        raise ConfigError(f"{where}: a system turn and another text in a column: keep one of them.")
    tools, settings = listed(row.get("tools")), _object(row.get("chat_template_kwargs"))
    require(
        tools in (None, "", []) or (isinstance(tools, list) and all(map(_is_table, tools))),
        f"{where}: 'tools' must be a list of JSON schemas of functions; got {tools!r:.80}.",
    )
    require(
        settings in (None, "") or _is_table(settings),
        f"{where}: 'chat_template_kwargs' must be an object, got {settings!r:.80}.",
    )
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    try:
        return {
            "instruction": asked[-1] if asked else "",
            "output": turns[last]["content"],
            # Dialogues that begin alike are kept on one side of a hold-out.
            "unit": "\n".join(turn["content"] for turn in turns[: first + 1]),
            "messages": json.dumps(turns, ensure_ascii=False),
            "tools": json.dumps(tools, ensure_ascii=False) if tools else "",
            "settings": json.dumps(settings, ensure_ascii=False) if settings else "",
            "context": str(context),
        }
    except TypeError as error:  # a date of a Parquet file
        raise ConfigError(f"{where}: a turn holds what JSON has no form for: {error}.") from error


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _object(value: Any) -> Any:
    """A column of objects, which CSV files hold as JSON; other values stay as they are."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def listed(value: Any) -> Any:
    """A column of lists of objects, which CSV files hold as JSON, and TFDS as a table of columns;
    one object becomes a list of it, and other values stay as they are.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        objects = found if isinstance(found, list) else [found]
        return objects if all(map(_is_table, objects)) else value
    if _is_table(value):
        if not value or not all(isinstance(column, list) for column in value.values()):
            return [value]
        rows = zip(*value.values(), strict=False)
        return [dict(zip(value, cells, strict=True)) for cells in rows]
    return value


class Rows(FileBuilder):
    """Rows of one's own, of any of `FORMS`."""

    # messages, tools, settings (of the template): JSON. context: turns that are given, not learned.
    FIELDS = (
        "instruction",
        "input",
        "output",
        "answer",
        "messages",
        "tools",
        "settings",
        "context",
        "form",
        "unit",
    )

    def rows(self) -> Iterable[Mapping[str, Any]]:
        return read_form(table_rows(self.builder_config.path), self.builder_config.form)
