"""The definition of a study: methods x learning rates x seeds over one base run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import zflora_jax as zf
from studies.deployment import Deployment

BASE = "base"  # the untrained model's label


class Run(NamedTuple):
    """A training run of a study, or the evaluation of the untrained model, or of a deployment."""

    name: str
    method: str
    settings: zf.RunConfig
    scored: bool
    of: str = ""  # of a deployment: the name of the run that trained its adapter


@dataclass(frozen=True)
class Study:
    """A comparison of methods. Each method's learning rate is chosen by validation loss with the
    first seed; all seeds then run at that rate. A seed sets initial values and the data order.

    Attributes:
      name: Name of the records' file.
      base: Settings that all runs share.
      methods: Label -> adapter.
      learning_rates: Rates tried with each method.
      seeds: Seeds of the runs at the chosen rate.
      pick_steps: Length in steps of the runs that choose the rate; None: whole runs.
      tasks: Tasks that the untrained model and the chosen runs are scored on.
      scoring: Evaluation settings of `tasks`; each task counts its clean rows.
      transfer: Further tasks that are scored and counted in no mean and no comparison.
      measure: Score that methods are compared by, such as "accuracy".
      reference: Label that differences, of losses where there are no tasks, are taken to; "": none.
      margin: Largest loss of a method that is "as good", in points of 100.
      settings: Label -> dotted optimizer settings of that method.
      rates: Label -> the rates tried with that method in place of `learning_rates`.
      more_seeds: Label -> further seeds of that method.
      contrasts: Pairs of labels that are compared with each other.
      deployments: Label -> (a method's label, how its trained adapters are deployed). Where there
        are any, they are scored in place of the methods, each seed's, and compared; the untrained
        model is scored as `deployment.floats` gives it.
      category: Category of the tasks, shown with the name.
      page: Name of the result page; "": the study's own.
    """

    name: str
    base: zf.RunConfig
    methods: Mapping[str, zf.AdapterConfig]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pick_steps: int | None = None
    tasks: tuple[str, ...] = ()
    scoring: zf.EvalConfig | None = None
    transfer: tuple[str, ...] = ()
    measure: str = "accuracy"
    reference: str = ""
    margin: float | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    more_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    contrasts: tuple[tuple[str, str], ...] = ()
    deployments: Mapping[str, tuple[str, Deployment]] = field(default_factory=dict)
    category: str = ""
    page: str = ""

    def __post_init__(self) -> None:
        labels = [*self.settings, *self.more_seeds, *(x for pair in self.contrasts for x in pair)]
        labels += [self.reference] if self.reference else []
        known = self.deployments or self.methods
        unknown = [label for label in labels if label not in known]
        of = [*self.rates, *(of for of, _ in self.deployments.values())]
        unknown += [label for label in of if label not in self.methods]
        seeds = [self.seeds_of(label) for label in self.methods]
        changed = {key for of in self.settings.values() for key in of}
        wrong = {
            f"{BASE!r} is the untrained model's label": BASE in self.methods,
            "tasks and scoring go together": bool(self.tasks) != (self.scoring is not None),
            f"{unknown} are no labels of its methods {list(known)}": bool(unknown),
            "give each seed once, and at least one": any(
                len(set(s)) < max(len(s), 1) for s in seeds
            ),
            "settings may change optim.* except the learning rate": any(
                not key.startswith("optim.") or key == "optim.learning_rate" for key in changed
            ),
            "margin and contrasts need a reference": (
                bool(self.margin or self.contrasts) > bool(self.reference)
            ),
        }
        for text, found in wrong.items():
            if found:
                raise zf.ConfigError(f"study {self.name!r}: {text}.")

    @property
    def title(self) -> str:
        """The name without its first word, and the category."""
        name = self.name.partition("_")[2] or self.name
        return f"{name} ({self.category})" if self.category else name

    def seeds_of(self, label: str) -> tuple[int, ...]:
        """The seeds of a method's runs at its chosen rate."""
        return (*self.seeds, *self.more_seeds.get(label, ()))

    def rates_of(self, label: str) -> tuple[float, ...]:
        """The learning rates that are tried with a method."""
        return self.rates.get(label, self.learning_rates)

    def rate_runs(self, label: str) -> dict[float, Run]:
        """Rate -> the run that tells its validation loss."""
        steps = self.pick_steps or self.base.train.steps
        return {r: self._run(label, r, self.seeds[0], steps, False) for r in self.rates_of(label)}

    def seed_runs(self, label: str, rate: float) -> dict[int, Run]:
        """Seed -> the whole run at the chosen rate, whose model is scored."""
        steps, scored = self.base.train.steps, bool(self.tasks) and not self.deployments
        return {s: self._run(label, rate, s, steps, scored) for s in self.seeds_of(label)}

    def deployed_runs(self, label: str, rate: float) -> dict[int, Run]:
        """Seed -> the deployment of the adapter that was trained at that rate."""
        runs = self.seed_runs(self.deployments[label][0], rate)
        return {
            s: run._replace(name=f"{label}-seed{s}", method=label, scored=True, of=run.name)
            for s, run in runs.items()
        }

    def _run(self, label: str, rate: float, seed: int, steps: int, scored: bool) -> Run:
        base = self.base
        settings = dataclasses.replace(
            zf.override(base, {"optim.learning_rate": rate, **self.settings.get(label, {})}),
            adapter=self.methods[label].explicit(),
            train=dataclasses.replace(base.train, seed=seed, steps=steps),
            data=dataclasses.replace(base.data, seed=seed),
            eval=dataclasses.replace(base.eval, split="validation"),
        )
        shorter = "" if steps == base.train.steps else f"-steps{steps}"
        return Run(f"{label}-lr{rate:g}{shorter}-seed{seed}", label, settings, scored)


def studies(name: str = "") -> list[Study]:
    """The studies of studies/configs/<name>.py; "": of every file there."""
    known = sorted(p.stem for p in (Path(__file__).parent / "configs").glob("[!_]*.py"))
    if name and name not in known:
        raise zf.ConfigError(f"no studies are called {name!r}. Choose one of {', '.join(known)}.")
    modules = [importlib.import_module(f"studies.configs.{stem}") for stem in known]
    return [
        study
        for stem, module in zip(known, modules, strict=True)
        if name in ("", stem)
        for study in module.get_studies()
    ]
