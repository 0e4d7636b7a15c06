"""Rows of a local JSON (one list) or JSONL file as instruction, input, output, answer.

The file has LLM-Adapters' fields, GSM8K's, or just an instruction and an output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders.files import (
    SPLIT,
    FileBuilder,
    field,
    file_config as local_json_config,
    json_rows,
)

__all__ = ["SPLIT", "LocalJson", "local_json_config", "read_rows"]

_FIELDS = (
    "instruction, output and, if there are any, input and answer (LLM-Adapters), "
    "or question, answer (GSM8K)"
)
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks: 48/2 = <<48/2=24>>24
_MARKER = re.compile(r"\s*(?:A:\s*)?")  # LLM-Adapters outputs start "\nA: "


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """All rows of the file as {instruction, input, output, answer}, every value a string.

    LLM-Adapters rows (instruction, input, output, answer; `input` may be absent): leading
    whitespace and an "A:" marker are cut from the output, and an empty output becomes
    "The answer is {answer}.". Rows without `answer` (your own): the output as it is, stripped;
    the answer is "", so there is nothing to compare a generated answer with.
    GSM8K rows (question, answer ending "#### N"): see `gsm8k_row`.

    Raises:
      ConfigError: the file is not JSON, has no rows, or has a malformed row. A bad row is never
        skipped: the message names the file and the row, counted from 1 (in JSONL by line, blank
        lines included).
    """
    return [_normalise(row, where) for where, row in json_rows(path)]


def gsm8k_row(question: str, answer: str, where: str) -> dict[str, str]:
    """A GSM8K row: calculator annotations are cut, the last line becomes "The answer is N." and N
    loses its thousands commas.
    """
    rationale, mark, number = answer.rpartition("####")
    result = number.strip().replace(",", "")
    if not mark or not result:
        raise ConfigError(f"{where}: field 'answer' must end with '#### N', got {answer[-40:]!r}.")
    output = f"{_ANNOTATION.sub('', rationale).strip()}\nThe answer is {result}.".lstrip()
    return {"instruction": question, "input": "", "output": output, "answer": result}


def _normalise(row: Mapping[str, Any], where: str) -> dict[str, str]:
    def text(name: str) -> str:
        return field(row, name, where, _FIELDS)

    if "question" in row and "instruction" not in row:
        rows = gsm8k_row(text("question"), text("answer"), where)
    else:
        answer, output = text("answer").strip() if "answer" in row else "", text("output").strip()
        if "answer" in row:
            output = _MARKER.sub("", output, count=1)
        if not output and not answer:
            raise ConfigError(
                f"{where}: 'output' is empty and there is no 'answer', so there is nothing to"
                " learn."
            )
        rows = {
            "instruction": text("instruction"),
            "input": text("input") if "input" in row else "",
        }
        rows |= {"output": output or f"The answer is {answer}.", "answer": answer}
    if not rows["instruction"].strip():
        raise ConfigError(f"{where}: the instruction (or question) is empty.")
    return rows


class LocalJson(FileBuilder):
    """LLM-Adapters' files and GSM8K's."""

    read = staticmethod(read_rows)
