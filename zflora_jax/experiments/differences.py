"""Differences of methods to a reference, from the scores of single rows that records keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.evaluation.paired import Difference, paired_difference
from zflora_jax.evaluation.statistics import DIGEST, ROWS
from zflora_jax.experiments.store import Result

ALL = "mean"  # of the tasks
UNTRAINED = -1  # in place of a seed: the same scores beside those of any
# task -> what a record keeps of it; under ROWS score -> the value of each clean row
Scored = Mapping[str, Mapping[str, Any]]

POINTS = 100.0  # the score of a row that is right


def _require_same_rows(task: str, runs: Iterable[Scored]) -> None:
    found = {run[task][DIGEST] for run in runs if DIGEST in run[task]}
    require(
        len(found) <= 1,
        f"the records of {task} are of different rows: its data has changed since some were made."
        " Move the older records away, and their runs are scored anew.",
    )


def _column(values: str | Sequence[float]) -> np.ndarray:
    return POINTS * np.asarray([float(value) for value in values])


def differences(
    method: Mapping[int, Scored],
    reference: Mapping[int, Scored],
    tasks: Sequence[str],
    measure: str,
) -> dict[str, Difference]:
    """Differences of a method to a reference, in points of 100.

    Args:
      method: seed -> the scores of its run; of the untrained model UNTRAINED -> its scores.
      reference: likewise. Seeds that only one of them has are left out.
      tasks: that are compared.
      measure: a name of `statistics.SCORES`.

    Returns:
      task -> difference, and `ALL` -> that of their mean where there are several; empty without a
      common seed.

    Raises:
      ConfigError: the records are of different rows.
    """
    if UNTRAINED in method:
        method = dict.fromkeys(reference, method[UNTRAINED])
    seeds = sorted(method.keys() & reference.keys())
    if not seeds or not tasks:
        return {}

    for task in tasks:
        _require_same_rows(task, [runs[seed] for runs in (method, reference) for seed in seeds])

    def table(runs: Mapping[int, Scored], task: str) -> np.ndarray:
        return np.stack([_column(runs[seed][task][ROWS][measure]) for seed in seeds])

    pairs = {task: (table(method, task), table(reference, task)) for task in tasks}
    found = {task: paired_difference([a], [b], best=POINTS) for task, (a, b) in pairs.items()}
    if len(tasks) > 1:
        first, second = zip(*pairs.values(), strict=True)
        found[ALL] = paired_difference(first, second, best=POINTS)
    return found


def informative(tasks: Sequence[str], base: Mapping[str, Difference] | None) -> list[str]:
    """The tasks on which the reference clearly beats the untrained model: the others say nothing
    about methods.

    Args:
      tasks: all of them.
      base: differences of the untrained model to the reference; None: not known yet, then all.
    """
    return [task for task in tasks if base is None or base[task].high < 0]


def headline(found: Mapping[str, Difference]) -> Difference:
    """The one that a method is judged by: of the tasks' mean, or of the only task."""
    return found[ALL] if ALL in found else next(iter(found.values()))


def scores_by_seed(runs: Sequence[Result]) -> dict[int, Scored]:
    """Seed -> the scores of its run, of the runs that keep those of single rows."""
    return {
        run["seed"]: run["scores"]
        for run in runs
        if run.get("scores") and all(ROWS in of for of in run["scores"].values())
    }
