"""Scores of records: means with 95% intervals, of one task and of several.

Rows that belong together, such as the turns of one dialogue, are a unit. Other data would have
other dialogues, so intervals draw whole units: drawing single rows would give too narrow ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.evaluation.records import ROUGE, Record

# For each unit the sum of its rows' scores, [U], and the number of its rows, [U]
Column = tuple[np.ndarray, np.ndarray]
# Key of a record -> name of the score.
SCORES = {
    "correct": "accuracy",
    "correct_sum": "likelihood_sum",
    "correct_norm": "likelihood_norm",
    **{name: name for name in ROUGE},
}
# Keys of the fields that `rows_kept` returns.
ROWS, DIGEST, UNITS = "row scores", "row digest", "row units"
UNIT = "unit"  # key of a record: the number of the unit that its row belongs to
_RESAMPLES = 2000
_Z = 1.96  # standard deviations of a 95% interval


@dataclass(frozen=True)
class Score:
    """A mean over rows and the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def scores_of(records: Sequence[Record], seed: int = 0) -> dict[str, Score]:
    """Returns the scores (see `SCORES`) of a task's records, each over the records that have it,
    with a bootstrap interval over rows.
    """
    return group_scores([records], seed)


def group_scores(tables: Sequence[Sequence[Record]], seed: int = 0) -> dict[str, Score]:
    """Returns the mean over tasks, with equal weights, of each score that all of them have.

    Args:
      tables: The records of each task.
      seed: Seed of the bootstrap, which draws rows within each task.
    """
    found = {}
    for key, name in SCORES.items():
        columns = [_column(table, key) for table in tables]
        if columns and all(len(rows) for _, rows in columns):
            found[name] = bootstrap(columns, seed)
    return found


def as_dicts(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Returns `scores` in the form of files: name -> {"mean", "low", "high"}."""
    return {name: dataclasses.asdict(score) for name, score in scores.items()}


def rows_kept(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the part of one model's records that a comparison of models needs.

    These are the scores of each row (score -> a text of 0s and 1s, or numbers), a digest of the
    questions, and, if rows share units, the number of each row's unit (score -> a text of them).
    """
    scores: dict[str, Any] = {}
    units: dict[str, str] = {}
    for key, name in SCORES.items():
        there = [record for record in records if key in record]
        values = [record[key] for record in there]
        if not values:
            continue
        if isinstance(values[0], bool):
            scores[name] = "".join("01"[value] for value in values)
        else:
            scores[name] = [round(value, 4) for value in values]
        if UNIT in there[0]:
            units[name] = " ".join(str(record[UNIT]) for record in there)
    asked = [(record["prompt"], record["input"], record["answer"]) for record in records]
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    return {ROWS: scores, DIGEST: digest} | ({UNITS: units} if units else {})


def rows_by_kind(records: Sequence[Record], clean_only: bool) -> dict[str, list[Record]]:
    """Returns the rows to score: "all", unless only clean rows are wanted, and "clean" if
    contamination was checked.
    """
    kinds = {} if clean_only else {"all": [*records]}
    if "contaminated" in records[0]:
        kinds["clean"] = [record for record in records if not record["contaminated"]]
    return kinds


# --- units ----------------------------------------------------------------------------------------


def shared_units(names: Sequence[str]) -> list[int] | None:
    """Numbers the units that rows belong to.

    Args:
      names: The unit of each row; "" for a row that belongs to no other.

    Returns:
      One number per row; None if no rows share a unit.
    """
    numbers: dict[str | int, int] = {}
    found = [numbers.setdefault(name or row, len(numbers)) for row, name in enumerate(names)]
    return found if len(numbers) < len(found) else None


def by_unit(scores: np.ndarray, units: Sequence[int] | None) -> Column:
    """Returns the scores of rows by their units.

    Args:
      scores: Scores of the rows, [R].
      units: The number of each row's unit, [R]; None if each row is a unit. If all rows share one
        unit, each row also counts as a unit, because one unit does not show how units differ.
    """
    numbers = np.arange(len(scores)) if units is None else np.asarray(units)
    if len(np.unique(numbers)) < 2:
        numbers = np.arange(len(scores))
    order = np.argsort(numbers, kind="stable")
    _, starts, rows = np.unique(numbers[order], return_index=True, return_counts=True)
    return np.add.reduceat(scores[order], starts), rows


def _column(records: Sequence[Record], key: str) -> Column:
    there = [record for record in records if key in record]
    units = [record[UNIT] for record in there] if there and UNIT in there[0] else None
    return by_unit(np.asarray([float(record[key]) for record in there]), units)


def bootstrap(columns: Sequence[Column], seed: int) -> Score:
    """Returns the mean of the columns' means, and the 2.5% and 97.5% quantiles over resampled
    columns.

    If every row of a column is 0, or every row is 1, all resamples are equal and would claim
    certainty. One such column then gets Wilson's interval; in a mean of several columns, its true
    mean is drawn from the posterior of a uniform prior.

    Args:
      columns: The scores of each task, in [0, 1].
      seed: Seed of the resamples.
    """
    draw = np.random.default_rng(seed)
    means = np.zeros((2, _RESAMPLES))  # for the lower end and the upper one
    for column in columns:
        # A resample is a multinomial draw over the distinct units: their sum and number of rows.
        (sums, rows), counts = np.unique(np.stack(column), axis=1, return_counts=True)
        units = len(column[1])
        times = draw.multinomial(units, counts / units, _RESAMPLES)
        drawn = np.tile(times @ sums / (times @ rows), (2, 1))
        if (sums == rows).all():
            drawn[0] = draw.beta(units + 1, 1, _RESAMPLES)
        elif (sums == 0).all():
            drawn[1] = draw.beta(1, units + 1, _RESAMPLES)
        means += drawn
    means /= len(columns)
    low, high = np.quantile(means[0], 0.025), np.quantile(means[1], 0.975)
    found = [sums.sum() / rows.sum() for sums, rows in columns]
    if len(columns) == 1 and found[0] in (0.0, 1.0):
        reach = _Z**2 / (len(columns[0][1]) + _Z**2)
        low, high = (0.0, reach) if found[0] == 0.0 else (1 - reach, 1.0)
    return Score(float(np.mean(found)), float(low), float(high))
