"""What a comparison of methods is to run: methods x learning rates x seeds over one base run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import check_types, nearest, override, require
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.evaluation.statistics import SCORES
from zflora_jax.experiments.store import Job, Scoring

BASE = "base"
_RATE = "learning_rate"


@dataclass(frozen=True)
class Comparison:
    """What `compare_methods` runs. A seed sets both the adapters' initial values and the data
    order.

    Attributes:
      name: of the result files.
      base: the settings that all runs share.
      methods: label -> adapter.
      learning_rates: those tried with each method.
      seeds: of the runs at the chosen rate; the rate is chosen with the first.
      pick_steps: the rate is chosen by runs of that many steps (with the schedule of their own
        length); None: by whole runs.
      tasks, scoring: what the chosen runs, and the base model, are scored on, and how; the score of
        a task is that of its clean rows.
      transfer: further tasks that are scored, which no mean and no comparison counts.
      measure: the score that methods are compared by, one of `statistics.SCORES`' names; "":
        accuracy where answers are generated, else the first that there is.
      reference: the method that differences are taken to, on the same rows and seeds; "": none.
      margin: a method whose difference to the reference lies above -margin points with its whole
        interval is called as good as it; fixed before the runs.
      settings: label -> dotted settings of that method besides its adapter, such as
        {"optim.loraplus_ratio": 16.0}.
      contrasts: pairs of labels, such as ("ffa", "lora"), whose difference, the first less the
        second, the page has besides those to the reference.
      category: of the tasks, such as "math"; stands beside the name.
      more_seeds: label -> further seeds of that method. A difference is over those that a method
        and the reference share.
      reading: what the tables show, in words, by whoever has read them; stands above them, and its
        first paragraph on the page over several comparisons.
      about: what a reader has to know of all comparisons of a sweep; stands above them all.
    """

    name: str
    base: RunConfig
    methods: dict[str, AdapterConfig]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pick_steps: int | None = None
    tasks: tuple[str, ...] = ()
    scoring: EvalConfig | None = None
    transfer: tuple[str, ...] = ()
    measure: str = ""
    reference: str = ""
    margin: float | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    more_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    contrasts: tuple[tuple[str, str], ...] = ()
    category: str = ""
    reading: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        self._check_contrasts()  # first, as its message says what a pair is
        check_types(self)
        self._check_names()
        for name in ("methods", "learning_rates", "seeds"):
            require(len(getattr(self, name)) > 0, f"comparison.{name} is empty: give at least one.")
        require(
            BASE not in self.methods,
            f"comparison.methods: {BASE!r} is the untrained model's row; give the method another"
            " label.",
        )
        require(
            bool(self.tasks) == (self.scoring is not None),
            "comparison.tasks and comparison.scoring go together: give both, or neither.",
        )
        self._check_reference()
        steps, warmup, whole = self.pick_steps, self.base.optim.warmup_steps, self.base.train.steps
        require(
            steps is None or warmup < steps <= whole,
            f"comparison.pick_steps={steps}: must be above optim.warmup_steps={warmup} and at most"
            f" train.steps={whole}. Change the config file.",
        )

    def _check_names(self) -> None:
        """Runs and their files have names of their own."""
        names = {"name": [self.name], "methods": self.methods}
        for field_name, name in [(key, name) for key, given in names.items() for name in given]:
            require(
                bool(name) and not set(name) & set("/\\"),
                f"comparison.{field_name}: {name!r} is part of file names, so it must not be empty"
                " or hold a slash.",
            )
        for field_name in ("learning_rates", "seeds", "tasks", "transfer", "contrasts"):
            given = getattr(self, field_name)
            # As run names write it: rates that differ by less would share a record.
            said = [f"{one:g}" if isinstance(one, float) else str(one) for one in given]
            twice = sorted({one for one in said if said.count(one) > 1})
            require(
                not twice,
                f"comparison.{field_name}={given} has {', '.join(twice)} twice: give each once.",
            )

    def _check_reference(self) -> None:
        """What methods are compared by, and the settings of their own."""
        of_methods = (
            ("reference", [self.reference] if self.reference else []),
            ("contrasts", [label for pair in self.contrasts for label in pair]),
            ("settings", self.settings),
            ("more_seeds", self.more_seeds),
        )
        for name, labels in of_methods:
            for label in labels:
                require(
                    label in self.methods,
                    f"comparison.{name}: {label!r} is no method of it:"
                    f" {nearest(label, self.methods)}.",
                )
        for label, further in self.more_seeds.items():
            seeds = self.seeds_of(label)
            require(
                len(set(seeds)) == len(seeds),
                f"comparison.more_seeds[{label!r}]={further}: a seed is given twice,"
                f" in it or in comparison.seeds={self.seeds}.",
            )
        for label, changes in self.settings.items():
            wrong = [k for k in changes if not k.startswith("optim.") or k == f"optim.{_RATE}"]
            require(
                not wrong,
                f"comparison.settings[{label!r}] has {wrong}: a method may have optim.* of its own,"
                f" but not optim.{_RATE}, which is chosen; all else is the base's.",
            )
        require(
            self.measure in ("", *SCORES.values()),
            f"comparison.measure={self.measure!r}: {nearest(self.measure, SCORES.values())}.",
        )
        for name in ("transfer", "measure", "reference", "contrasts"):
            require(
                bool(self.tasks) or not getattr(self, name),
                f"comparison.{name}={getattr(self, name)!r} needs comparison.tasks and scoring.",
            )
        twice = sorted(set(self.tasks) & set(self.transfer))
        require(not twice, f"comparison.transfer has {twice}, which comparison.tasks has too.")
        require(
            self.margin is None or (self.margin > 0 and bool(self.reference)),
            f"comparison.margin={self.margin}: must be positive, and needs comparison.reference.",
        )

    def _check_contrasts(self) -> None:
        """Pairs of two methods, beside differences to a reference."""
        given = self.contrasts
        for pair in given if isinstance(given, tuple | list) else [given]:
            require(
                isinstance(pair, tuple | list)
                and [type(label) for label in pair] == [str, str]
                and pair[0] != pair[1],
                f"comparison.contrasts={given!r}: {pair!r} is no pair of two methods. Give a tuple"
                ' of pairs of labels, such as (("ffa", "lora"),).',
            )
        require(
            not self.contrasts or bool(self.reference),
            "comparison.contrasts needs comparison.reference, whose differences stand before them.",
        )

    def unread(self) -> Comparison:
        """The same without what was read in the tables of its runs, which others do not show."""
        return dataclasses.replace(self, reading="", about="")

    def only(self, labels: Sequence[str] | None) -> Comparison:
        """The same with some of its methods, in its order; None: all.

        Raises:
          ConfigError: a label is no method of it, or the reference is left out.
        """
        if labels is None:
            return self
        for label in labels:
            require(
                label in self.methods,
                f"comparison {self.name!r}: no method {label!r}; {nearest(label, self.methods)}.",
            )
        require(
            self.reference in ("", *labels),
            f"comparison {self.name!r}: its reference {self.reference!r} is left out; name it too.",
        )

        def kept(given: Mapping[str, Any]) -> dict[str, Any]:
            return {label: of for label, of in given.items() if label in labels}

        return dataclasses.replace(
            self if set(labels) == set(self.methods) else self.unread(),
            methods=kept(self.methods),
            settings=kept(self.settings),
            more_seeds=kept(self.more_seeds),
            contrasts=tuple(pair for pair in self.contrasts if set(pair) <= set(labels)),
        )

    def seeds_of(self, label: str) -> tuple[int, ...]:
        """The seeds of a method's runs at its chosen rate."""
        return (*self.seeds, *self.more_seeds.get(label, ()))

    def compared_seed_count(self, label: str) -> int:
        """How many seeds a method shares with the reference, over which its difference is taken."""
        return self.shared_seed_count(label, self.reference)

    def shared_seed_count(self, label: str, other: str) -> int:
        """How many seeds two methods share once all their runs are there."""
        return len(set(self.seeds_of(label)) & set(self.seeds_of(other)))

    @property
    def title(self) -> str:
        """The name without the word that the comparisons of a sweep share, and the category."""
        name = self.name.partition("_")[2] or self.name
        return f"{name} ({self.category})" if self.category else name

    @property
    def scored(self) -> Scoring | None:
        return None if self.scoring is None else Scoring(self.tasks + self.transfer, self.scoring)

    def rate_jobs(self, label: str, workdir: Path, out: Path) -> dict[float, Job]:
        """Rate -> the run that tells what it is worth. Without a test loss, unless it is whole."""
        whole = self.base.train.steps
        steps, seed = self.pick_steps or whole, self.seeds[0]
        return {
            rate: self._job(label, rate, seed, steps, workdir, out, None, steps == whole)
            for rate in self.learning_rates
        }

    def seed_jobs(self, label: str, rate: float, workdir: Path, out: Path) -> dict[int, Job]:
        """Seed -> the whole run at the chosen rate."""
        steps = self.base.train.steps
        return {
            seed: self._job(label, rate, seed, steps, workdir, out, self.scored, True)
            for seed in self.seeds_of(label)
        }

    def _job(
        self,
        label: str,
        rate: float,
        seed: int,
        steps: int,
        workdir: Path,
        out: Path,
        scoring: Scoring | None,
        test_loss: bool,
    ) -> Job:
        base = self.base
        run = dataclasses.replace(
            override(base, {"optim.learning_rate": rate, **self.settings.get(label, {})}),
            # By name, so that no older run, of another start, is taken for this one.
            adapter=self.methods[label].explicit(),
            train=dataclasses.replace(base.train, seed=seed, steps=steps),
            data=dataclasses.replace(base.data, seed=seed),
            eval=dataclasses.replace(base.eval, split="validation"),
        )
        shorter = "" if steps == base.train.steps else f"-steps{steps}"
        name = f"{label}-lr{rate:g}{shorter}-seed{seed}"
        record = out / self.name / f"{name}.json"
        return Job(name, run, workdir / name, record, scoring, test_loss)
