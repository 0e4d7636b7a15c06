"""The choice of a learning rate among several that were tried, and what it is worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zflora_jax.core.fields import require
from zflora_jax.experiments.store import Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RateChoice:
    """The rate with the lowest validation loss.

    Attributes:
      rate: the chosen one.
      losses: rate -> validation loss of its run; None where it diverged.
    """

    rate: float
    losses: dict[float, float | None]

    @property
    def untuned(self) -> str | None:
        return untuned(self.rate, list(self.losses))


def choose_rate(method: str, results: Mapping[float, Result]) -> RateChoice:
    """Choose by validation loss.

    Args:
      method: its label, for messages.
      results: rate -> the result of its run.

    Raises:
      ConfigError: the method diverged at every rate.
    """
    losses = {rate: result.get("validation_loss") for rate, result in results.items()}
    finite = {
        rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)
    }
    require(
        bool(finite),
        f"method {method!r} diverged at every learning rate of {tuple(results)}; give lower ones.",
    )
    choice = RateChoice(min(finite, key=finite.__getitem__), losses)
    if choice.untuned:
        log.warning("%s: learning rate %g, %s", method, choice.rate, choice.untuned)
    return choice


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
