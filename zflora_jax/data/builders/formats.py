"""A TFDS builder for each format of a task's files: rows as published in, rows of one form out.

`read` of a builder gives every row as instruction, input, output and answer, or the FIELDS that the
builder lists. A new format is one more builder and a line of `BUILDERS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import wording
from zflora_jax.data.builders.files import FileBuilder, field, json_rows

# --- local_json -----------------------------------------------------------------------------------

_LOCAL_FIELDS = (
    "instruction, output and, if there are any, input and answer (LLM-Adapters), "
    "or question, answer (GSM8K)"
)
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks: 48/2 = <<48/2=24>>24
_MARKER = re.compile(r"\s*(?:A:\s*)?")  # LLM-Adapters outputs start "\nA: "


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Read LLM-Adapters' rows, GSM8K's, or rows of your own.

    LLM-Adapters (instruction, input, output, answer; `input` may be absent): leading whitespace and
    an "A:" marker are cut from the output, and an empty output becomes "The answer is {answer}.".
    Rows without `answer` (your own): the output is stripped, and the answer is "", so a generated
    answer is compared with nothing. GSM8K (question, answer ending "#### N"): see `gsm8k_row`.

    Args:
      path: of a JSON or JSONL file.

    Returns:
      {instruction, input, output, answer} of each row, all strings.

    Raises:
      ConfigError: the file is not JSON, has no rows, or has a malformed row. A bad row is never
        skipped: the message names the file and the row, counted from 1 (in JSONL by line, blank
        lines included).
    """
    return [local_row(row, where) for where, row in json_rows(path)]


def gsm8k_row(question: str, answer: str, where: str) -> dict[str, str]:
    """Convert a GSM8K row: calculator annotations are cut, the last line becomes "The answer is
    N.", and N loses its thousands commas.

    Args:
      question: the published question.
      answer: the published answer, ending "#### N".
      where: the position of the row, for messages.

    Raises:
      ConfigError: the answer does not end so.
    """
    rationale, mark, number = answer.rpartition("####")
    result = number.strip().replace(",", "")
    if not mark or not result:
        raise ConfigError(f"{where}: field 'answer' must end with '#### N', got {answer[-40:]!r}.")
    output = f"{_ANNOTATION.sub('', rationale).strip()}\nThe answer is {result}.".lstrip()
    return {"instruction": question, "input": "", "output": output, "answer": result}


def local_row(row: Mapping[str, Any], where: str, *, published: bool = True) -> dict[str, str]:
    """Convert one row; see `read_rows`. Of rows that are not LLM-Adapters', the output is learned
    as it stands.
    """

    def text(name: str) -> str:
        return field(row, name, where, _LOCAL_FIELDS)

    if "question" in row and "instruction" not in row:
        rows = gsm8k_row(text("question"), text("answer"), where)
    else:
        answer, output = text("answer").strip() if "answer" in row else "", text("output")
        if published:
            output = output.strip()
            output = _MARKER.sub("", output, count=1) if "answer" in row else output
        if not output.strip() and not answer:
            raise ConfigError(
                f"{where}: 'output' is empty and there is no 'answer', so there is nothing to"
                " learn."
            )
        rows = {
            "instruction": text("instruction"),
            "input": text("input") if "input" in row else "",
        }
        rows |= {
            "output": output if output.strip() else f"The answer is {answer}.",
            "answer": answer,
        }
    if not rows["instruction"].strip():
        raise ConfigError(f"{where}: the instruction (or question) is empty.")
    return rows


class LocalJson(FileBuilder):
    """LLM-Adapters' files and GSM8K's."""

    read = staticmethod(read_rows)


# --- hellaswag_json -------------------------------------------------------------------------------

_HELLASWAG_FIELDS = "activity_label, ctx, endings, label (HellaSwag)"


class HellaswagJson(FileBuilder):
    """hellaswag_train.jsonl and hellaswag_val.jsonl; the published test file has no labels."""

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            activity, context = (
                field(row, name, where, _HELLASWAG_FIELDS) for name in ("activity_label", "ctx")
            )
            endings, label = field(row, "endings", where, _HELLASWAG_FIELDS, list), row.get("label")
            if not all(isinstance(ending, str) for ending in endings):
                raise ConfigError(f"{where}: field 'endings' must be a list of strings.")
            if str(label) not in map(str, range(len(endings))):
                raise ConfigError(
                    f"{where}: label={label!r} is not the index of one of the {len(endings)}"
                    " endings. Unlabelled rows cannot be scored."
                )
            yield wording.hellaswag(activity, context, endings, int(str(label)))


# --- mawps_json -----------------------------------------------------------------------------------

_MAWPS_FIELDS = "original_text, equation, ans (MAWPS)"


class MawpsJson(FileBuilder):
    """The equation is the worked solution: "X=((22.0-14.0)/4.0)\\nThe answer is 2.0."."""

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            question, equation = (
                field(row, name, where, _MAWPS_FIELDS) for name in ("original_text", "equation")
            )
            answer = str(row.get("ans"))
            try:
                float(answer)
            except ValueError:
                raise ConfigError(
                    f"{where}: field 'ans' must be a number, got {answer!r}."
                ) from None
            yield {
                "instruction": question.strip(),
                "input": "",
                "output": f"{equation}\nThe answer is {answer}.",
                "answer": answer,
            }


# --- summary_json ---------------------------------------------------------------------------------

# Field -> its name in the instruction.
_TEXTS = {
    "dialogue": "dialogue",
    "article": "article",
    "document": "article",
}
_SUMMARIES = ("summary", "highlights", "summary1", "summary2", "summary3")
_SUMMARY_FIELDS = "dialogue, article or document, and summary, highlights or summary1 to summary3"


class SummaryJson(FileBuilder):
    """Several summaries (DialogSum's test file has three) are the references; the first is the
    target.
    """

    FIELDS = ("instruction", "input", "output", "references")

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            name = next((name for name in _TEXTS if name in row), "dialogue")
            text = field(row, name, where, _SUMMARY_FIELDS).strip()
            names = [name for name in _SUMMARIES if name in row] or ["summary"]
            references = [field(row, name, where, _SUMMARY_FIELDS).strip() for name in names]
            if not text or not all(references):
                raise ConfigError(f"{where}: the {name} or a summary of it is empty.")
            yield wording.summary(_TEXTS[name], text, references)


# --- dialogue_json --------------------------------------------------------------------------------

_DIALOGUE_FIELDS = "dialog (DailyDialog) or turns (MultiWOZ 2.2)"


class DialogueJson(FileBuilder):
    """One row per reply of the second speaker; in MultiWOZ that is the system."""

    FIELDS = ("instruction", "input", "output", "references", "unit")

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        found = False
        for where, row in json_rows(path):
            turns: list[Any]
            if "turns" in row:
                turns = [
                    turn.get("utterance") if isinstance(turn, dict) else None
                    for turn in field(row, "turns", where, _DIALOGUE_FIELDS, list)
                ]
            else:
                turns = field(row, "dialog", where, _DIALOGUE_FIELDS, list)
            if not all(isinstance(turn, str) for turn in turns):
                raise ConfigError(
                    f"{where}: every turn must be a string, or an object whose 'utterance' is one."
                )
            for reply in wording.replies(turns, unit=" ".join(turns[:2])):
                found = True
                yield reply
        if not found:
            raise ConfigError(
                f"{path}: no dialogue has a second turn, so there is no reply to learn."
            )


# --- woz_json -------------------------------------------------------------------------------------

_WOZ_FIELDS = (
    "dialogue_idx and dialogue, a list of turns with system_transcript, transcript, belief_state"
    " (WOZ 2.0)"
)


class WozJson(FileBuilder):
    """woz_train_en.json, woz_validate_en.json, woz_test_en.json."""

    FIELDS = ("instruction", "input", "output", "answer", "references", "unit")

    @staticmethod
    def read(path: str) -> Iterator[dict[str, Any]]:
        for where, row in json_rows(path):
            said: list[tuple[str, str]] = []
            for number, turn in enumerate(
                field(row, "dialogue", where, _WOZ_FIELDS, list), start=1
            ):
                there = f"{where}, turn {number}"
                if not isinstance(turn, dict):
                    raise ConfigError(f"{there}: expected an object, got {type(turn).__name__}.")
                said.append(
                    (
                        field(turn, "system_transcript", there, _WOZ_FIELDS),
                        field(turn, "transcript", there, _WOZ_FIELDS),
                    )
                )
                yield wording.belief(
                    said,
                    _slots(field(turn, "belief_state", there, _WOZ_FIELDS, list), there),
                    unit=str(row.get("dialogue_idx", where)),
                )


def _slots(state: list[Any], where: str) -> list[tuple[str, str]]:
    """(slot, value) of what the user informs, ("request", slot) of what the user requests."""
    try:
        return [
            ("request" if act["act"] == "request" else name, value)
            for act in state
            for name, value in act["slots"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: 'belief_state' must be a list of {{act, slots: [[name, value]]}}, got"
            f" {state!r:.120}."
        ) from error


BUILDERS: dict[str, type[FileBuilder]] = {
    "local_json": LocalJson,
    "hellaswag_json": HellaswagJson,
    "mawps_json": MawpsJson,
    "summary_json": SummaryJson,
    "dialogue_json": DialogueJson,
    "woz_json": WozJson,
}
