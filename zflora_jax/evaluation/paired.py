"""Paired comparisons of two methods on the same rows: differences with their 95% intervals over
seeds and rows, and Holm's correction over a family of comparisons.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.evaluation.units import Column, by_unit


@dataclass(frozen=True)
class Difference:
    """A method's mean score less that of a reference.

    Attributes:
      mean: of the differences.
      low, high: the ends of its 95% interval.
      p: two-sided, of no difference.
      seeds: how many it is over.
      seed_std: the standard deviation between seeds, less what the noise of single answers (of a
        dialogue's answers together) explains of it; 0 where these seeds show none, None of a single
        seed and of losses.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int = 1
    seed_std: float | None = None

    @property
    def of_rows_alone(self) -> bool:
        """Whether the interval of several seeds is no wider than that of their rows."""
        return self.seed_std == 0

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_difference(
    method: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    seed: int = 0,
    resamples: int = 10_000,
    best: float = 1.0,
    units: Sequence[Sequence[int] | None] | None = None,
) -> Difference:
    """The mean difference of two methods, and how far rows and seeds can move it.

    Rows are drawn with replacement, each with the runs of all seeds (a paired bootstrap), and
    those of a unit, such as the turns of one dialogue, together. What other seeds would change
    beyond that is added: the variance between seeds, less what the noise of single answers
    explains of it (a two-way analysis of variance), with Student's t of one degree of freedom
    less than there are seeds. Runs of the same seed share their data order and are paired. In
    simulations of three seeds the intervals hold the true difference 91 to 97% of the time,
    whichever of the two varies more (`results/paired_intervals.md`); this project's
    construction. Few rows are not certainty: where no row of a task speaks for one of the two
    methods, the interval is widened to that side by the rule of three, and p is no smaller than
    that of a sign test.

    Args:
      method: for each task the scores of its rows, [S seeds, R rows]; all tasks have the same seeds
        and count the same. With one seed the interval is that of the rows alone.
      reference: likewise, of the same seeds and rows.
      seed: of the random numbers.
      resamples: drawn.
      best: the score of a row that is right.
      units: for each task the number of each row's unit [R], or None where each row is alone, as in
        all tasks by default.

    Returns:
      The difference, in the unit of the scores.

    Raises:
      ConfigError: the shapes differ, there is no row, or units are not of these rows.
    """
    gaps = _gaps(method, reference)
    seeds = len(gaps[0])
    units = [None] * len(gaps) if units is None else units
    require(len(units) == len(gaps), f"got units of {len(units)} tasks, and {len(gaps)} tasks.")
    columns = [by_unit(gap, of) for gap, of in zip(gaps, units, strict=True)]
    drawn, order = _draws(tuple(len(column.rows) for column in columns), resamples, seed)
    means = np.zeros(resamples)
    for column, counts in zip(columns, drawn, strict=True):
        means += counts @ column.sums.mean(axis=0) / (counts @ column.rows) / len(columns)
    seed_std = float(np.sqrt(_variance_of_seeds(columns))) if seeds > 1 else None
    if seed_std:
        means += seed_std / np.sqrt(seeds) * _student(seeds - 1, resamples)[order]
    low, high = np.quantile(means, [0.025, 0.975])
    # Resampling shows nothing of units that none of U was like: at most 3 in U (the rule of three).
    lost, won = (np.mean([_unseen(column.sums, sign) for column in columns]) for sign in (-1, 1))
    low, high = low - lost * (low + best), high + won * (best - high)
    tail = min(np.sum(means <= 0), np.sum(means >= 0)) + 1
    differing = sum(np.count_nonzero(column.sums.mean(axis=0)) for column in columns)
    least = 2.0 ** (1 - differing)  # of a sign test
    p = min(1.0, max(2 * tail / (resamples + 1), least))
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(mean, float(low), float(high), float(p), seeds, seed_std)


def seed_difference(method: Sequence[float], reference: Sequence[float]) -> Difference:
    """The mean difference of a number that each run has one of, such as its loss, with Student's t
    of the seeds: what other rows would change is not in it.

    Args:
      method: its number for each seed, two or more.
      reference: likewise, of the same seeds.

    Raises:
      ConfigError: there are not as many of both, or fewer than two.
    """
    from scipy.special import stdtr, stdtrit

    require(
        len(method) == len(reference) > 1,
        f"paired runs must be of the same seeds, two or more: got {len(method)} and"
        f" {len(reference)}.",
    )
    gaps = np.subtract(method, reference, dtype=np.float64)
    mean, freedom = float(gaps.mean()), len(gaps) - 1
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    reach = float(stdtrit(freedom, 0.975)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    return Difference(mean, mean - reach, mean + reach, p, len(gaps))


def _gaps(method: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The differences of rows, [S, R] of each task; ConfigError where they are no pairs."""
    shapes = [(np.shape(a), np.shape(b)) for a, b in zip(method, reference, strict=True)]
    require(
        bool(shapes) and all(a == b and len(a) == 2 and min(a) > 0 for a, b in shapes),
        f"paired scores must be [seeds, rows] of equal shapes, got {shapes}.",
    )
    seeds = [shape[0] for shape, _ in shapes]
    require(len(set(seeds)) == 1, f"all tasks must have the scores of the same seeds, got {seeds}.")
    return [np.subtract(a, b, dtype=np.float64) for a, b in zip(method, reference, strict=True)]


@functools.lru_cache(maxsize=16)  # a table of T tasks asks for T + 1
def _draws(
    units: tuple[int, ...], resamples: int, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """How often each unit of each task is drawn, [resamples, U] of each, and an order of the
    resamples. Kept: the comparisons of a table are of the same rows, and this takes most of their
    time.
    """
    rng, blocks = np.random.default_rng(seed), [1000] * (resamples // 1000) + [resamples % 1000]

    def times(count: int, block: int) -> np.ndarray:
        # A unit is drawn once in the mean, and never 256 times.
        return rng.multinomial(count, np.full(count, 1 / count), block).astype(np.uint8)

    drawn = [np.concatenate([times(count, block) for block in blocks]) for count in units]
    return drawn, rng.permutation(resamples)


def _unseen(gap: np.ndarray, sign: int) -> float:
    """The share of units that may have a gap of this sign where none of those here [S, U] has."""
    units = gap.mean(axis=0)
    return 0.0 if (sign * units > 0).any() else min(1.0, 3 / len(units))


def _student(freedom: int, count: int) -> np.ndarray:
    """`count` numbers [count] that lie as Student's t distribution does: its quantiles, evenly
    apart. Drawn ones would move the ends of an interval by chance, 3% with 10,000 numbers.
    """
    from scipy.special import stdtrit

    return stdtrit(freedom, (np.arange(count) + 0.5) / count)


def _variance_of_seeds(gaps: Sequence[Column]) -> float:
    """The variance between seeds of the tasks' mean difference, without the share of it that
    the noise of single answers makes. gaps: sums [S, U] of each task, S > 1.
    """
    means = [gap.sums.sum(axis=1) / gap.rows.sum() for gap in gaps]
    noise = 0.0
    for gap, mean in zip(gaps, means, strict=True):
        seeds, units = gap.sums.shape
        left = gap.sums - mean[:, None] * gap.rows  # of a seed's mean
        left -= left.mean(axis=0)
        freedom = (seeds - 1) * max(units - 1, 1)
        noise += np.sum(left**2) / freedom * units / (gap.rows.sum() * len(gaps)) ** 2
    return max(0.0, float(np.mean(means, axis=0).var(ddof=1) - noise))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of a family's p-values (Holm 1979): name -> adjusted p."""
    adjusted, floor = {}, 0.0
    ordered = sorted(p, key=p.__getitem__)
    for rank, name in enumerate(ordered):
        floor = max(floor, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p}


def verdict(difference: Difference, margin: float) -> str:
    """ "as good" where the whole 95% interval lies above -margin (non-inferior), "inferior" where
    it lies below, "worse" where it lies below 0 and reaches across -margin, else "undecided".
    """
    if difference.low > -margin:
        return "as good"
    if difference.high < -margin:
        return "inferior"
    return "worse" if difference.high < 0 else "undecided"
