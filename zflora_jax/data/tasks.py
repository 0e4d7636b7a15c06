"""Tasks: where the rows come from, what the model is asked, what it should say, and how its answer is scored.

A new task is one more entry of `TASKS`. Its rows come from a TFDS builder and are read at random through `as_data_source()`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from zflora_jax.config import DataConfig
from zflora_jax.fields import ConfigError, nearest, require

SPLITS = ("train", "validation", "test")
HOLD_OUT = 200  # rows, at most a tenth of the train file, that stand in for a validation or test file that is not there
TOLERANCE = 1e-3  # absolute, between numeric answers: the one of LLM-Adapters

Row = Mapping[str, bytes]


@dataclass(frozen=True)
class Example:
    """One question. `prompt` and `input` are the user's text, `target` the completion to learn (without EOS), `answer` what is scored."""

    prompt: str
    target: str
    answer: str
    input: str = ""


# --- answers ------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)", re.ASCII)  # in "5-3" the minus is no sign, in "solution1" there is no number
_STATED = re.compile(r"answer is\b:?", re.IGNORECASE)


def numbers(text: str) -> list[str]:
    """The numbers in a text, in order, without thousands commas."""
    return _NUMBER.findall(_THOUSANDS.sub("", text))


def stated(text: str) -> str | None:
    """What follows the last "answer is", to the end of its line; None if nothing is stated."""
    found = list(_STATED.finditer(text))
    return text[found[-1].end() :].partition("\n")[0].strip() if found else None


def parse_number(text: str) -> str:
    """The answer of a worked solution: the number stated after the last "answer is", else the last number of the text, else ""."""
    anywhere = numbers(text)
    return _stated_number(stated(text) or "") or (anywhere[-1] if anywhere else "")


def _stated_number(statement: str) -> str:
    """The first number of "36 dollars." and the result of "49 - 34 = 15 customers."."""
    return next(iter(numbers(statement.rpartition("=")[2])), "")


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def same_number(prediction: str, answer: str) -> bool:
    """Both are numbers and differ by at most TOLERANCE."""
    a, b = _as_float(prediction), _as_float(answer)
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


# --- tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task with numeric answers; subclasses say where rows come from, and may parse and score otherwise."""

    name: str

    def rows(self, split: str, data: DataConfig) -> tuple[Sequence[Row], Sequence[int]]:
        """The random-access rows behind a split, and which of them, in which order, are the split."""
        raise NotImplementedError

    def example(self, row: Row) -> Example:
        raise NotImplementedError

    def parse(self, text: str) -> str:
        """The answer that a completion gives, "" if none."""
        return parse_number(text)

    def score(self, prediction: str, answer: str) -> bool:
        """Whether a parsed prediction is right."""
        return same_number(prediction, answer)


@dataclass(frozen=True)
class Arithmetic(Task):
    """Generated word problems. `data.data_dir`, if set, is where they are kept; the three splits share no question."""

    def rows(self, split: str, data: DataConfig) -> tuple[Sequence[Row], Sequence[int]]:
        from zflora_jax.data.builders import open_prepared
        from zflora_jax.data.builders.arithmetic.arithmetic import Arithmetic as Builder

        rows = open_prepared(Builder, split, data.data_dir)
        return rows, range(len(rows))

    def example(self, row: Row) -> Example:
        return Example(row["question"].decode(), row["rationale"].decode(), row["answer"].decode())


@dataclass(frozen=True)
class JsonFiles(Task):
    """{train,validation,test}.json or .jsonl in `data.data_dir`, or one file there for all three splits.

    A validation or test split without a file is held out of the train file: HOLD_OUT rows each, at most a tenth, which the train split then
    lacks. Which rows is a fixed function of the question texts alone: not of data.seed, so that two runs are judged alike, nor of the order
    of the file, and a question that occurs twice never lies on both sides. Rows of the train file come in that pseudo-random order (so
    `train_limit` takes a sample), rows of a test or validation file in the file's.

    Answers are numbers or words. A number is compared as in `same_number`, a word (true, solution2, B) with what follows "answer is".
    """

    def rows(self, split: str, data: DataConfig) -> tuple[Sequence[Row], Sequence[int]]:
        files = self.files(data)
        if split != "train" and split in files:
            rows = _open_file(files[split])
            return rows, range(len(rows))
        if "train" not in files:
            raise ConfigError(
                f"task {self.name!r}: no train file in {data.data_dir}, found {', '.join(str(p.name) for p in files.values()) or 'none'}. "
                f"The {split} split needs train.json or train.jsonl there" + (f", or {split}.json(l)." if split != "train" else ".")
            )
        rows = _open_file(files["train"])
        held_out = [name for name in ("validation", "test") if name not in files]
        parts = _hold_out([row["instruction"] for row in rows], held_out)
        require(
            len(parts[split]) > 0,
            f"task {self.name!r}: {files['train']} has {len(rows)} rows, too few to hold out a {split} split (a tenth of them). "
            f"Put {split}.json or {split}.jsonl beside it.",
        )
        return rows, parts[split]

    def files(self, data: DataConfig) -> dict[str, Path]:
        """The file of each split that has one."""
        fix = "Set data.data_dir to a directory with train.json(l) and, if you have them, validation.json(l) and test.json(l), or to one such file."
        if not data.data_dir:
            raise ConfigError(f"task {self.name!r} reads files, but data.data_dir is not set. {fix}")
        root = Path(data.data_dir).expanduser()
        require(root.exists(), f"task {self.name!r}: data.data_dir={data.data_dir!r} does not exist. {fix}")
        if root.is_file():
            return {"train": root}
        files: dict[str, Path] = {}
        for split in SPLITS:
            found = [path for path in (root / f"{split}.json", root / f"{split}.jsonl") if path.is_file()]
            require(len(found) < 2, f"task {self.name!r}: both {split}.json and {split}.jsonl are in {root}. Keep one of them.")
            if found:
                files[split] = found[0]
        require(bool(files), f"task {self.name!r}: no train, validation or test file in {root}. {fix}")
        return files

    def example(self, row: Row) -> Example:
        return Example(row["instruction"].decode(), row["output"].decode(), row["answer"].decode(), row["input"].decode())

    def parse(self, text: str) -> str:
        """What is stated after "answer is"; without that, the last number, or the text itself."""
        after, anywhere = stated(text), numbers(text)
        return after if after is not None else anywhere[-1] if anywhere else text.strip()

    def score(self, prediction: str, answer: str) -> bool:
        if _as_float(answer) is not None:
            return same_number(_stated_number(prediction), answer)
        said, wanted = (re.findall(r"\w+", text.lower()) for text in (prediction, answer))
        return bool(wanted) and said[: len(wanted)] == wanted


@dataclass(frozen=True)
class Gsm8k(JsonFiles):
    """GSM8K as published, train.jsonl and test.jsonl: worked solutions whose answers are numbers."""

    parse = Task.parse
    score = Task.score


TASKS: dict[str, Task] = {task.name: task for task in (Arithmetic("arithmetic"), Gsm8k("gsm8k"), JsonFiles("json"))}


def get_task(name: str) -> Task:
    """The task of that name; ConfigError with the nearest name otherwise."""
    require(name in TASKS, f"unknown task {name!r}: {nearest(name, TASKS)}.")
    return TASKS[name]


def load_examples(task_name: str, split: str, data_config: DataConfig) -> Sequence[Example]:
    """The examples of one split, read when they are indexed.

    Args:
      task_name: a key of TASKS.
      split: train, validation or test. `data_config.train_limit` keeps the first rows of train and touches no other split.
      data_config: data_dir and train_limit are read.

    Raises:
      ConfigError: unknown task or split, missing directory or file, malformed row, or no example at all.
    """
    task = get_task(task_name)
    require(split in SPLITS, f"unknown split {split!r}: {nearest(split, SPLITS)}.")
    rows, indices = task.rows(split, data_config)
    if split == "train":
        indices = indices[: data_config.train_limit]
    require(len(indices) > 0, f"task {task_name!r}: the {split} split is empty. Give a file with at least one row.")
    return _Examples(task, rows, indices)


class _Examples(Sequence[Example]):
    def __init__(self, task: Task, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self._task, self._rows, self._indices = task, rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Examples(self._task, self._rows, self._indices[index])
        return self._task.example(self._rows[self._indices[index]])


def _open_file(path: Path) -> Sequence[Row]:
    from zflora_jax.data.builders import open_prepared
    from zflora_jax.data.builders.local_json.local_json import SPLIT, LocalJson, local_json_config

    return open_prepared(functools.partial(LocalJson, config=local_json_config(path)), SPLIT)


def _hold_out(questions: Sequence[bytes], names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of "train" and of each split in `names`: rows sorted by a hash of the question, cut so that equal questions stay together."""
    keys = [hashlib.sha256(b"zflora hold-out\n" + question).digest() for question in questions]
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    size = min(HOLD_OUT, len(order) // 10)
    parts: dict[str, list[int]] = {}
    start = 0
    for name in names:
        stop = min(start + size, len(order))
        while size and 0 < stop < len(order) and keys[order[stop]] == keys[order[stop - 1]]:
            stop += 1
        parts[name] = order[start:stop]
        start = stop
    return parts | {"train": order[start:]}
