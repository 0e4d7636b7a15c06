"""What a comparison of methods is to run, and what its choice of a learning rate is worth."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.run_config import EvalConfig, RunConfig

Result = dict[str, Any]
BASE = "base"


@dataclass(frozen=True)
class Comparison:
    """What to run. name: of the result files. methods: label -> adapter. A seed sets both the
    adapters' initial values and the data order.

    pick_steps: the learning rate is chosen by runs of that many steps (with the schedule of their
    own length); None by whole runs. rates_from: a comparison whose choice of learning rates is
    taken over; its choosing runs are made where they are not there yet. tasks, scoring: what the
    chosen runs, and the base model, are scored on, and how; the score of a task is that of its
    clean rows.
    """

    name: str
    base: RunConfig
    methods: dict[str, AdapterConfig]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pick_steps: int | None = None
    rates_from: Comparison | None = None
    tasks: tuple[str, ...] = ()
    scoring: EvalConfig | None = None
    reading: str = (
        ""  # what the tables show, in words, written by whoever has read them; stands under them
    )

    def __post_init__(self) -> None:
        for field in ("methods", "learning_rates", "seeds"):
            require(
                len(getattr(self, field)) > 0, f"comparison.{field} is empty: give at least one."
            )
        require(
            BASE not in self.methods,
            f"comparison.methods: {BASE!r} is the untrained model's row; give the method another"
            " label.",
        )
        require(
            bool(self.tasks) == (self.scoring is not None),
            "comparison.tasks and comparison.scoring go together: give both, or neither.",
        )
        if (other := self.rates_from) is not None:
            same = all(
                other.methods.get(label) == adapter for label, adapter in self.methods.items()
            )
            require(
                same and other.name != self.name,
                f"comparison.rates_from={other.name!r}: it must be another comparison, over the"
                " same methods.",
            )
            for key in (
                "model",
                "train.dtype",
            ):  # its choosing runs are made on the base that is loaded for this one
                own, its = (operator.attrgetter(key)(plan.base) for plan in (self, other))
                require(
                    own == its,
                    f"comparison.rates_from={other.name!r}: its {key} is {its!r}, and this one's"
                    f" {own!r}; give one for both.",
                )
        steps, warmup, whole = self.pick_steps, self.base.optim.warmup_steps, self.base.train.steps
        require(
            steps is None or warmup < steps <= whole,
            f"comparison.pick_steps={steps}: must be above optim.warmup_steps={warmup} and at most"
            f" train.steps={whole}. Change the config file.",
        )


def untuned(rate: float, rates: Sequence[float]) -> str | None:
    """Why the best of `rates` may not be the method's best; None where it lies between two others.

    A rate that diverged counts as one that was tried: the best is then known to lie below it.
    """
    if len(set(rates)) == 1:
        return "the only one tried, so it is not tuned"
    if rate in (min(rates), max(rates)):
        edge, beyond = ("lowest", "lower") if rate == min(rates) else ("highest", "higher")
        return f"the {edge} one tried, so a {beyond} one may be better"
    return None
