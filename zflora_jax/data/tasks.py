"""Tasks: what the model is asked, what it should say, and how its answer is scored. A new task is
one more line of `TASKS`.

`GROUPS` are the tasks of the paper. Its abstract counts 18 in three categories: the 8 of
commonsense and 6 of math are LLM-Adapters'. Which four make up "summary-dialogue" could not be read
there; the four here are this project's choice: news (CNN/DailyMail, XSum) and dialogue
(DailyDialog, MultiWOZ), the last two as the next reply. DialogSum, SAMSum and WOZ 2.0 stand beside
them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import answers
from zflora_jax.data.answers import PARSERS, Kind, Rule, numbers, parse_number, same_number, stated
from zflora_jax.data.sources import (
    HOLD_OUT,
    SPLITS,
    TRAINING_SETS,
    Format,
    Row,
    Source,
    Split,
    named,
    read_split,
)

__all__ = [
    "GROUPS",
    "HOLD_OUT",
    "PARSERS",
    "SPLITS",
    "TASKS",
    "Example",
    "Task",
    "get_task",
    "load_examples",
]
__all__ += ["numbers", "parse_number", "same_number", "stated"]


@dataclass(frozen=True)
class Example:
    """One question. `prompt` and `input` are the user's text, `target` the completion to learn
    (without EOS).

    answer: what a parsed completion is compared with; "" where there is no single right one.
    options: completions to compare by likelihood, each in the target's form ("the correct answer is
    answer2"); the target is one of them. references: texts to compare a completion with by ROUGE;
    the target is the first. document: `input` is a long text that may be cut at its end.
    """

    prompt: str
    target: str
    answer: str
    input: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    document: bool = False


@dataclass(frozen=True)
class Task:
    """A task whose answers are of one kind, in one group: commonsense, math, summary or other.
    Subclasses say where rows come from.
    """

    name: str
    group: str
    kind: Kind

    def split(self, split: str, data: DataConfig) -> Split:
        raise NotImplementedError

    def example(self, row: Row) -> Example:
        raise NotImplementedError

    def rule(self, parser: str) -> Rule:
        """How answers are read and scored: "legacy" as LLM-Adapters does, "fixed" corrected; see
        data.answers.
        """
        require(parser in PARSERS, f"unknown parser {parser!r}: {nearest(parser, PARSERS)}.")
        return self.kind.legacy if parser == "legacy" else self.kind.fixed

    def parse_as(self, text: str, parser: str) -> str:
        """The answer that a completion gives, "" if none."""
        return self.rule(parser).parse(text)

    def score_as(self, prediction: str, answer: str, parser: str) -> bool:
        """Whether a prediction, parsed by the same parser, is right."""
        return self.rule(parser).score(prediction, answer)

    def parse(self, text: str) -> str:
        return self.parse_as(text, "fixed")

    def score(self, prediction: str, answer: str) -> bool:
        return self.score_as(prediction, answer, "fixed")

    def gold(self, example: Example) -> str:
        """A completion that states the right answer so that both parsers read it."""
        return self.kind.state(example.answer) if example.answer else example.target


@dataclass(frozen=True)
class Arithmetic(Task):
    """Generated word problems. `data.data_dir`, if set, is where they are kept; the three splits
    share no question.
    """

    def split(self, split: str, data: DataConfig) -> Split:
        from zflora_jax.data.builders import open_prepared
        from zflora_jax.data.builders.arithmetic import Arithmetic as Builder

        rows = open_prepared(Builder, split, data.data_dir)
        return Split(rows, range(len(rows)), f"arithmetic, {split}")

    def example(self, row: Row) -> Example:
        return Example(_text(row["question"]), _text(row["rationale"]), _text(row["answer"]))


@dataclass(frozen=True)
class FileTask(Task):
    """Rows of files, or of the public dataset of that name: instruction, input, output, answer,
    references, as the builders give them.
    """

    source: Source
    document: bool = False

    def split(self, split: str, data: DataConfig) -> Split:
        folders = {t.source.folder.lower() for t in TASKS.values() if isinstance(t, FileTask)}
        return read_split(self.name, self.source, split, data.data_dir, folders)

    def example(self, row: Row) -> Example:
        prompt, target, answer, extra = (
            _text(row.get(name, "")) for name in ("instruction", "output", "answer", "input")
        )
        references = tuple(map(_text, row.get("references", ())))
        require(
            bool(answer or references) or self.kind is answers.ANY,
            f"the answer is empty, and {self.name!r} is scored by it. Rows without an answer can be"
            " trained on as task 'json'.",
        )
        return Example(
            prompt,
            target,
            answer,
            extra,
            options_of(prompt, target, answer),
            references,
            self.document,
        )


_FORMAT = re.compile(r"Answer format: *(\S+/\S+)\s*\Z")


def options_of(prompt: str, target: str, answer: str) -> tuple[str, ...]:
    """The target with each answer of the prompt's last line, "Answer format: answer1/answer2", in
    its place; none without such a line or without an answer.

    Raises:
      ConfigError: the answer is not one of them, or the target does not state it.
    """
    found = _FORMAT.search(prompt)
    if not found or not answer:
        return ()
    allowed = found.group(1).split("/")
    require(
        answer in allowed,
        f"the answer is {answer!r}, which is not one of the options that the question lists,"
        f" {', '.join(allowed)}.",
    )
    before, stated_answer, after = target.rpartition(answer)
    require(bool(stated_answer), f"the output {target!r} does not state the answer {answer!r}.")
    return tuple(f"{before}{option}{after}" for option in allowed)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- the registry ---------------------------------------------------------------------------------


def _commonsense(
    name: str,
    words: Sequence[str],
    folder: str = "",
    *formats: Format,
    public: bool = True,
    test_only: bool = False,
) -> Task:
    source = Source(
        folder or name, (named("local_json"), *formats), public=public, test_only=test_only
    )
    return FileTask(name, "commonsense", answers.words(*words), source)


def _math(
    name: str, folder: str, kind: Kind = answers.NUMBER, *formats: Format, test_only: bool = True
) -> Task:
    return FileTask(
        name, "math", kind, Source(folder, (named("local_json"), *formats), test_only=test_only)
    )


def _summary(
    name: str,
    format: Format,
    origin: str,
    kind: Kind = answers.TEXT,
    *,
    public: bool = True,
    document: bool = False,
) -> Task:
    return FileTask(
        name,
        "summary",
        kind,
        Source(name, (format, named(format.builder)), origin=origin, public=public),
        document,
    )


def _training(name: str) -> Task:
    source = Source(
        "ft-training_set",
        (Format("local_json", {"train": (name,)}),),
        anywhere=True,
        origin=TRAINING_SETS,
    )
    return FileTask(name, "other", answers.ANY, source)


# Test labels are not public.
_PUBLISHED_HELLASWAG = Format(
    "hellaswag_json", {"train": ("hellaswag_train",), "test": ("hellaswag_val",)}
)
_MAWPS_EQUATIONS = Format("mawps_json", {"train": ("trainset",)})

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Arithmetic("arithmetic", "other", answers.NUMBER),
        FileTask("json", "other", answers.ANY, Source("", anywhere=True)),
        _commonsense("boolq", answers.TRUE_FALSE),
        _commonsense("piqa", answers.SOLUTIONS, test_only=True),
        _commonsense("social_i_qa", answers.ANSWERS, test_only=True),
        _commonsense("hellaswag", answers.ENDINGS, "", _PUBLISHED_HELLASWAG, test_only=True),
        _commonsense("winogrande", answers.OPTIONS, test_only=True),
        _commonsense("arc_easy", answers.ANSWERS, "ARC-Easy"),
        _commonsense("arc_challenge", answers.ANSWERS, "ARC-Challenge"),
        _commonsense("openbookqa", answers.ANSWERS),
        _math("addsub", "AddSub"),
        _math("aqua", "AQuA", answers.LETTER),
        _math("multiarith", "MultiArith"),
        FileTask(
            "gsm8k",
            "math",
            answers.NUMBER,
            Source(
                "gsm8k",
                anywhere=True,
                origin="https://github.com/openai/grade-school-math",
                public=True,
            ),
        ),
        _math("singleeq", "SingleEq"),
        _math("svamp", "SVAMP"),
        _math("mawps", "mawps", answers.NUMBER, _MAWPS_EQUATIONS, test_only=False),
        _summary(
            "cnn_dailymail",
            named("summary_json"),
            "https://github.com/abisee/cnn-dailymail",
            document=True,
        ),
        _summary(
            "xsum", named("summary_json"), "https://github.com/EdinburghNLP/XSum", document=True
        ),
        _summary(
            "samsum",
            named("summary_json"),
            "https://arxiv.org/src/1911.12237v2/anc/corpus.7z",
            document=True,
        ),
        _summary(
            "dialogsum",
            named("summary_json", "dialogsum.{}"),
            "https://github.com/cylnlp/dialogsum",
            document=True,
        ),
        _summary("dailydialog", named("dialogue_json"), "http://yanran.li/dailydialog"),
        _summary("multiwoz", named("dialogue_json"), "https://github.com/budzianowski/multiwoz"),
        _summary(
            "woz",
            named("woz_json", "woz_{}_en"),
            "https://github.com/nmrksic/neural-belief-tracker",
            answers.BELIEF,
            public=False,
        ),
        *map(
            _training,
            (
                "math_data",
                "math_7k",
                "math_10k",
                "math_14k",
                "math_50k",
                "commonsense_15k",
                "commonsense_170k",
            ),
        ),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "commonsense": (
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    ),
    "math": ("addsub", "aqua", "multiarith", "gsm8k", "singleeq", "svamp"),
    "summary": ("cnn_dailymail", "xsum", "dailydialog", "multiwoz"),
}


def get_task(name: str) -> Task:
    """The task of that name; ConfigError with the nearest name otherwise."""
    require(name in TASKS, f"unknown task {name!r}: {nearest(name, TASKS)}.")
    return TASKS[name]


def load_examples(task_name: str, split: str, data_config: DataConfig) -> Sequence[Example]:
    """The examples of one split, read when they are indexed.

    Args:
      task_name: a key of TASKS.
      split: train, validation or test. `data_config.train_limit` keeps the first rows of train and
        touches no other split.
      data_config: data_dir and train_limit are read.

    Raises:
      ConfigError: unknown task or split, missing directory or file, malformed row, or no example at
        all. Indexing raises it for a row that does not fit the task, and names its file and number.
    """
    task = get_task(task_name)
    require(split in SPLITS, f"unknown split {split!r}: {nearest(split, SPLITS)}.")
    rows, indices, origin = task.split(split, data_config)
    if split == "train":
        indices = indices[: data_config.train_limit]
    require(
        len(indices) > 0,
        f"task {task_name!r}: the {split} split is empty. Give a file with at least one row.",
    )
    return _Examples(task, Split(rows, indices, origin))


class _Examples(Sequence[Example]):
    def __init__(self, task: Task, split: Split) -> None:
        self._task, self._split = task, split

    def __len__(self) -> int:
        return len(self._split.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        rows, indices, origin = self._split
        if isinstance(index, slice):
            return _Examples(self._task, Split(rows, indices[index], origin))
        number = indices[index]
        try:
            return self._task.example(rows[number])
        except ConfigError as error:
            raise ConfigError(
                f"task {self._task.name!r}: {origin}, row {number + 1}: {error}"
            ) from error
