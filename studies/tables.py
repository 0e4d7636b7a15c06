"""Tables of a study from its records: chosen rates, losses, scores, differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import zflora_jax as zf
from studies.records import RECORDS, Record, read_study
from studies.statistics import Difference, paired_difference, seed_difference
from studies.study import BASE, Run, Study

MEAN = "mean"  # of the tasks
Gaps = dict[str, Difference]  # task, or MEAN of several -> difference
Seeds = Mapping[int, Record]  # seed -> record of its run
ENDS = ["mean", "low", "high"]


class Choice(NamedTuple):
    """A method's learning rate: the one with the lowest validation loss of those tried (rate ->
    loss, None where it diverged).
    """

    rate: float
    losses: dict[float, float | None]

    @property
    def untuned(self) -> str:
        """Why another rate may be better; "" where the rate lies between two others. A diverged
        rate counts as tried: the best is then known to lie below it.
        """
        if len(self.losses) == 1:
            return "the only one tried, so it is not tuned"
        if self.rate == min(self.losses):
            return "the lowest one tried, so a lower one may be better"
        highest = self.rate == max(self.losses)
        return "the highest one tried, so a higher one may be better" if highest else ""


class Table:
    """The records of a study.

    Attributes:
      study: The study.
      runs: Name of a run -> its record, of all runs or of those so far.
      tried: Label -> learning rate -> record of the run that tells its validation loss.
      choices: Label -> the method's rate, of methods with a finite loss.
      chosen: Label -> seed -> record of the run at that rate.
      labels: The methods whose runs at that rate are all there.
      deployed: Deployment -> seed -> its run, where the runs of its method are all there. In a
        study with deployments, chosen and labels are of these.
    """

    def __init__(self, study: Study, records: Sequence[Record]) -> None:
        self.study = study
        self.runs = {record["run"]: record for record in records}
        self.tried = {label: self._there(study.rate_runs(label)) for label in study.methods}
        self.choices: dict[str, Choice] = {}
        for label, tried in self.tried.items():
            losses = {r: record["result"].get("validation_loss") for r, record in tried.items()}
            finite = {r: x for r, x in losses.items() if x is not None and math.isfinite(x)}
            if finite:
                self.choices[label] = Choice(min(finite, key=finite.__getitem__), losses)
        self.chosen = {
            label: self._there(study.seed_runs(label, choice.rate))
            for label, choice in self.choices.items()
        }
        self.labels = [m for m, of in self.chosen.items() if len(of) == len(study.seeds_of(m))]
        self.deployed = {
            label: study.deployed_runs(label, self.choices[of].rate)
            for label, (of, _) in study.deployments.items()
            if of in self.labels
        }
        if study.deployments:
            for label in self.deployed:
                of = study.deployments[label][0]
                self.choices[label], self.tried[label] = self.choices[of], self.tried[of]
            self.chosen = {label: self._there(runs) for label, runs in self.deployed.items()}
            self.labels = [m for m, of in self.chosen.items() if len(of) == len(self.deployed[m])]

    def _there(self, runs: Mapping[Any, Run]) -> dict[Any, Record]:
        return {key: self.runs[run.name] for key, run in runs.items() if run.name in self.runs}

    @classmethod
    def read(cls, study: Study, records: Path = RECORDS, workdir: Path | None = None) -> Table:
        """The table of the records on disk, see `read_study`."""
        return cls(study, read_study(study, records, workdir))

    # --- losses and scores ------------------------------------------------------------------------

    def results(self, label: str) -> pd.DataFrame:
        """The numbers of a method's runs, a row per seed; NaN where a run has not got one."""
        columns = ["test_loss", "seconds", "params_trainable", "nbytes", "trained_loss", "kl"]
        runs = {0: self.runs[BASE]} if label == BASE else self.chosen[label]
        rows = {seed: record["result"] for seed, record in runs.items()}
        found = pd.DataFrame.from_dict(rows, orient="index")
        return found.reindex(columns=[*columns, "update_in_steps"]).astype(float)

    @functools.cached_property
    def scores(self) -> pd.DataFrame:
        """A row per method, seed, task and score: mean, low and high over clean rows in percent,
        their number, chance in percent, and the answers that were cut.
        """
        models: dict[str, Seeds] = {BASE: {0: self.runs[BASE]}} if BASE in self.runs else {}
        rows = [
            {"method": label, "seed": seed, "task": task, "score": score}
            | {end: 100 * of[end] for end in ENDS}
            | {"rows": len(found.get("row scores", {}).get(score, ())) or found["clean_rows"]}
            | {"chance": 100 * found.get("chance", np.nan), "cut": found.get("answers_cut", 0)}
            for label, seeds in (models | {m: self.chosen[m] for m in self.labels}).items()
            for seed, record in seeds.items()
            for task, found in record["result"].get("scores", {}).items()
            for score, of in found["scores"]["clean"].items()
        ]
        keys = ["method", "seed", "task", "score", *ENDS, "rows", "chance", "cut"]
        return pd.DataFrame(rows, columns=keys)

    def headline(self, label: str) -> tuple[float, float | None]:
        """A method's score in percent: the mean over tasks and seeds, and the standard deviation of
        the seeds' means (None for one seed).
        """
        frame = self.scores
        ours = frame[(frame["method"] == label) & (frame["score"] == self.study.measure)]
        means = ours[ours["task"].isin(self.study.tasks)].groupby("seed")["mean"].mean()
        return means.mean(), means.std() if len(means) > 1 else None

    # --- differences ------------------------------------------------------------------------------

    @functools.cached_property
    def differences(self) -> dict[str, Gaps]:
        """Label of a method, or `BASE` -> its differences to the reference in points of 100, on the
        informative tasks (the untrained model's on all, but for their mean).
        """
        study, found = self.study, dict[str, Gaps]()
        if study.reference not in self.labels:
            return {}
        reference = self.chosen[study.reference]
        bases = dict.fromkeys(reference, self.runs[BASE]) if BASE in self.runs else {}
        if base := self._gaps(bases, reference, study.tasks):
            found[BASE] = base
        tasks = informative(study.tasks, found.get(BASE))
        if MEAN in base and tasks:
            base[MEAN] = headline(self._gaps(bases, reference, tasks))
        for label in self.labels:
            if label != study.reference:
                found[label] = self._gaps(self.chosen[label], reference, tasks)
        return {label: gaps for label, gaps in found.items() if gaps}

    @functools.cached_property
    def contrasts(self) -> dict[str, Gaps]:
        """ "a - b" -> the differences of `Study.contrasts`, on the informative tasks."""
        tasks = informative(self.study.tasks, self.differences.get(BASE))
        return {
            f"{a} - {b}": self._gaps(self.chosen[a], self.chosen[b], tasks)
            for a, b in self.study.contrasts
            if {a, b} <= set(self.labels)
        }

    def loss_difference(self, label: str) -> Difference | None:
        """The difference of the test loss to the reference's over shared seeds, two or more."""
        reference = self.study.reference
        if not {label, reference} <= set(self.labels) or label == reference:
            return None
        pair = [self.results(m)["test_loss"] for m in (label, reference)]
        both = pd.concat(pair, axis=1, join="inner").dropna().to_numpy().T
        return seed_difference(*both) if both.shape[1] > 1 else None

    def _gaps(self, one: Seeds, other: Seeds, tasks: Sequence[str]) -> Gaps:
        """Differences over the shared seeds; empty where one of their runs keeps no row scores."""
        seeds = sorted(one.keys() & other.keys())
        if not tasks or not seeds or not all(_scored(of[s]) for of in (one, other) for s in seeds):
            return {}

        def rows(runs: Seeds, task: str) -> np.ndarray:
            kept = [_scored(runs[seed])[task]["row scores"][self.study.measure] for seed in seeds]
            return 100 * np.asarray([[float(value) for value in of] for of in kept])

        def gap(tasks: Sequence[str]) -> Difference:
            tables = ([rows(runs, task) for task in tasks] for runs in (one, other))
            return paired_difference(*tables, best=100.0, units=[self._units(t) for t in tasks])

        found = {task: gap([task]) for task in tasks}
        return found | ({MEAN: gap(tasks)} if len(tasks) > 1 else {})

    def _units(self, task: str) -> list[int] | None:
        """The unit of each row, from whichever record keeps them.

        Raises:
          ConfigError: the records of the task are of different rows.
        """
        scored = [of[task] for record in self.runs.values() if task in (of := _scored(record))]
        if len({of["row digest"] for of in scored if "row digest" in of}) > 1:
            raise zf.ConfigError(
                f"{self.study.name}: the records of {task} are of different rows, because its data"
                " has changed. Remove the older records, and their runs are scored again."
            )
        kept = [of["row units"].get(self.study.measure) for of in scored if "row units" in of]
        return list(map(int, kept[0].split())) if kept and kept[0] else None


def _scored(record: Record) -> Mapping[str, Any]:
    """The scores of a record that keeps those of single rows; empty of others."""
    scores = record["result"].get("scores") or {}
    return scores if all("row scores" in of for of in scores.values()) else {}


def informative(tasks: Sequence[str], base: Gaps | None) -> list[str]:
    """The tasks on which the reference clearly beats the untrained model, whose differences to the
    reference are `base` (None: not known yet): the others say nothing about methods.
    """
    return [task for task in tasks if base is None or base[task].high < 0]


def headline(gaps: Gaps) -> Difference:
    """The difference that a method is judged by: of the tasks' mean, or of the only task."""
    return gaps[MEAN] if MEAN in gaps else next(iter(gaps.values()))
