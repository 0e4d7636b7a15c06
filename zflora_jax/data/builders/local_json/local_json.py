"""Rows of a local JSON (one list) or JSONL file, in the LLM-Adapters fields or in GSM8K's, as instruction, input, output, answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from zflora_jax.fields import ConfigError

SPLIT = "rows"  # one file is one dataset with one split; which file is train or test is the task's business
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks: 48/2 = <<48/2=24>>24
_MARKER = re.compile(r"\s*(?:A:\s*)?")  # LLM-Adapters outputs start "\nA: "


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """All rows of the file as {instruction, input, output, answer}, every value a string.

    LLM-Adapters rows (instruction, input, output, answer; `input` may be absent): leading whitespace and an "A:" marker are cut from the
    output, and an empty output becomes "The answer is {answer}.". GSM8K rows (question, answer ending "#### N"): calculator annotations are
    cut, the last line becomes "The answer is N." and N loses its thousands commas.

    Raises:
      ConfigError: the file is not JSON, has no rows, or has a malformed row. A bad row is never skipped: the message names the file and the
        row, counted from 1 (in JSONL by line, blank lines included).
    """
    rows = [_normalise(row, f"{path}, row {number}") for number, row in _parse(Path(path))]
    if not rows:
        raise ConfigError(f"{path}: no rows. Expected a JSON list of objects, or one JSON object per line.")
    return rows


def _parse(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}.") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028, which it would split at
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, row {number}: invalid JSON at column {error.colno}: {error.msg}.") from error


def _normalise(row: Any, where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, got {type(row).__name__}.")

    def text(field: str) -> str:
        if field not in row:
            raise ConfigError(
                f"{where}: no field {field!r}, the row has {', '.join(map(repr, row)) or 'none'}. "
                "Expected instruction, input, output, answer (LLM-Adapters) or question, answer (GSM8K)."
            )
        if not isinstance(row[field], str):
            raise ConfigError(f"{where}: field {field!r} must be a string, got {type(row[field]).__name__} {row[field]!r}.")
        return row[field]

    if "question" in row and "instruction" not in row:
        rationale, mark, number = text("answer").rpartition("####")
        answer = number.strip().replace(",", "")
        if not mark or not answer:
            raise ConfigError(f"{where}: field 'answer' must end with '#### N', got {text('answer')[-40:]!r}.")
        instruction, extra = text("question"), ""
        output = f"{_ANNOTATION.sub('', rationale).strip()}\nThe answer is {answer}.".lstrip()
    else:
        instruction, answer, output = text("instruction"), text("answer").strip(), _MARKER.sub("", text("output"), count=1).rstrip()
        extra = text("input") if "input" in row else ""
        if not output and not answer:
            raise ConfigError(f"{where}: 'output' and 'answer' are both empty, so there is nothing to learn or to score.")
        output = output or f"The answer is {answer}."
    if not instruction.strip():
        raise ConfigError(f"{where}: the instruction (or question) is empty.")
    return {"instruction": instruction, "input": extra, "output": output, "answer": answer}


@dataclasses.dataclass
class LocalJsonConfig(tfds.core.BuilderConfig):
    """A TFDS config that carries the source file; make it with `local_json_config`."""

    path: str = ""


def local_json_config(path: str | os.PathLike[str]) -> LocalJsonConfig:
    """The config of one file, named by the hash of its bytes: prepared data is found again if the file moves, and never reused if it changes."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return LocalJsonConfig(name=f"sha256-{digest[:20]}", path=os.fspath(path))


class LocalJson(tfds.core.GeneratorBasedBuilder):
    """One split, "rows", in the file's order: `LocalJson(config=local_json_config(path))`. Raise VERSION with any change of `read_rows`."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[dict[str, Any]] = {}  # see Arithmetic

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"instruction": text, "input": text, "output": text, "answer": text}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {SPLIT: self._generate_examples(read_rows(self.builder_config.path))}

    def _generate_examples(self, rows: list[dict[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(rows)
