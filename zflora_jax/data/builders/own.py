"""The user's own rows: instructions, questions, conversations, prompts with completions, or texts.

The columns of its first row tell the form of a file, if it is not given (data.row_format). A new
form is a reader and a line of FORMS.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.data.builders.files import Raw
from zflora_jax.data.builders.published import Format, Row, field, gsm8k, instruction

Turn = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# The names of ShareGPT and its followers.
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_SYSTEM = ("system", "system_prompt")  # columns that may hold the system turn
_MORE = (*_SYSTEM, "history", "context")  # columns that may hold a part of the prompt


class Form(NamedTuple):
    """A form of rows: the columns that tell it (the first is decisive), its reader, and the columns
    of a row for messages.
    """

    columns: tuple[str, ...]
    read: Callable[[Raw], list[Row]]
    expected: str


def read_own(rows: Iterable[tuple[str, Raw]], form: str = "") -> Iterator[Row]:
    """Reads (position, row) pairs of a form, a key of FORMS, or "" for that of the first row;
    ConfigError names the position of a malformed row.
    """
    require(not form or form in FORMS, f"data.row_format={form!r}: {nearest(form, FORMS)}.")
    for where, given in rows:
        row = {name: x for name, x in given.items() if x is not None}  # tables have every column
        form = form or form_of(row, where)
        (column, *_), read, expected = FORMS[form]
        require(
            column in row,
            f"{where}: nothing in column {column!r}, by which rows are of the form {form!r}; the"
            f" row has {', '.join(map(repr, row)) or 'nothing'}.",
        )
        [found] = Format(read, expected).rows(row, where)
        found |= {"form": form}
        for name, value in found.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except (TypeError, UnicodeEncodeError) as error:  # a date of Parquet, half a character
                raise ConfigError(f"{where}: {name} is no JSON in Unicode: {error}.") from error
        yield found


def form_of(row: Raw, where: str) -> str:
    """Returns the form of a row: the first in FORMS all of whose columns it has, or else the first
    that it has in part, whose reader says what is missing; ConfigError if there is none.
    """
    there = {column for column, value in row.items() if value is not None}
    found = [name for name, form in FORMS.items() if form.columns[0] in there]
    whole = [name for name in found if there.issuperset(FORMS[name].columns)]
    require(
        bool(found),
        f"{where}: the columns {', '.join(map(repr, row)) or 'of an empty row'} are of no form that"
        f" is known. Expected one of: {'; '.join(form.expected for form in FORMS.values())}.",
    )
    return (whole or found)[0]


def _text(row: Raw) -> list[Row]:
    _require_all_read(row)
    return _as_they_are("", field(row, "text"))


def _completion(row: Raw) -> list[Row]:
    given, answer = (_turns_if_any(row.get(name)) for name in ("prompt", "completion"))
    # If both are texts, they are read as texts, even if one of them is a list in JSON.
    if isinstance(given, list) and (isinstance(answer, list) or not isinstance(row["prompt"], str)):
        context = _turns(given, "prompt", answered=False) if given else []
        return _conversation([*context, *_turns(answer, "completion")], row, len(context))
    _require_all_read(row)
    return _as_they_are(field(row, "prompt"), field(row, "completion"))


def _as_they_are(prompt: str, target: str) -> list[Row]:
    require(bool(target.strip()), "the text to learn is empty.")
    return [{"prompt": prompt, "target": target, "plain": True, "unit": prompt or target}]


def _question(read: Callable[[Raw], list[Row]], row: Raw) -> list[Row]:
    _require_all_read(row)
    [found] = read(row)
    return [found | {"unit": "\n".join(filter(None, (found["prompt"], found["input"])))}]


def _require_all_read(row: Raw) -> None:
    """Refuses a row with a part of the prompt that its form does not read."""
    more = [name for name in _MORE if (x := _from_json(row.get(name))) and str(x).strip()]
    require(
        not more,
        f"this form would leave out {', '.join(map(repr, more))}. Put it into the prompt (of an"
        " instruction: 'input'), give the row as 'messages', or remove the column.",
    )


def _messages(column: str, row: Raw) -> list[Row]:
    return _conversation(_turns(_list(row[column]), column), row)


def _conversation(turns: list[Turn], row: Raw, context: int = 0) -> list[Row]:
    system = next((row[name] for name in _SYSTEM if row.get(name)), "")
    require(isinstance(system, str), f"a system column must be text; got {system!r:.80}.")
    if system.strip() and turns[0]["role"] != "system":
        turns, context = [{"role": "system", "content": system}, *turns], context + bool(context)
    elif system.strip() and turns[0]["content"] != system:
        raise ConfigError("a system turn and another text in a column: keep one of them.")
    tools, settings = _list(row.get("tools")), _from_json(row.get("chat_template_kwargs"))
    require(
        tools in (None, "", []) or (isinstance(tools, list) and all(map(_is_object, tools))),
        f"'tools' must be a list of JSON schemas of functions; got {tools!r:.80}.",
    )
    require(
        settings in (None, "") or _is_object(settings),
        f"'chat_template_kwargs' must be an object, got {settings!r:.80}.",
    )
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    found = {
        "prompt": asked[-1] if asked else "",
        "target": turns[last]["content"],
        # A hold-out keeps dialogues that begin alike together.
        "unit": "\n".join(turn["content"] for turn in turns[: first + 1]),
        "turns": turns,
        "tools": tools or [],
        "settings": settings or {},
        "context": context,
    }
    return [found]


def _turns(value: Any, column: str, *, answered: bool = True) -> list[Turn]:
    """Returns turns as chat templates read them: role, content, and other fields (tool_calls, ...).
    If `answered`, the assistant must have one.
    """
    require(
        isinstance(value, list),
        f"{column!r} must be a list of turns, got {type(value).__name__} {value!r:.80}.",
    )
    require(len(value) > 0, f"{column!r} is empty. Remove the row.")
    turns = [_turn(turn, f"{column!r}, turn {i}") for i, turn in enumerate(value, 1)]
    require(
        not answered or any(turn["role"] == "assistant" for turn in turns),
        f"{column!r} has no turn of the assistant, so there is nothing to learn. Remove the row.",
    )
    return turns


def _turn(value: Any, where: str) -> Turn:
    require(_is_object(value), f"{where}: expected an object, got {value!r:.80}.")
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
        content = "".join(_part(part, where) for part in content)
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


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if _is_object(part) else type(part).__name__
    require(
        kind == "text" and _is_object(part) and isinstance(part.get("text"), str),
        f"{where} has content of type {kind!r}; the models here read text alone.",
    )
    return part["text"]


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _from_json(value: Any) -> Any:
    """Returns the value of a JSON text, as CSV files hold objects; other values as they are."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _list(value: Any) -> Any:
    """Returns a list of objects, which CSV files hold as JSON and TFDS as a table of columns, or of
    one object; other values as they are.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        found = _from_json(value)
        objects = found if isinstance(found, list) else [found]
        return objects if all(map(_is_object, objects)) else value
    if _is_object(value):
        if not value or not all(isinstance(column, list) for column in value.values()):
            return [value]
        rows = zip(*value.values(), strict=False)
        return [dict(zip(value, cells, strict=True)) for cells in rows]
    return value


def _turns_if_any(value: Any) -> Any:
    """Returns `_list` of turns; other JSON in a text is a text."""
    found = _list(value)
    if isinstance(value, str) and isinstance(found, list):
        turns = ["role" in turn or {"from", "value"} <= turn.keys() for turn in found]
        return found if turns and all(turns) else value
    return found


_TURNS = 'a list of turns, such as {"role": "user", "content": "Hello"} (in CSV as JSON)'
FORMS: dict[str, Form] = {
    "messages": Form(("messages",), partial(_messages, "messages"), f"messages: {_TURNS}"),
    "conversations": Form(
        ("conversations",), partial(_messages, "conversations"), "conversations (ShareGPT)"
    ),
    "prompt-completion": Form(
        ("prompt", "completion"),
        _completion,
        "prompt and completion: two texts, or two lists of turns (an empty cell is no field)",
    ),
    "instruction": Form(
        ("instruction", "output"),
        partial(_question, instruction),
        "instruction, output and, if there are any, input and answer",
    ),
    "question": Form(
        ("question", "answer"), partial(_question, gsm8k), "question and answer (GSM8K)"
    ),
    "text": Form(("text",), _text, "text"),
}
