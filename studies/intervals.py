"""Simulates how wide the intervals of paired differences are, and how often they hold the truth.

Command: python -m studies.intervals     (about 5 minutes; writes the rows of paired_intervals)
Two equally good methods, normal scores: every seed moves a method, every row moves a method in all
seeds, every answer varies by itself. In points of 100; an answer that is right 60% of the time has
a standard deviation of 49.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.records import RECORDS, write_lines
from studies.statistics import paired_difference, verdict

# Standard deviations of a seed, of a row, of an answer.
CASES = ((0, 10, 30), (1, 10, 30), (2, 20, 35), (3, 20, 35), (2, 0, 0))


def simulate(
    seeds: int, case: tuple[float, float, float], rows: int, draws: int = 400, resamples: int = 1000
) -> dict[str, Any]:
    """The median width of intervals, and the share of them that hold the true difference, zero.

    Args:
      seeds, rows: Sizes of a study.
      case: Standard deviations of a seed, a row and an answer.
      draws: Number of simulated studies.
      resamples: Resamples of each interval.
    """
    rng = np.random.default_rng(0)

    def scores() -> np.ndarray:
        shapes = (seeds, 1), (1, rows), (seeds, rows)
        return sum(rng.normal(0, std, shape) for std, shape in zip(case, shapes, strict=True))

    found = [paired_difference([scores()], [scores()], draw, resamples) for draw in range(draws)]
    holds = [d.low <= 0 <= d.high for d in found]
    still = [held for held, d in zip(holds, found, strict=True) if d.of_rows_only]
    names = ("seeds", "seed", "row", "answer", "rows")
    return dict(zip(names, (seeds, *case, rows), strict=True)) | {
        "width": float(np.median([d.high - d.low for d in found])),
        "holds 0": float(np.mean(holds)),
        "as good by 3 points": float(np.mean([verdict(d, 3.0) == "as good" for d in found])),
        "°": len(still) / draws,
        "holds 0, of °": float(np.mean(still)) if still else None,
    }


if __name__ == "__main__":
    found = [simulate(n, case, rows) for n in (3, 6) for case in CASES for rows in (500, 1000)]
    write_lines(RECORDS / "paired_intervals.jsonl.gz", found)
