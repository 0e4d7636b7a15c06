"""Paired comparisons of two methods on the same rows: differences with their 95% intervals over
seeds and rows, and Holm's correction over a family of comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zflora_jax.core.fields import require


@dataclass(frozen=True)
class Difference:
    """A method's mean score less that of a reference.

    Attributes:
      mean: of the differences.
      low, high: the ends of its 95% interval.
      p: two-sided, of no difference.
    """

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_difference(
    method: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    seed: int = 0,
    resamples: int = 10_000,
) -> Difference:
    """The mean difference of two methods, and how far seeds and rows can move it.

    The bootstrap draws seeds and rows, each with replacement and independently (Owen, "The
    pigeonhole bootstrap", 2007, section 3): a run of one seed counts on all rows, a row in the runs
    of all seeds. Runs of the same seed share their data order and are paired. The variance of the
    seeds that a bootstrap of S seeds sees is (S - 1) / S of theirs, so that resamples' deviations
    from their mean over rows are enlarged by its inverse root.

    Args:
      method: for each task the scores of its rows, [S seeds, R rows]; all tasks have the same seeds
        and count the same.
      reference: likewise, of the same seeds and rows.
      seed: of the bootstrap.
      resamples: of the bootstrap.

    Raises:
      ConfigError: the shapes differ, or there is no row.
    """
    shapes = [(np.shape(a), np.shape(b)) for a, b in zip(method, reference, strict=True)]
    require(
        bool(shapes) and all(a == b and len(a) == 2 and min(a) > 0 for a, b in shapes),
        f"paired scores must be [seeds, rows] of equal shapes, got {shapes}.",
    )
    gaps = [np.subtract(a, b, dtype=np.float64) for a, b in zip(method, reference, strict=True)]
    seeds = len(gaps[0])
    require(
        all(len(gap) == seeds for gap in gaps),
        f"all tasks must have the scores of the same seeds, got {[len(gap) for gap in gaps]}.",
    )
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    wider = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    weights = 1 / seeds + (drawn - 1 / seeds) * wider  # of the seeds, [resamples, S]
    means = np.zeros(resamples)
    for gap in gaps:
        rows = gap.shape[1]
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), resamples)
        means += np.sum(weights * (counts @ gap.T), axis=1) / rows / len(gaps)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(np.sum(means <= 0), np.sum(means >= 0)) + 1
    p = min(1.0, 2 * tail / (resamples + 1))
    return Difference(
        float(np.mean([gap.mean() for gap in gaps])), float(low), float(high), float(p)
    )


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of a family's p-values (Holm 1979): name -> adjusted p."""
    adjusted, floor = {}, 0.0
    ordered = sorted(p, key=p.__getitem__)
    for rank, name in enumerate(ordered):
        floor = max(floor, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p}


def non_inferior(difference: Difference, margin: float) -> bool:
    """Whether the whole 95% interval lies above -margin."""
    return difference.low > -margin
