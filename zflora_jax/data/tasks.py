"""The tasks, and the examples of their splits. A new task is one more row of `TASKS`.

`GROUPS` are the tasks of the paper. Its abstract counts 18 in three categories: the 8 commonsense
and 6 math tasks are LLM-Adapters'. The abstract does not name the four of "summary-dialogue"; the
four here are this project's choice: news (CNN/DailyMail, XSum) and dialogue (DailyDialog and
MultiWOZ, where the answer is the next reply). DialogSum, SAMSum and WOZ 2.0 are in `TASKS` too, and
so are the multiple-choice tasks in cloze form (`data.cloze`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import answers
from zflora_jax.data.cloze import CLOZE
from zflora_jax.data.lazy import Lazy
from zflora_jax.data.splits import HOLD_OUT, open_split
from zflora_jax.data.task import LLM_ADAPTERS, SPLITS, Example, Files, Task, named

__all__ = ["GROUPS", "HOLD_OUT", "SPLITS", "TASKS", "Example", "Task", "get_task", "load_examples"]

_GITHUB = "https://github.com/"
_TRAINING_SETS = LLM_ADAPTERS.replace("dataset/", "ft-training_set/")
_DIALOGSUM = _GITHUB + "cylnlp/dialogsum"
# The published test rows have no labels.
_HELLASWAG = Files("hellaswag", {"train": ("hellaswag_train",), "test": ("hellaswag_val",)})
# Trained on the 500 rows of dev, where the 12,460 of train are too many or not there.
_DEV = Files("summary", {"train": ("dialogsum.dev",), "test": ("dialogsum.test",)})

_commonsense = functools.partial(Task, group="commonsense")
_math = functools.partial(Task, group="math", answers=answers.NUMBER)
_generated = functools.partial(Task, group="other", answers=answers.NUMBER, source="generated")
_summary = functools.partial(
    Task, group="summary", answers=answers.TEXT, files=(named("summary"),), document=True
)
_dialogue = functools.partial(
    Task, group="summary", answers=answers.TEXT, files=(named("dialogue"),)
)


def _training_set(name: str) -> Task:
    files = (Files("llm_adapters", {"train": (name,)}),)
    return Task(name, "other", answers.ANY, "ft-training_set", files, _TRAINING_SETS)


_ROWS: tuple[Task, ...] = (
    _generated("arithmetic"),
    _generated("arithmetic_steps"),
    Task("rows", "other", answers.ANY, files=(named("own"),), source="own"),
    _commonsense("boolq", answers=answers.TRUE_FALSE, folder="boolq"),
    _commonsense("piqa", answers=answers.SOLUTIONS, folder="piqa"),
    _commonsense("social_i_qa", answers=answers.ANSWERS, folder="social_i_qa"),
    _commonsense(
        "hellaswag",
        answers=answers.ENDINGS,
        folder="hellaswag",
        files=(named("llm_adapters"), _HELLASWAG),
    ),
    _commonsense("winogrande", answers=answers.OPTIONS, folder="winogrande"),
    _commonsense("arc_easy", answers=answers.ANSWERS, folder="ARC-Easy"),
    _commonsense("arc_challenge", answers=answers.ANSWERS, folder="ARC-Challenge"),
    _commonsense("openbookqa", answers=answers.ANSWERS, folder="openbookqa"),
    _math("addsub", folder="AddSub"),
    _math("aqua", folder="AQuA", answers=answers.LETTER),
    _math("multiarith", folder="MultiArith"),
    _math("gsm8k", folder="gsm8k", origin=_GITHUB + "openai/grade-school-math"),
    _math("singleeq", folder="SingleEq"),
    _math("svamp", folder="SVAMP"),
    _math(
        "mawps",
        folder="mawps",
        files=(named("llm_adapters"), Files("mawps", {"train": ("trainset",)})),
    ),
    _summary("cnn_dailymail", folder="cnn_dailymail", origin=_GITHUB + "abisee/cnn-dailymail"),
    _summary("xsum", folder="xsum", origin=_GITHUB + "EdinburghNLP/XSum"),
    _summary("samsum", folder="samsum", origin="https://arxiv.org/src/1911.12237v2/anc/corpus.7z"),
    _summary(
        "dialogsum",
        folder="dialogsum",
        files=(named("summary", "dialogsum.{}"), named("summary")),
        origin=_DIALOGSUM,
    ),
    _summary("dialogsum_dev", folder="dialogsum", files=(_DEV,), origin=_DIALOGSUM),
    _dialogue("dailydialog", folder="dailydialog", origin="http://yanran.li/dailydialog"),
    _dialogue("multiwoz", folder="multiwoz", origin=_GITHUB + "budzianowski/multiwoz"),
    _dialogue(
        "woz",
        answers=answers.BELIEF,
        folder="woz",
        files=(named("woz", "woz_{}_en"), named("woz")),
        origin=_GITHUB + "nmrksic/neural-belief-tracker",
    ),
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
_IN_CLOZE_FORM = tuple(
    replace(task, name=task.name + CLOZE, answers=answers.TEXT, cloze=_CLOZE_PROMPTS[task.name])
    for task in _ROWS
    if task.name in _CLOZE_PROMPTS
)
TASKS: dict[str, Task] = {task.name: task for task in (*_ROWS, *_IN_CLOZE_FORM)}

GROUPS: dict[str, tuple[str, ...]] = {
    "commonsense": tuple(task.name for task in _ROWS if task.group == "commonsense"),
    "math": ("addsub", "aqua", "multiarith", "gsm8k", "singleeq", "svamp"),
    "summary": ("cnn_dailymail", "xsum", "dailydialog", "multiwoz"),
}


def get_task(name: str) -> Task:
    """Returns the task of that name; ConfigError names the nearest one if there is none."""
    require(name in TASKS, f"unknown task {name!r}: {nearest(name, TASKS)}.")
    return TASKS[name]


def load_examples(task_name: str, split: str, data_config: DataConfig) -> Sequence[Example]:
    """Opens the examples of one split; each is read when it is indexed.

    Args:
      task_name: A key of `TASKS`.
      split: "train", "validation" or "test".
      data_config: data_dir, row_format and train_limit are read. The last keeps the first rows of
        the train split; other splits are not limited.

    Returns:
      A sequence. Indexing raises ConfigError for a row that does not fit the task and names its
      file and number.

    Raises:
      ConfigError: The task or the split is unknown, a directory or file is missing, a row is
        malformed, or there is no example.
    """
    task = get_task(task_name)
    require(split in SPLITS, f"unknown split {split!r}: {nearest(split, SPLITS)}.")
    rows, indices, origin = open_split(task, split, data_config)
    if split == "train":
        indices = indices[: data_config.train_limit]
    require(
        len(indices) > 0,
        f"task {task_name!r}: the {split} split is empty. Give a file with at least one row.",
    )

    def example(index: int) -> Example:
        where = f"{origin}, row {index + 1}"
        try:
            return task.example(rows[index], where)
        except ConfigError as error:
            raise ConfigError(f"task {task_name!r}: {where}: {error}") from error

    return Lazy(example, indices)
