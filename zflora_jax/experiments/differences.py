"""Differences of methods to a reference and to each other: of scores, from those of single rows
that records keep, and of losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.evaluation.paired import Difference, paired_difference, seed_difference
from zflora_jax.evaluation.statistics import DIGEST, ROWS, UNITS
from zflora_jax.experiments.comparison import BASE, Comparison
from zflora_jax.experiments.store import Result

ALL = "mean"  # of the tasks
UNTRAINED = -1  # in place of a seed: the same scores beside those of any
# task -> what a record keeps of it; under ROWS score -> the value of each clean row
Scored = Mapping[str, Mapping[str, Any]]

POINTS = 100.0  # the score of a row that is right

# Task -> the number of the unit that each of its rows belongs to, such as a dialogue.
Units = Mapping[str, Sequence[int]]
# Task, or ALL -> the difference of two methods.
TaskGaps = dict[str, Difference]


@dataclass(frozen=True)
class Differences:
    """What a comparison's runs say of its methods.

    Attributes:
      to_reference: label of a method or BASE -> its differences to the reference.
      contrasts: "a - b" -> those of `Comparison.contrasts`.
      losses: label -> difference of the test loss to the reference's, in nats.
    """

    to_reference: dict[str, TaskGaps]
    contrasts: dict[str, TaskGaps]
    losses: dict[str, Difference]

    def fields(self) -> Result:
        """As the comparison's JSON holds them."""

        def fields(found: Mapping[str, TaskGaps]) -> Result:
            return {
                key: {task: asdict(gap) for task, gap in of.items()} for key, of in found.items()
            }

        return {
            "differences": fields(self.to_reference),
            "contrasts": fields(self.contrasts),
            "loss differences": {label: asdict(gap) for label, gap in self.losses.items()},
        }

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Differences:
        """Those that a comparison's JSON holds."""

        def gaps(name: str) -> dict[str, TaskGaps]:
            return {key: _read(of) for key, of in found.get(name, {}).items()}

        losses = _read(found.get("loss differences", {}))
        return cls(gaps("differences"), gaps("contrasts"), losses)


def _read(of: Mapping[str, Mapping[str, Any]]) -> dict[str, Difference]:
    return {key: Difference(**gap) for key, gap in of.items()}


def _require_same_rows(task: str, runs: Iterable[Scored]) -> None:
    found = {run[task][DIGEST] for run in runs if DIGEST in run[task]}
    require(
        len(found) <= 1,
        f"the records of {task} are of different rows: its data has changed since some were made."
        " Move the older records away, and their runs are scored anew.",
    )


def units_of(runs: Sequence[Scored], tasks: Sequence[str], measure: str) -> Units:
    """The units of rows, from whichever records keep them: those of earlier versions keep none.

    Args:
      runs: the scores of all models that are compared.
      tasks: that are compared.
      measure: whose rows they are.

    Raises:
      ConfigError: the records of a task are of different rows.
    """
    for task in tasks:
        _require_same_rows(task, [run for run in runs if task in run])
    kept = [
        (task, of[UNITS].get(measure)) for run in runs for task, of in run.items() if UNITS in of
    ]
    return {task: list(map(int, units.split())) for task, units in kept if units}


def _column(values: str | Sequence[float]) -> np.ndarray:
    return POINTS * np.asarray([float(value) for value in values])


def differences(
    method: Mapping[int, Scored],
    reference: Mapping[int, Scored],
    tasks: Sequence[str],
    measure: str,
    units: Units | None = None,
) -> dict[str, Difference]:
    """Differences of a method to a reference, in points of 100.

    Args:
      method: seed -> the scores of its run; of the untrained model UNTRAINED -> its scores.
      reference: likewise. Seeds that only one of them has are left out.
      tasks: that are compared.
      measure: a name of `statistics.SCORES`.
      units: of the tasks in which rows belong together.

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

    def difference(tasks: Sequence[str]) -> Difference:
        one, other = ([table(runs, task) for task in tasks] for runs in (method, reference))
        return paired_difference(
            one, other, best=POINTS, units=[(units or {}).get(task) for task in tasks]
        )

    found = {task: difference([task]) for task in tasks}
    return found | ({ALL: difference(tasks)} if len(tasks) > 1 else {})


def loss_difference(method: Sequence[Result], reference: Sequence[Result]) -> Difference | None:
    """Of the test losses of two methods' runs, over their common seeds; None of fewer than two."""
    losses = [
        {run["seed"]: run["test_loss"] for run in runs if run.get("test_loss") is not None}
        for runs in (method, reference)
    ]
    seeds = sorted(losses[0].keys() & losses[1].keys())
    if len(seeds) < 2:
        return None
    return seed_difference(*([of[seed] for seed in seeds] for of in losses))


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


def compare_runs(
    plan: Comparison,
    chosen: Mapping[str, Sequence[Result]],
    base: Mapping[str, Mapping[str, Any]],
    measure: str,
) -> Differences:
    """The differences that a comparison asks for, of the runs that are there.

    Args:
      plan: the comparison.
      chosen: label of a method -> its runs at the chosen rate.
      base: the scores of the untrained model; empty: not known yet.
      measure: a name of `statistics.SCORES`; "" without scores.

    Raises:
      ConfigError: records are of different rows.
    """
    runs = {label: scores_by_seed(of) for label, of in chosen.items()}
    reference, found = runs.get(plan.reference, {}), dict[str, TaskGaps]()
    scored = [base, *(one for of in runs.values() for one in of.values())]
    units = units_of(scored, plan.tasks, measure)
    if reference and base and all(ROWS in of for of in base.values()):
        found[BASE] = differences({UNTRAINED: base}, reference, plan.tasks, measure, units)
    tasks = informative(plan.tasks, found.get(BASE))
    others = [label for label in chosen if label != plan.reference]
    found |= {label: differences(runs[label], reference, tasks, measure, units) for label in others}
    contrasts = {
        contrast_name(a, b): differences(runs[a], runs[b], tasks, measure, units)
        for a, b in plan.contrasts
        if a in runs and b in runs
    }
    losses = {
        label: loss_difference(chosen[label], chosen.get(plan.reference, ())) for label in others
    }
    return Differences(
        {label: of for label, of in found.items() if of},
        {name: of for name, of in contrasts.items() if of},
        {label: gap for label, gap in losses.items() if gap},
    )


def contrast_name(label: str, other: str) -> str:
    """How a difference of two methods is called."""
    return f"{label} - {other}"
