"""Mixtures: several tasks as one dataset, by all their rows or by weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import SPLITS, Example, get_task, load_examples, open_split

_PART = re.compile(r"(?P<name>[^*+]+?)(?:\*(?P<weight>[^*+]+))?")


def parse_mixture(text: str) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Task names and their weights: "boolq+arc_easy" has none, "boolq*1+arc_easy*3" has (1.0, 3.0).

    Raises:
      ConfigError: unknown task, a task named twice, a weight that is no positive number, or weights
        for some tasks only.
    """
    parts = [_PART.fullmatch(part.strip()) for part in text.split("+")]
    require(
        all(parts),
        f"data.task={text!r}: expected a task, or a mixture such as 'boolq+arc_easy' or, with"
        " weights for all, 'boolq*1+arc_easy*3'.",
    )
    names = tuple(part["name"].strip() for part in parts if part)
    for name in names:
        get_task(name)
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


@dataclass(frozen=True)
class Mixture(Sequence[Example]):
    """The examples of several tasks, one task after the other. weights: how often training draws
    from each; None means by rows.
    """

    names: tuple[str, ...]
    parts: tuple[Sequence[Example], ...]
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        for part in self.parts:
            if 0 <= index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError("mixture index out of range")


def load_mixture(data: DataConfig, split: str, limit: int | None = None) -> Mixture:
    """The split of `data.task`, a task or a mixture of tasks.

    limit: examples in all, the first of each task, the same number from each as far as they go.
    data.train_limit holds for each task of the train split. Raises ConfigError as `parse_mixture`
    and `data.tasks.load_examples` do.
    """
    names, weights = parse_mixture(data.task)
    parts = [load_examples(name, split, data) for name in names]
    if limit is not None:
        left = limit
        shares = {}
        for done, i in enumerate(
            sorted(range(len(parts)), key=lambda i: len(parts[i]))
        ):  # short tasks leave their room to the others
            shares[i] = min(len(parts[i]), -(-left // (len(parts) - done)))
            left -= shares[i]
        parts = [part[: shares[i]] for i, part in enumerate(parts)]
    return Mixture(names, tuple(parts), weights if split == "train" else None)


@dataclass(frozen=True)
class TrainedOn:
    """Training data in which test questions are looked for.

    here: this project trained on it and so left the rows that it holds out alone; a model trained
    elsewhere may have seen every row of the files.
    """

    data: DataConfig
    here: bool = True


def source_splits(data: DataConfig) -> list[tuple[str, str, Sequence[Example]]]:
    """(task, split, rows) of every split that comes from the files (or datasets) of the train split
    of `data.task`, that one first: with the rows held out of those files, all that is in them.
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
