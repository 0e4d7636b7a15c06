"""The tasks, and the examples of their splits. A new task is one more row of `TASKS`.

`GROUPS` are the tasks of the paper. Its abstract counts 18 in three categories: the 8 commonsense
and 6 math tasks are LLM-Adapters'. The abstract does not name the four of "summary-dialogue"; the
four here are this project's choice: news (CNN/DailyMail, XSum) and dialogue (DailyDialog and
MultiWOZ, where the answer is the next reply). DialogSum, SAMSum and WOZ 2.0 are in `TASKS` too, and
so are the multiple-choice tasks in cloze form (`data.cloze`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import answers
from zflora_jax.data.answers import PARSERS, Kind, numbers, parse_number, same_number, stated
from zflora_jax.data.cloze import CLOZE, ClozeTask
from zflora_jax.data.sources import SPLITS, TRAINING_SETS, Format, Source, named
from zflora_jax.data.splits import HOLD_OUT, Split
from zflora_jax.data.task import Example, FileTask, Generated, Task

log = logging.getLogger(__name__)

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


# --- rows of the table ---------------------------------------------------------------------------


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
    folder: str = "",
    public: bool = True,
    document: bool = False,
) -> Task:
    return FileTask(
        name,
        "summary",
        kind,
        Source(folder or name, (format, named(format.builder)), origin=origin, public=public),
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
_SUMMARIES, _DIALOGUES = named("summary_json"), named("dialogue_json")
_DIALOGSUM = named("summary_json", "dialogsum.{}")
# Trained on its 500 dev rows, where the 12,460 of train are too many or not there.
_DEV = Format("summary_json", {"train": ("dialogsum.dev",), "test": ("dialogsum.test",)})
_SAMSUM = "https://arxiv.org/src/1911.12237v2/anc/corpus.7z"
_GITHUB = "https://github.com/"
_GSM8K = Source("gsm8k", anywhere=True, origin=_GITHUB + "openai/grade-school-math", public=True)
_WOZ = _GITHUB + "nmrksic/neural-belief-tracker"

_ROWS: tuple[Task, ...] = (
    Generated("arithmetic", "other", answers.NUMBER, "arithmetic:Arithmetic"),
    Generated("arithmetic_steps", "other", answers.NUMBER, "steps:ArithmeticSteps"),
    FileTask("rows", "other", answers.ANY, Source("", (named("rows"),), anywhere=True)),
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
    FileTask("gsm8k", "math", answers.NUMBER, _GSM8K),
    _math("singleeq", "SingleEq"),
    _math("svamp", "SVAMP"),
    _math("mawps", "mawps", answers.NUMBER, _MAWPS_EQUATIONS, test_only=False),
    _summary("cnn_dailymail", _SUMMARIES, _GITHUB + "abisee/cnn-dailymail", document=True),
    _summary("xsum", _SUMMARIES, _GITHUB + "EdinburghNLP/XSum", document=True),
    _summary("samsum", _SUMMARIES, _SAMSUM, document=True),
    _summary("dialogsum", _DIALOGSUM, _GITHUB + "cylnlp/dialogsum", document=True),
    _summary(
        "dialogsum_dev",
        _DEV,
        _GITHUB + "cylnlp/dialogsum",
        folder="dialogsum",
        public=False,
        document=True,
    ),
    _summary("dailydialog", _DIALOGUES, "http://yanran.li/dailydialog"),
    _summary("multiwoz", _DIALOGUES, _GITHUB + "budzianowski/multiwoz"),
    _summary("woz", named("woz_json", "woz_{}_en"), _WOZ, answers.BELIEF, public=False),
    _training("math_data"),
    _training("math_7k"),
    _training("math_10k"),
    _training("math_14k"),
    _training("math_50k"),
    _training("commonsense_15k"),
    _training("commonsense_170k"),
)
_QUESTION = "Question: {}\nAnswer:"
# Of a task in cloze form its prompt.
_FORMS = {
    "piqa": _QUESTION,
    "social_i_qa": "Q: {}\nA:",
    "hellaswag": "{}",
    "winogrande": "{}",
    "arc_easy": _QUESTION,
    "arc_challenge": _QUESTION,
    "openbookqa": "{}",
}
_IN_CLOZE_FORM = tuple(
    ClozeTask(task.name + CLOZE, task.group, answers.TEXT, task.source, form=_FORMS[task.name])
    for task in _ROWS
    if isinstance(task, FileTask) and task.name in _FORMS
)
TASKS: dict[str, Task] = {task.name: task for task in (*_ROWS, *_IN_CLOZE_FORM)}
RENAMED = {"json": "rows"}  # names of before

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
    """The task of that name; ConfigError that suggests the nearest name where there is none."""
    name = RENAMED.get(name, name)
    require(name in TASKS, f"unknown task {name!r}: {nearest(name, TASKS)}.")
    return TASKS[name]


def open_split(task: Task, split: str, data: DataConfig) -> Split:
    """Open the rows of a split of `task`; see `Task.split`."""
    folders = {t.source.folder.lower() for t in TASKS.values() if isinstance(t, FileTask)}
    return task.split(split, data, folders)


def load_examples(task_name: str, split: str, data_config: DataConfig) -> Sequence[Example]:
    """Open the examples of one split; each is read when it is indexed.

    Args:
      task_name: a key of `TASKS`.
      split: "train", "validation" or "test".
      data_config: data_dir, row_format and train_limit are read. The last keeps the first rows of
        the train split; other splits are not limited.

    Returns:
      A sequence. Indexing raises ConfigError for a row that does not fit the task and names its
      file and number.

    Raises:
      ConfigError: the task or the split is unknown, a directory or file is missing, a row is
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
    examples = _Examples(task, Split(rows, indices, origin))
    if task.own:
        form = examples[0].form  # of the first; `zflora data` counts those of all files
        log.info("%s, %s: rows of the form %r (data.row_format)", origin, split, form)
    return examples


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
        where = f"{origin}, row {number + 1}"
        try:
            return replace(self._task.example(rows[number]), where=where)
        except ConfigError as error:
            raise ConfigError(f"task {self._task.name!r}: {where}: {error}") from error
