"""What a table of records scores: means with their 95% intervals, of one task and of several."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.evaluation.records import ROUGE, Record
from zflora_jax.evaluation.units import Column, by_unit

# Key of a record -> name of the score.
SCORES = {
    "correct": "accuracy",
    "correct_sum": "likelihood_sum",
    "correct_norm": "likelihood_norm",
    **{name: name for name in ROUGE},
}
# The places of what `rows_kept` returns.
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

    def percent(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def scores_of(records: Sequence[Record], seed: int = 0) -> dict[str, Score]:
    """The scores that some of `records` have, each over those that have it.

    Args:
      records: of one task.
      seed: of the bootstrap over rows.

    Returns:
      name of the score (see `SCORES`) -> share of rows (of ROUGE: mean F-measure) and interval.
    """
    columns = {key: _column(records, key) for key in SCORES}
    return {
        SCORES[key]: bootstrap([found], seed) for key, found in columns.items() if len(found.rows)
    }


def group_scores(tables: Sequence[Sequence[Record]], seed: int = 0) -> dict[str, Score]:
    """The mean over tasks, each counted the same, of every score that all of them have.

    Args:
      tables: the records of each task.
      seed: of the bootstrap, which draws rows within each task.
    """
    columns = {key: [_column(table, key) for table in tables] for key in SCORES}
    return {
        SCORES[key]: bootstrap(some, seed)
        for key, some in columns.items()
        if some and all(len(column.rows) for column in some)
    }


def row_scores(records: Sequence[Record]) -> dict[str, Any]:
    """Score -> its values over the `records` that have it, in their order: shares as a text of 0
    and 1, other values as numbers of four digits. Which rows have a score is a matter of the rows.
    """
    found: dict[str, Any] = {}
    for key, name in SCORES.items():
        if values := [record[key] for record in records if key in record]:
            found[name] = (
                "".join("01"[value] for value in values)
                if isinstance(values[0], bool)
                else [round(value, 4) for value in values]
            )
    return found


def digest(records: Sequence[Record]) -> str:
    """Names the rows of `records`, so that rows are compared with themselves alone."""
    asked = [(record["prompt"], record["input"], record["answer"]) for record in records]
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def rows_kept(records: Sequence[Record]) -> dict[str, Any]:
    """What a comparison needs of a model's records: the scores of each row, their digest, and where
    rows belong together the number of each row's unit (score -> a text of them).
    """
    kept = {ROWS: row_scores(records), DIGEST: digest(records)}
    units = {
        name: " ".join(str(record[UNIT]) for record in records if key in record)
        for key, name in SCORES.items()
        if name in kept[ROWS] and UNIT in records[0]
    }
    return kept | ({UNITS: units} if units else {})


def as_dicts(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """`scores` as files hold them: name -> {"mean", "low", "high"}."""
    return {name: dataclasses.asdict(score) for name, score in scores.items()}


def _column(records: Sequence[Record], key: str) -> Column:
    there = [record for record in records if key in record]
    units = [record[UNIT] for record in there] if there and UNIT in there[0] else None
    return by_unit(np.asarray([float(record[key]) for record in there]), units)


def bootstrap(columns: Sequence[Column], seed: int) -> Score:
    """The mean of the columns' means; its interval: the 2.5% and 97.5% quantiles over resampled
    columns. Rows of a unit are drawn together.

    Where every row of a column is 0, or every row 1, all resamples are equal and would claim
    certainty. The interval of one such column is Wilson's; in a mean of several, its truth is drawn
    from the posterior of a uniform prior.

    Args:
      columns: of each task, the sums [U] of scores in [0, 1] and the numbers of rows [U].
      seed: of the resamples.
    """
    draw = np.random.default_rng(seed)
    means = np.zeros((2, _RESAMPLES))  # for the lower end and the upper one
    for column in columns:
        # A resample is a multinomial draw over the distinct units: their sum and number of rows.
        (sums, rows), counts = np.unique(np.stack(column), axis=1, return_counts=True)
        units = len(column.rows)
        times = draw.multinomial(units, counts / units, _RESAMPLES)
        drawn = np.tile(times @ sums / (times @ rows), (2, 1))
        # Where all rows have the same score of 0 or 1, resampling does not show that others have
        # another: the truth is drawn from its posterior.
        if (sums == rows).all():
            drawn[0] = draw.beta(units + 1, 1, _RESAMPLES)
        elif (sums == 0).all():
            drawn[1] = draw.beta(1, units + 1, _RESAMPLES)
        means += drawn
    means /= len(columns)
    low, high = np.quantile(means[0], 0.025), np.quantile(means[1], 0.975)
    found = [column.sums.sum() / column.rows.sum() for column in columns]
    if len(columns) == 1 and found[0] in (0.0, 1.0):
        reach = _Z**2 / (len(columns[0].rows) + _Z**2)  # Wilson's interval, which needs no draws
        low, high = (0.0, reach) if found[0] == 0.0 else (1 - reach, 1.0)
    return Score(float(np.mean(found)), float(low), float(high))
