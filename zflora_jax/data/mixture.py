"""Mixtures: several tasks as one dataset, drawn by their number of rows or by weight."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.lazy import Lazy
from zflora_jax.data.splits import open_split
from zflora_jax.data.tasks import SPLITS, Example, get_task, load_examples

_PART = re.compile(r"\s*([^*+]+?)\s*(?:\*\s*(\d+(?:\.\d*)?|\.\d+)\s*)?")


def parse_mixture(text: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Parses `data.task`, "boolq+arc_easy", or with weights "boolq*1+arc_easy*3", to (task names,
    their weights or None); ConfigError if it has another form or unknown tasks.
    """
    parts = [found.groups() for part in text.split("+") if (found := _PART.fullmatch(part))]
    names = tuple(get_task(name).name for name, _ in parts)
    weights = tuple(float(weight) for _, weight in parts if weight)
    require(
        len(set(names)) == text.count("+") + 1 and len(weights) in (0, len(names)) and all(weights),
        f"data.task={text!r}: expected a task, or a mixture of different tasks such as"
        " 'boolq+arc_easy' or, with a positive weight for each, 'boolq*1+arc_easy*3'.",
    )
    return names, weights or None


def has_own_rows(names: Iterable[str]) -> bool:
    """Returns whether one of these tasks has the user's rows."""
    return any(get_task(name).own for name in names)


class Mixture(Lazy[Example]):
    """The examples (`parts`) of several tasks (`names`), one task after the other. `weights`: Share
    of each in training draws; None: by number of rows.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        parts: Sequence[Sequence[Example]],
        weights: tuple[float, ...] | None = None,
    ) -> None:
        ends = list(accumulate(map(len, parts)))

        def make(index: int) -> Example:
            part = bisect_right(ends, index)
            return parts[part][index - ends[part]]  # from the end of the part: negative

        super().__init__(make, range(ends[-1]))
        self.names, self.parts, self.weights = names, parts, weights


def load_mixture(data: DataConfig, split: str, limit: int | None = None) -> Mixture:
    """Loads a split of `data.task`, a task or a mixture of tasks.

    Args:
      data: Settings, of which task, data_dir, row_format and train_limit (per task) are read.
      split: "train", "validation" or "test".
      limit: Number of examples in all: the first ones of each task, equally many from each if it
        has them. None: all.

    Raises:
      ConfigError: An error of `parse_mixture` or `data.tasks.load_examples`; or row_format is set
        to train on tasks that have one form.
    """
    names, weights = parse_mixture(data.task)
    require(
        split != "train" or data.row_format is None or has_own_rows(names),
        f"data.row_format={data.row_format!r} is for your rows (data.task='rows'); those of"
        f" {data.task!r} have one form.",
    )
    parts = [load_examples(name, split, data) for name in names]
    if limit is not None:
        left = limit
        # Short tasks come first, and the others make up for them.
        for done, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i]))):
            parts[i] = parts[i][: -(-left // (len(parts) - done))]
            left -= len(parts[i])
    return Mixture(names, parts, weights if split == "train" else None)


@dataclass(frozen=True)
class TrainedOn:
    """Training data that is searched for test questions.

    Attributes:
      data: Settings of the training data.
      here: Whether this project trained on it, and so left out its held-out rows.
    """

    data: DataConfig
    here: bool = True


def source_splits(data: DataConfig) -> list[tuple[str, str, Sequence[Example]]]:
    """Opens (task, split, examples) of every split from the same files or datasets as the train
    split of `data.task`, with all of their rows. Each task's train split comes first.
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
