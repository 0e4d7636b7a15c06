"""How far a comparison is: which of its runs have records, what is to be run next, what is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.rates import RateChoice, choose_rate
from zflora_jax.experiments.store import Job, Result, read_result

log = logging.getLogger(__name__)


class Progress:
    """The runs of a comparison, as their records say; several processes may add to them.

    Args:
      plan: the comparison.
      workdir: of its runs.
      out: of its records.
    """

    def __init__(self, plan: Comparison, workdir: Path, out: Path) -> None:
        self.plan, self._workdir, self._out = plan, workdir, out
        # Of finished jobs, by their record and whether it has scores.
        self._results: dict[tuple[Path, bool], Result] = {}
        self._choices: dict[str, RateChoice] = {}
        self._failed: dict[str, str] = {}  # methods without a rate, and why
        self._broken: dict[tuple[Path, bool], tuple[Job, str]] = {}  # runs, and why they failed
        self._start = time.monotonic(), self._steps()[0]

    def result(self, job: Job) -> Result | None:
        """The recorded result of a job, None where it has none; read once."""
        key = _key(job)
        if key not in self._results and (found := read_result(job)) is not None:
            self._results[key] = found
        return self._results.get(key)

    def rate_jobs(self, label: str) -> dict[float, Job]:
        """Rate -> the run that tells what it is worth."""
        return self.plan.rate_jobs(label, self._workdir, self._out)

    def choice(self, label: str) -> RateChoice | None:
        """The chosen rate of a method; None while a run that it needs is missing, and where it
        diverged at every rate, which `require_made` then says.
        """
        if label not in self._choices and label not in self._failed:
            found = {rate: self.result(job) for rate, job in self.rate_jobs(label).items()}
            done = {rate: result for rate, result in found.items() if result is not None}
            if len(done) == len(found):
                try:
                    self._choices[label] = choose_rate(label, done)
                except ConfigError as error:
                    self._failed[label] = str(error)
        return self._choices.get(label)

    def seed_jobs(self, label: str) -> dict[int, Job]:
        """Seed -> the whole run at the chosen rate; empty before the choice."""
        choice = self.choice(label)
        if choice is None:
            return {}
        return self.plan.seed_jobs(label, choice.rate, self._workdir, self._out)

    def begun(self) -> bool:
        """Whether some method has a whole run: then there is a table to write."""
        return any(
            self.result(job)
            for label in self.plan.methods
            for job in self.seed_jobs(label).values()
        )

    def unfinished(self) -> list[Job]:
        """The jobs that can be run now, the most wanted first."""
        left = [job for job in self._known() if self.result(job) is None]
        return [job for job in left if _key(job) not in self._broken]

    def is_made(self, job: Job, result: Result) -> bool:
        """Whether a job has a record now; if it could not be made, `unfinished` leaves it out."""
        if self.result(job) is not None:
            return True
        other = (
            f"{job.record} is of another run, model or rows. Move {job.workdir} away, and the same"
            " command makes it anew."
        )
        why = result.get("failed", other)
        self._broken[_key(job)] = job, why
        log.error("%s: %s could not be made: %s", self.plan.name, job.name, why)
        return False

    def require_made(self) -> None:
        """ConfigError for methods without a rate and for runs that could not be made, by this
        process or another.
        """
        left = [f"{job.name}: {why}" for job, why in self._broken.values() if not self.result(job)]
        why = [f"{self.plan.name}: {text}" for text in [*self._failed.values(), *left]]
        require(not why, "\n".join(why))

    def _known(self) -> Iterator[Job]:
        for label in self.plan.methods:
            yield from self.rate_jobs(label).values()
            yield from self.seed_jobs(label).values()

    def missing(self) -> list[str]:
        """The methods that are not done, with their seeds where some are."""
        found = []
        for label in self.plan.methods:
            jobs = self.seed_jobs(label)
            seeds = [seed for seed, job in jobs.items() if self.result(job) is None]
            if not jobs or len(seeds) == len(jobs):
                found.append(label)
            elif seeds:
                noun = "seeds" if len(seeds) > 1 else "seed"
                found.append(f"{label} ({noun} {', '.join(map(str, seeds))})")
        return found

    def left(self) -> str:
        """What is done, and about how long the rest takes at the speed since the start."""
        (began, before), (done, total) = self._start, self._steps()
        text = f"{done} of {total} steps of all runs"
        if done in (total, before):
            return text
        seconds = (time.monotonic() - began) * (total - done) / (done - before)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{text}, about {hours} h {minutes:02d} min left"

    def _steps(self) -> tuple[int, int]:
        """(Optimizer steps of the finished runs, of all runs.)"""
        plan = self.plan
        done = {job.record: job.run.train.steps for job in self._known() if self.result(job)}
        whole_run = plan.base.train.steps
        pick = plan.pick_steps or whole_run
        each = len(plan.learning_rates) * pick
        whole = sum(len(plan.seeds_of(label)) for label in plan.methods) * whole_run
        # A run that chose the rate, of full length, is one of the chosen ones.
        twice = whole_run if pick == whole_run else 0
        return sum(done.values()), whole + len(plan.methods) * (each - twice)


def _key(job: Job) -> tuple[Path, bool]:
    return job.record, job.scoring is not None
