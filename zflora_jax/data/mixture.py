"""Mixtures: several tasks as one dataset, drawn by their number of rows or by weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.lazy import Joined
from zflora_jax.data.splits import files_digest, find_files, open_split
from zflora_jax.data.tasks import SPLITS, Example, get_task, load_examples

_PART = re.compile(r"\s*(?P<name>[^*+]+?)\s*(?:\*(?P<weight>[^*+]+))?")


def parse_mixture(text: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Parses `data.task`, "boolq+arc_easy", or with weights "boolq*1+arc_easy*3", to (task names,
    their weights or None).

    Raises:
      ConfigError: A task is unknown or named twice, a weight is not a positive number, or only some
        tasks have one.
    """
    parts = [_PART.fullmatch(part) for part in text.split("+")]
    require(
        all(parts),
        f"data.task={text!r}: expected a task, or a mixture such as 'boolq+arc_easy' or, with"
        " weights for all, 'boolq*1+arc_easy*3'.",
    )
    names = tuple(get_task(part["name"]).name for part in parts if part)
    require(
        len(set(names)) == len(names),
        f"data.task={text!r} names a task twice; give it a weight instead.",
    )
    weights = tuple(_weight(part["weight"], text) for part in parts if part and part["weight"])
    require(
        len(weights) in (0, len(names)),
        f"data.task={text!r}: weights for some tasks only. Give one to each, or to none (then all"
        " rows are used).",
    )
    return names, weights or None


def _weight(written: str, text: str) -> float:
    try:
        weight = float(written)
    except ValueError:
        weight = -1.0
    require(
        0 < weight < float("inf"),
        f"data.task={text!r}: weight {written!r} is not a positive number.",
    )
    return weight


def has_own_rows(names: Iterable[str]) -> bool:
    """Returns whether one of these tasks has rows of the user's own."""
    return any(get_task(name).own for name in names)


def own_rows_digest(data: DataConfig, names: Iterable[str]) -> str | None:
    """Returns a hash of the files, of all splits, that tasks of these names read as the user's own
    rows; None without such tasks, or if data.data_dir is no place here. ConfigError if it is not
    clear which files are meant.
    """
    here = data.data_dir is not None and Path(data.data_dir).expanduser().exists()
    if not here or not has_own_rows(names):
        return None
    files = find_files(get_task("rows"), data.data_dir)
    return files_digest(path for _, paths in files.values() for path in paths)


class Mixture(Joined[Example]):
    """The examples of several tasks, one task after the other.

    Attributes:
      names: The tasks.
      parts: The examples of each task.
      weights: How often training draws from each task; None: by number of rows.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        parts: Sequence[Sequence[Example]],
        weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(parts)
        self.names, self.parts, self.weights = names, parts, weights


def load_mixture(data: DataConfig, split: str, limit: int | None = None) -> Mixture:
    """Loads a split of `data.task`, a task or a mixture of tasks.

    Args:
      data: task, data_dir, row_format (for the user's own rows) and train_limit (for each task) are
        read.
      split: "train", "validation" or "test".
      limit: The number of examples in all: the first of each task, the same number from each as far
        as it has them. None: all.

    Raises:
      ConfigError: As for `parse_mixture` and `data.tasks.load_examples`; to train with a row_format
        and without rows of the user's own.
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
        # Short tasks come first and leave what they lack to the others.
        for done, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i]))):
            parts[i] = parts[i][: -(-left // (len(parts) - done))]
            left -= len(parts[i])
    return Mixture(names, parts, weights if split == "train" else None)


@dataclass(frozen=True)
class TrainedOn:
    """Training data in which test questions are looked for.

    Attributes:
      data: Its settings.
      here: Whether this project trained on it, and so left out the rows that it holds out; a model
        trained elsewhere may have seen every row of the files.
    """

    data: DataConfig
    here: bool = True


def source_splits(data: DataConfig) -> list[tuple[str, str, Sequence[Example]]]:
    """Opens (task, split, examples) of every split that comes from the same files or datasets as
    the train split of `data.task`, each task's train split first. With the rows held out of those
    files, these are all rows in them.
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
