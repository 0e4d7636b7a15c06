"""Generated word problems of one to five steps with worked answers: harder than `arithmetic`, and
graded by the number of steps, so that a table of scores has neither a floor nor a ceiling.
"""

from __future__ import annotations

import random

import tensorflow_datasets as tfds

from zflora_jax.data.builders.arithmetic import NAMES, THINGS, GeneratedRows

SEED = 20261
SPLITS = {"train": 12000, "validation": 500, "test": 1000}
LEVELS = 5  # steps of the longest problem
LARGEST = 999  # number at any time

Change = tuple[str, int, str]  # (what happens, the number after it, the worked step)


def _steps(rng: random.Random, name: str, other: str, have: int) -> list[Change]:
    """What may happen to `have` things of `name`: each operation that keeps the number within
    2..LARGEST.
    """
    more, times = rng.randint(3, 99), rng.randint(2, 9)
    found = []
    if have + more <= LARGEST:
        text = rng.choice(("{name} finds {n} more.", "{other} brings {n} more."))
        found.append((text.format(name=name, other=other, n=more), have + more, f"{have} + {more}"))
    if have - more >= 2:
        text = rng.choice(("{name} gives {n} to {other}.", "{name} loses {n} of them."))
        found.append((text.format(name=name, other=other, n=more), have - more, f"{have} - {more}"))
    if have * times <= LARGEST:
        text = f"{name} gets so many that there are {times} times as many."
        found.append((text, have * times, f"{have} * {times}"))
    parts = [n for n in range(2, 10) if have % n == 0 and have // n >= 2]
    if parts:
        n = rng.choice(parts)
        text = f"{name} divides them into {n} equal parts and keeps one part."
        found.append((text, have // n, f"{have} / {n}"))
    return found


def problem(rng: random.Random, steps: int) -> dict[str, str]:
    """Draw a problem of that many steps: `question`, `rationale` (ends "The answer is N."),
    `answer` (N).
    """
    (name, other), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    have = rng.randint(5, 99)
    said, worked = [f"{name} has {have} {things}."], []
    for _ in range(steps):
        text, have, step = rng.choice(_steps(rng, name, other, have))
        said.append(text)
        worked.append(f"{step} = {have}.")
    said.append(f"How many {things} does {name} have now?")
    worked.append(f"The answer is {have}.")
    return {"question": " ".join(said), "rationale": " ".join(worked), "answer": str(have)}


def generate(
    sizes: dict[str, int] | None = None, seed: int = SEED
) -> dict[str, list[dict[str, str]]]:
    """Generate the rows. No question occurs twice, within a split or across. Row i has
    1 + i % LEVELS steps.

    Args:
      sizes: split -> number of rows; None: SPLITS.
      seed: of the random numbers.

    Returns:
      Split -> rows of `problem`.
    """
    rng, seen = random.Random(seed), set[str]()

    def row(steps: int) -> dict[str, str]:
        while (found := problem(rng, steps))["question"] in seen:
            pass
        seen.add(found["question"])
        return found

    return {
        split: [row(1 + i % LEVELS) for i in range(size)]
        for split, size in (sizes or SPLITS).items()
    }


class ArithmeticSteps(GeneratedRows):
    """Splits train, validation and test of `generate()`.

    Raise VERSION with any change of the rows, because prepared data is kept by version.
    """

    VERSION = tfds.core.Version("1.0.0")

    @staticmethod
    def rows() -> dict[str, list[dict[str, str]]]:
        return generate()
