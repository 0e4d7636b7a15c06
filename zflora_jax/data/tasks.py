"""The tasks, and the examples of their splits. A new task is one more row of `TASKS`.

`GROUPS` are the tasks of the paper, whose abstract counts 18: 8 commonsense and 6 math tasks of
LLM-Adapters, and four of "summary-dialogue", which it does not name and this project chose.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zflora_jax.core.fields import ConfigError, require, require_in
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import answers
from zflora_jax.data.lazy import Lazy
from zflora_jax.data.splits import HOLD_OUT, open_split
from zflora_jax.data.task import CLOZE, LLM_ADAPTERS, SPLITS, Example, Files, Task, named

__all__ = ["GROUPS", "HOLD_OUT", "SPLITS", "TASKS", "Example", "Task", "get_task", "load_examples"]

_GITHUB = "https://github.com/"
_WOZ = _GITHUB + "nmrksic/neural-belief-tracker"
# Trains on the 500 rows of dev, for when the 12,460 of train are too many or missing.
_DEV = Files("summary", {"train": ("dialogsum.dev",), "test": ("dialogsum.test",)})

_ADAPTERS, _SUMMARY, _DIALOGUE = map(named, ("llm_adapters", "summary", "dialogue"))


def _task(
    group: str, name: str, scored: answers.Answers, *files: Files, folder: str = "", **fields: Any
) -> Task:
    return Task(name, group, scored, folder or name, files or (_ADAPTERS,), **fields)


_commonsense = functools.partial(_task, "commonsense")
_math, _summary = functools.partial(_task, "math"), functools.partial(_task, "summary")


def _news(name: str, origin: str) -> Task:
    return _summary(name, answers.TEXT, _SUMMARY, origin=origin, document=True)


def _dialogsum(name: str, *files: Files) -> Task:
    origin = _GITHUB + "cylnlp/dialogsum"
    return _summary(name, answers.TEXT, *files, folder="dialogsum", origin=origin, document=True)


def _training_set(name: str) -> Task:
    files = Files("llm_adapters", {"train": (name,)})
    folder, origin = "ft-training_set", LLM_ADAPTERS.replace("dataset/", "ft-training_set/")
    return _task("other", name, answers.ANY, files, folder=folder, origin=origin)


_ROWS: tuple[Task, ...] = (
    Task("arithmetic", "other", answers.NUMBER, source="generated"),
    Task("arithmetic_steps", "other", answers.NUMBER, source="generated"),
    Task("rows", "other", answers.ANY, files=(named(""),), source="own"),
    _commonsense("boolq", answers.TRUE_FALSE),
    _commonsense("piqa", answers.SOLUTIONS),
    _commonsense("social_i_qa", answers.ANSWERS),
    _commonsense("hellaswag", answers.ENDINGS),
    _commonsense("winogrande", answers.OPTIONS),
    _commonsense("arc_easy", answers.ANSWERS, folder="ARC-Easy"),
    _commonsense("arc_challenge", answers.ANSWERS, folder="ARC-Challenge"),
    _commonsense("openbookqa", answers.ANSWERS),
    _math("addsub", answers.NUMBER, folder="AddSub"),
    _math("aqua", answers.LETTER, folder="AQuA"),
    _math("multiarith", answers.NUMBER, folder="MultiArith"),
    _math("gsm8k", answers.NUMBER, origin=_GITHUB + "openai/grade-school-math"),
    _math("singleeq", answers.NUMBER, folder="SingleEq"),
    _math("svamp", answers.NUMBER, folder="SVAMP"),
    _math("mawps", answers.NUMBER),
    _news("cnn_dailymail", origin=_GITHUB + "abisee/cnn-dailymail"),
    _news("xsum", origin=_GITHUB + "EdinburghNLP/XSum"),
    _news("samsum", origin="https://arxiv.org/src/1911.12237v2/anc/corpus.7z"),
    _dialogsum("dialogsum", named("summary", "dialogsum.{}"), _SUMMARY),
    _dialogsum("dialogsum_dev", _DEV),
    _summary("dailydialog", answers.TEXT, _DIALOGUE, origin="http://yanran.li/dailydialog"),
    _summary("multiwoz", answers.TEXT, _DIALOGUE, origin=_GITHUB + "budzianowski/multiwoz"),
    _summary("woz", answers.BELIEF, named("woz", "woz_{}_en"), named("woz"), origin=_WOZ),
    *map(_training_set, ("math_data", "math_7k", "math_10k", "math_14k", "math_50k")),
    *map(_training_set, ("commonsense_15k", "commonsense_170k")),
)
_QUESTION = "Question: {}\nAnswer:"
_CLOZE_PROMPTS = {
    "piqa": _QUESTION,
    "social_i_qa": "Q: {}\nA:",
    "hellaswag": "{}",
    "winogrande": "{}",
    "arc_easy": _QUESTION,
    "arc_challenge": _QUESTION,
    "openbookqa": "{}",
}
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
for _name, _prompt in _CLOZE_PROMPTS.items():
    TASKS[_name + CLOZE] = replace(
        TASKS[_name], name=_name + CLOZE, answers=answers.TEXT, cloze=_prompt
    )

GROUPS: dict[str, tuple[str, ...]] = {
    "commonsense": tuple(task.name for task in _ROWS if task.group == "commonsense"),
    "math": ("addsub", "aqua", "multiarith", "gsm8k", "singleeq", "svamp"),
    "summary": ("cnn_dailymail", "xsum", "dailydialog", "multiwoz"),
}


def get_task(name: str) -> Task:
    """Returns the task of that name; ConfigError names the nearest one if there is none."""
    require_in(TASKS, name, f"unknown task {name!r}")
    return TASKS[name]


def load_examples(task_name: str, split: str, data_config: DataConfig) -> Sequence[Example]:
    """Opens the examples of one split of a task as a sequence; each is read when it is indexed.

    Args:
      task_name: A key of `TASKS`.
      split: "train", "validation" or "test".
      data_config: Settings, of which data_dir, row_format and (for train) train_limit are read.

    Raises:
      ConfigError: The task or the split is unknown, a file is missing or malformed, or there is no
        example. Indexing raises it for a row that does not fit the task.
    """
    task = get_task(task_name)
    require_in(SPLITS, split, f"unknown split {split!r}")
    rows, indices, origin = open_split(task, split, data_config)
    if split == "train":
        indices = indices[: data_config.train_limit]
    require(len(indices) > 0, f"task {task_name!r}: the {split} split has no row.")

    def example(index: int) -> Example:
        where = f"{origin}, row {index + 1}"
        try:
            return task.example(rows[index], where)
        except ConfigError as error:
            raise ConfigError(f"task {task_name!r}: {where}: {error}") from error

    return Lazy(example, indices)
