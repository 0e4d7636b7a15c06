"""What a table of records scores: means with their 95% intervals, of one task, of several, and of a
method over its seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
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


# --- a suite of tasks, over seeds -----------------------------------------------------------------


@dataclass(frozen=True)
class SuiteScore:
    """What a model scored on the clean rows of several tasks, or what a method did: the mean over
    its models of several seeds.

    Attributes:
      headline: the score that the tasks' mean is taken of.
      table: score -> task -> value and interval, in percent.
      rows: task -> clean rows.
      counted: score -> task -> those of them that have the score, which it is over.
      mean: of the headline over the tasks, in percent.
      std: the standard deviation of the seeds' means; None of one seed.
      answers_cut: task -> answers that reached the limit of new tokens.
      chance: task -> percent right by guessing.
    """

    headline: str
    table: dict[str, dict[str, Score]]
    rows: dict[str, int]
    counted: dict[str, dict[str, int]]
    mean: float
    std: float | None
    answers_cut: dict[str, float]
    chance: dict[str, float]

    @property
    def headline_scores(self) -> dict[str, Score]:
        return self.table[self.headline]

    def fields(self) -> dict[str, Any]:
        """As the JSON of a comparison holds it."""
        return {
            "scores": {task: score.mean for task, score in self.headline_scores.items()},
            "all scores": {
                kind: {task: score.mean for task, score in tasks.items()}
                for kind, tasks in self.table.items()
            },
            "intervals": {
                kind: {task: [score.low, score.high] for task, score in tasks.items()}
                for kind, tasks in self.table.items()
            },
            "headline": self.headline,
            "mean": self.mean,
            "std": self.std,
            "rows": self.rows,
            "cut": self.answers_cut,
            "chance": self.chance,
        }


def suite_score(
    seeds: Sequence[Mapping[str, Any]], measure: str = "", over: Sequence[str] = ()
) -> SuiteScore:
    """The scores of one method.

    Args:
      seeds: per seed, task -> what its record keeps (`suite.kept_scores`). At least one.
      measure: the headline; "": accuracy where answers were generated, else the first score.
      over: the tasks that the mean is over; empty: all of them.

    Raises:
      ConfigError: no task was scored at all, or none has the measure.
    """
    first = seeds[0]
    clean = [{task: found["scores"]["clean"] for task, found in one.items()} for one in seeds]
    kinds = list(dict.fromkeys(kind for scores in clean[0].values() for kind in scores))
    require(
        bool(kinds),
        "nothing was scored: no task has a clean row, or scoring switches off all that the tasks"
        " have.",
    )

    def over_seeds(task: str, kind: str) -> Score:
        return Score(
            *(100 * mean(one[task][kind][end] for one in clean) for end in ("mean", "low", "high"))
        )

    table = {
        kind: {task: over_seeds(task, kind) for task in first if kind in clean[0][task]}
        for kind in kinds
    }
    head = measure or ("accuracy" if "accuracy" in kinds else kinds[0])
    require(
        head in table,
        f"measure {head!r}: the tasks were scored by {', '.join(kinds)} alone. Choose one of them,"
        " or switch on what it needs (eval.generate, eval.likelihood).",
    )
    without = [task for task in over if task not in table[head]]
    require(
        not without,
        f"measure {head!r}: {', '.join(without)} has no such score on clean rows. Compare tasks of"
        " one kind, with questions that are not in the training data.",
    )
    counted = [task for task in table[head] if task in (over or table[head])]
    means = [100 * mean(one[task][head]["mean"] for task in counted) for one in clean]
    return SuiteScore(
        headline=head,
        table=table,
        rows={task: found["clean_rows"] for task, found in first.items()},
        counted={kind: {t: _counted(first[t], kind) for t in of} for kind, of in table.items()},
        mean=mean(means),
        std=stdev(means) if len(means) > 1 else None,
        answers_cut={
            task: mean(one[task]["answers_cut"] for one in seeds)
            for task, found in first.items()
            if "answers_cut" in found
        },
        chance={task: 100 * found["chance"] for task, found in first.items() if "chance" in found},
    )


def _counted(found: Mapping[str, Any], kind: str) -> int:
    """How many clean rows of a task have a score; records without those of rows: all clean rows."""
    return len(found[ROWS][kind]) if kind in found.get(ROWS, {}) else found["clean_rows"]
