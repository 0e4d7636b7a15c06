"""Differences of two methods on the same rows and seeds, with their 95% intervals."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Difference:
    """A method's mean score minus the reference's.

    Attributes:
      mean: Mean of the differences.
      low, high: Ends of the 95% interval.
      p: Two-sided p-value of no difference.
      seeds: Number of seeds.
      seed_std: Standard deviation between seeds beyond the noise of single answers; 0 where these
        seeds show none, None for a single seed and for losses.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int = 1
    seed_std: float | None = None

    @property
    def of_rows_only(self) -> bool:
        """Whether the interval of several seeds is no wider than that of their rows."""
        return self.seed_std == 0

    def __str__(self) -> str:
        mark = " °" if self.of_rows_only else ""
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]{mark}"

    def losses(self) -> str:
        """A difference of losses as a table shows it."""
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


class Column(NamedTuple):
    """Sums of a task's scores over the rows of each unit [S seeds, U], and rows per unit [U]."""

    sums: np.ndarray
    rows: np.ndarray


def by_unit(scores: np.ndarray, units: Sequence[int] | None) -> Column:
    """Sums the scores of rows [S, R] that belong together, such as the turns of a dialogue, by the
    unit number of each row [R]; None: each row is a unit. Rows of a single unit are units of their
    own, because one unit does not show how units differ.
    """
    ids = np.arange(scores.shape[-1]) if units is None else np.asarray(units)
    if len(ids) != scores.shape[-1]:
        raise ValueError(f"got {len(ids)} unit numbers for {scores.shape[-1]} rows.")
    _, inverse = np.unique(ids, return_inverse=True)
    if not inverse.any():
        inverse = np.arange(len(ids))
    sums = np.stack([np.bincount(inverse, weights=row) for row in scores])
    return Column(sums, np.bincount(inverse))


def paired_difference(
    method: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    seed: int = 0,
    resamples: int = 10_000,
    best: float = 1.0,
    units: Sequence[Sequence[int] | None] | None = None,
) -> Difference:
    """The mean difference of two methods, and how far rows and seeds can move it.

    Units are drawn with replacement, each with the runs of all seeds (a paired bootstrap). What
    other seeds would change beyond that is added: the variance between seeds minus the share that
    the noise of single answers explains (a two-way analysis of variance), with Student's t of one
    degree of freedom less than seeds. Runs of the same seed share their data order and are paired.
    In simulations of three seeds the intervals hold the true difference 91 to 97% of the time
    (results/paired_intervals.md); this project's construction. Where no row of a task speaks for
    one of the two methods, the interval is widened to that side by the rule of three, and p is no
    smaller than that of a sign test.

    Args:
      method: Scores of each task's rows, [S seeds, R rows]. All tasks have the same seeds and count
        the same. With one seed the interval is that of the rows.
      reference: Scores of the reference, of the same seeds and rows.
      seed: Seed of the resamples.
      resamples: Number of resamples.
      best: Score of a row that is right.
      units: Unit numbers of each task's rows, see `by_unit`; None: each row is a unit.

    Returns:
      The difference, in the unit of the scores.

    Raises:
      ValueError: the shapes differ, or there is no row.
    """
    gaps = _gaps(method, reference)
    seeds = len(gaps[0])
    columns = [by_unit(*pair) for pair in zip(gaps, units or [None] * len(gaps), strict=True)]
    drawn, order = _draws(tuple(len(column.rows) for column in columns), resamples, seed)
    means = np.zeros(resamples)
    for column, counts in zip(columns, drawn, strict=True):
        means += _resampled(column, counts) / len(columns)
    seed_std = float(np.sqrt(_variance_of_seeds(columns))) if seeds > 1 else None
    if seed_std:
        # Quantiles of t: drawn ones would move the ends by chance, 3% with 10,000 draws.
        student = stdtrit(seeds - 1, (np.arange(resamples) + 0.5) / resamples)
        means += seed_std / np.sqrt(seeds) * student[order]
    low, high = np.quantile(means, [0.025, 0.975])
    # Resampling shows nothing of units that none of U was like: at most 3 in U (the rule of three).
    lost, won = (np.mean([_unseen(column.sums, sign) for column in columns]) for sign in (-1, 1))
    low, high = low - lost * (low + best), high + won * (best - high)
    tail = min(np.sum(means <= 0), np.sum(means >= 0)) + 1
    differing = sum(np.count_nonzero(column.sums.mean(axis=0)) for column in columns)
    sign_test = 2.0 ** (1 - differing)
    p = min(1.0, max(2 * tail / (resamples + 1), sign_test))
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(mean, float(low), float(high), float(p), seeds, seed_std)


def seed_difference(method: Sequence[float], reference: Sequence[float]) -> Difference:
    """The mean difference of a value per run, such as its loss: Student's t over seeds.

    Where all seeds have the same gap, up to the rounding of float32, nothing is known of how seeds
    differ: the interval is without ends, and p is that of a sign test.

    Args:
      method: The value of each seed's run, two or more.
      reference: The reference's values, of the same seeds.
    """
    if not len(method) == len(reference) > 1:
        raise ValueError(
            f"paired runs must have the same seeds, two or more: got {len(method)} and"
            f" {len(reference)}."
        )
    gaps = np.subtract(method, reference, dtype=np.float64)
    mean = float(gaps.mean())
    rounding = np.finfo(np.float32).eps * float(np.max(np.abs([method, reference])))
    if np.abs(gaps).max() <= rounding:
        return Difference(mean, mean, mean, 1.0, len(gaps))
    if np.ptp(gaps) <= rounding:
        return Difference(mean, -np.inf, np.inf, 2.0 ** (1 - len(gaps)), len(gaps))
    found = ttest_rel(method, reference)
    ends = found.confidence_interval(0.95)
    return Difference(mean, float(ends.low), float(ends.high), float(found.pvalue), len(gaps))


def _gaps(method: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The differences of rows, [S, R] of each task."""
    shapes = [(np.shape(a), np.shape(b)) for a, b in zip(method, reference, strict=True)]
    alike = all(a == b and len(a) == 2 and min(a) > 0 for a, b in shapes)
    if not shapes or not alike or len({a[0] for a, _ in shapes}) > 1:
        raise ValueError(f"paired scores must be [seeds, rows] of equal seeds, got {shapes}.")
    return [np.subtract(a, b, dtype=np.float64) for a, b in zip(method, reference, strict=True)]


@functools.lru_cache(maxsize=16)  # the comparisons of a table share their rows
def _draws(
    units: tuple[int, ...], resamples: int, seed: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """How often each unit of each task is drawn, [resamples, U], and an order of the resamples."""
    rng, blocks = np.random.default_rng(seed), [1000] * (resamples // 1000) + [resamples % 1000]

    def times(count: int, block: int) -> np.ndarray:
        # A unit is drawn once in the mean, and never 256 times.
        return rng.multinomial(count, np.full(count, 1 / count), block).astype(np.uint8)

    drawn = [np.concatenate([times(count, block) for block in blocks]) for count in units]
    return drawn, rng.permutation(resamples)


def _resampled(column: Column, counts: np.ndarray) -> np.ndarray:
    """The mean score of each resample. counts: Draws of each unit, uint8 [resamples, U]."""
    scores, found = column.sums.mean(axis=0), []
    for start in range(0, len(counts), 100):  # products would make floats of all counts
        block = counts[start : start + 100].astype(np.float64)
        found.append(block @ scores / (block @ column.rows))
    return np.concatenate(found)


def _unseen(gap: np.ndarray, sign: int) -> float:
    """The share of units that may have a gap of this sign where none of these [S, U] has."""
    units = gap.mean(axis=0)
    return 0.0 if (sign * units > 0).any() else min(1.0, 3 / len(units))


def _variance_of_seeds(gaps: Sequence[Column]) -> float:
    """The variance between seeds of the tasks' mean difference, minus the share that the noise of
    single answers makes. gaps: sums [S, U] of each task, S > 1.
    """
    means = [gap.sums.sum(axis=1) / gap.rows.sum() for gap in gaps]
    noise = 0.0
    for gap, mean in zip(gaps, means, strict=True):
        seeds, units = gap.sums.shape
        left = gap.sums - mean[:, None] * gap.rows
        left -= left.mean(axis=0)
        freedom = (seeds - 1) * max(units - 1, 1)
        noise += np.sum(left**2) / freedom * units / (gap.rows.sum() * len(gaps)) ** 2
    return max(0.0, float(np.mean(means, axis=0).var(ddof=1) - noise))


def verdict(difference: Difference, margin: float) -> str:
    """ "as good" where the whole interval lies above -margin (non-inferior), "inferior" where it
    lies below, "worse" where it lies below 0 and reaches across -margin, else "undecided".
    """
    if difference.low > -margin:
        return "as good"
    if difference.high < -margin:
        return "inferior"
    return "worse" if difference.high < 0 else "undecided"
