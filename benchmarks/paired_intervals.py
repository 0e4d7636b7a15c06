"""How wide the intervals of paired differences are, and how often they hold the truth, by what
varies: the figures behind the sizes in docs/experiments.md.

Command: python benchmarks/paired_intervals.py     (about 5 minutes)
Two methods that are equally good, three and six seeds, normal scores: every seed moves a method,
every row moves a method in all seeds, every answer varies by itself. Standard deviations in points
of 100; an answer that is right 60% of the time has 49. Writes results/paired_intervals.json and
.md.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

DRAWS, RESAMPLES = 400, 1000
SEEDS = (3, 6)
ROWS = (500, 1000)
# of a seed, of a row, of an answer
CASES = ((0, 10, 30), (1, 10, 30), (2, 20, 35), (3, 20, 35), (2, 0, 0))


def simulate(seeds: int, seed: float, row: float, answer: float, rows: int) -> dict[str, Any]:
    """The median width of intervals, and the share of them that hold the true difference, zero.

    Args:
      seeds, rows: how many.
      seed, row, answer: standard deviations, in points of 100.
    """
    from zflora_jax.evaluation.paired import paired_difference, verdict

    rng = np.random.default_rng(0)

    def scores() -> np.ndarray:
        parts = (seed, (seeds, 1)), (row, (1, rows)), (answer, (seeds, rows))
        return sum(rng.normal(0, deviation, shape) for deviation, shape in parts)

    found = [paired_difference([scores()], [scores()], draw, RESAMPLES) for draw in range(DRAWS)]
    still = [d.low <= 0 <= d.high for d in found if d.of_rows_alone]
    return {
        "seeds": seeds,
        "seed": seed,
        "row": row,
        "answer": answer,
        "rows": rows,
        "width": float(np.median([d.high - d.low for d in found])),
        "holds 0": float(np.mean([d.low <= 0 <= d.high for d in found])),
        "as good by 3 points": float(np.mean([verdict(d, 3.0) == "as good" for d in found])),
        "°": len(still) / DRAWS,
        "holds 0, of °": float(np.mean(still)) if still else None,
    }


def page(result: dict[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    rows = result["rows"]
    return f"""# Intervals of paired differences, simulated

Two equally good methods. "seed", "row", "answer": standard deviations, in points of 100, of what a
seed changes in a method, a row (in all seeds) and a single answer. "width": of the 95% interval,
median of {DRAWS} draws. "holds 0": the share of intervals that hold the true difference. "as good":
the share that lies above a margin of -3 points. "°": the share whose seeds vary no more than single
answers do, so that rows alone make the interval; "holds 0, of °": that share among these, which
are few where "°" is small.

{markdown_table(rows, list(rows[0]))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="results/paired_intervals")
    args = parser.parse_args()
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    rows = [simulate(n, *case, count) for n in SEEDS for case in CASES for count in ROWS]
    result = {"rows": rows, "environment": environment()}
    write_result(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
