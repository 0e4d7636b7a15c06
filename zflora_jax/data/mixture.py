"""Mixtures: several tasks as one dataset, drawn by their number of rows or by weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.joined import Joined
from zflora_jax.data.sources import files_digest, find_files
from zflora_jax.data.task import FileTask
from zflora_jax.data.tasks import SPLITS, Example, get_task, load_examples, open_split

_PART = re.compile(r"(?P<name>[^*+]+?)(?:\*(?P<weight>[^*+]+))?")


def parse_mixture(text: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Parse the text of `data.task`.

    Args:
      text: "boolq+arc_easy", or with weights "boolq*1+arc_easy*3".

    Returns:
      (Task names, their weights or None.)

    Raises:
      ConfigError: a task is unknown or named twice, a weight is not a positive number, or only some
        tasks have one.
    """
    parts = [_PART.fullmatch(part.strip()) for part in text.split("+")]
    require(
        all(parts),
        f"data.task={text!r}: expected a task, or a mixture such as 'boolq+arc_easy' or, with"
        " weights for all, 'boolq*1+arc_easy*3'.",
    )
    names = tuple(part["name"].strip() for part in parts if part)
    names = tuple(get_task(name).name for name in names)  # of today
    require(
        len(set(names)) == len(names),
        f"data.task={text!r} names a task twice; give it a weight instead.",
    )
    written = [part["weight"] for part in parts if part and part["weight"] is not None]
    if not written:
        return names, None
    require(
        len(written) == len(names),
        f"data.task={text!r}: weights for some tasks only. Give one to each, or to none (then all"
        " rows are used).",
    )
    return names, tuple(_weight(w, text) for w in written)


def _weight(written: str, text: str) -> float:
    try:
        weight = float(written)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"data.task={text!r}: weight {written!r} is not a positive number.")
    return weight


def has_own_rows(names: Iterable[str]) -> bool:
    """Whether a task of these names has rows of the user's own."""
    return any(get_task(name).own for name in names)


def own_rows_digest(data: DataConfig, names: Iterable[str]) -> str | None:
    """A hash of the files, of all splits, that tasks of these names read as the user's own rows.

    Returns:
      None if there are no such tasks, or data.data_dir is no place here (a named dataset, or gone).

    Raises:
      ConfigError: files are there, and it is not clear which are meant.
    """
    if data.data_dir is None or not Path(data.data_dir).expanduser().exists():
        return None
    files = [
        find_files(task.name, task.source, data.data_dir)
        for task in map(get_task, sorted(set(names)))
        if isinstance(task, FileTask) and task.own
    ]
    paths = [path for splits in files for _, found in splits.values() for path in found]
    return files_digest(paths) if paths else None


@dataclass(frozen=True)
class Mixture(Joined[Example]):
    """The examples of several tasks, one task after the other.

    Attributes:
      names: of the tasks.
      parts: the examples of each task.
      weights: how often training draws from each task; None: by number of rows.
    """

    names: tuple[str, ...]
    parts: tuple[Sequence[Example], ...]
    weights: tuple[float, ...] | None = None


def load_mixture(data: DataConfig, split: str, limit: int | None = None) -> Mixture:
    """Load a split of `data.task`, a task or a mixture of tasks.

    Args:
      data: task, data_dir, row_format and train_limit are read; train_limit holds for each task,
        row_format for rows of one's own.
      split: "train", "validation" or "test".
      limit: number of examples in all: the first of each task, the same number from each as far as
        it has them. None: all.

    Raises:
      ConfigError: as for `parse_mixture` and `data.tasks.load_examples`; to train with a row_format
        and without rows of one's own.
    """
    names, weights = parse_mixture(data.task)
    require(
        split != "train" or data.row_format is None or has_own_rows(names),
        f"data.row_format={data.row_format!r} is for rows of your own (data.task='rows'); those of"
        f" {data.task!r} have one form.",
    )
    parts = [load_examples(name, split, data) for name in names]
    if limit is not None:
        left = limit
        shares = {}
        # Short tasks come first and leave their room to the others.
        for done, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i]))):
            shares[i] = min(len(parts[i]), -(-left // (len(parts) - done)))
            left -= shares[i]
        parts = [part[: shares[i]] for i, part in enumerate(parts)]
    return Mixture(names, tuple(parts), weights if split == "train" else None)


@dataclass(frozen=True)
class TrainedOn:
    """Training data in which test questions are looked for.

    Attributes:
      data: its settings.
      here: whether this project trained on it, and so left out the rows that it holds out; a model
        trained elsewhere may have seen every row of the files.
    """

    data: DataConfig
    here: bool = True


def source_splits(data: DataConfig) -> list[tuple[str, str, Sequence[Example]]]:
    """Open every split that comes from the same files or datasets as the train split of
    `data.task`.

    With the rows held out of those files, these are all rows in them.

    Args:
      data: task and data_dir are read.

    Returns:
      (task, split, examples) of each, a task's train split first.
    """
    found = []
    for name in parse_mixture(data.task)[0]:
        source = open_split(get_task(name), "train", data).origin
        for split in SPLITS:
            try:
                same = open_split(get_task(name), split, data).origin == source
            except ConfigError:  # no such split
                continue
            found += [(name, split, load_examples(name, split, data))] if same else []
    return found
