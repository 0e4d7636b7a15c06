"""Generated arithmetic word problems with worked answers: small integers, one or two steps, the
same rows on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import tensorflow_datasets as tfds

SEED = 20250
SPLITS = {"train": 4000, "validation": 400, "test": 400}
NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gia",
    "Hugo",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Paul",
    "Rosa",
    "Sam",
    "Tara",
    "Zoe",
)
THINGS = (
    "apples",
    "books",
    "coins",
    "cards",
    "stickers",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "cookies",
    "balloons",
    "beads",
)

Numbers = dict[str, int]
Draw = Callable[[int, int], int]  # draw(low, high): an integer, both ends included


@dataclass(frozen=True)
class Template:
    """A word problem.

    Attributes:
      question: a format string over name, other, things and the numbers.
      rationale: likewise; `x`, or `y` of a second step, is the answer.
      numbers: draws the numbers.
    """

    question: str
    rationale: str
    numbers: Callable[[Draw], Numbers]


def _add(draw: Draw) -> Numbers:
    a, b = draw(3, 40), draw(2, 30)
    return {"a": a, "b": b, "x": a + b}


def _subtract(draw: Draw) -> Numbers:
    b, x = draw(2, 30), draw(2, 30)
    return {"a": b + x, "b": b, "x": x}


def _multiply(draw: Draw) -> Numbers:
    a, b = draw(2, 12), draw(2, 10)
    return {"a": a, "b": b, "x": a * b}


def _divide(draw: Draw) -> Numbers:
    b, x = draw(2, 10), draw(2, 12)
    return {"a": b * x, "b": b, "x": x}


def _then_add(first: Callable[[Draw], Numbers]) -> Callable[[Draw], Numbers]:
    def numbers(draw: Draw) -> Numbers:
        n = first(draw)
        c = draw(2, 20)
        return n | {"c": c, "y": n["x"] + c}

    return numbers


def _then_subtract(first: Callable[[Draw], Numbers]) -> Callable[[Draw], Numbers]:
    def numbers(draw: Draw) -> Numbers:
        n = first(draw)
        c = draw(1, n["x"] - 1)  # the answer stays positive; x is at least 2
        return n | {"c": c, "y": n["x"] - c}

    return numbers


def _both(first: Callable[[Draw], Numbers]) -> Callable[[Draw], Numbers]:
    """One person's number from the other's, then the two together."""

    def numbers(draw: Draw) -> Numbers:
        n = first(draw)
        return n | {"y": n["a"] + n["x"]}

    return numbers


def _spend(draw: Draw) -> Numbers:
    b, c, y = draw(2, 6), draw(2, 9), draw(1, 20)
    return {"a": b * c + y, "b": b, "c": c, "x": b * c, "y": y}


TEMPLATES = (
    Template(
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} has {a} + {b} = {x} {things}.",
        _add,
    ),
    Template(
        "{name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have left?",
        "{a} - {b} = {x} {things}.",
        _subtract,
    ),
    Template(
        "There are {a} boxes with {b} {things} in each box. How many {things} are there in all?",
        "{a} * {b} = {x} {things}.",
        _multiply,
    ),
    Template(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each get?",
        "{a} / {b} = {x} {things} each.",
        _divide,
    ),
    Template(
        "{other} is {a} years old. {name} is {b} years older than {other}. How old is {name}?",
        "{name} is {a} + {b} = {x} years old.",
        _add,
    ),
    Template(
        "{name} walks {a} miles every day. How many miles does {name} walk in {b} days?",
        "{a} * {b} = {x} miles.",
        _multiply,
    ),
    Template(
        "{name} found {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many {things}"
        " did {name} find?",
        "{a} + {b} = {x} and {x} + {c} = {y} {things}.",
        _then_add(_add),
    ),
    Template(
        "A bus had {a} riders. Then {b} got on and {c} got off. How many riders are on the bus?",
        "After {b} got on there were {a} + {b} = {x} riders. Then {x} - {c} = {y}.",
        _then_subtract(_add),
    ),
    Template(
        "{name} had {a} {things}, lost {b} and then found {c}. How many {things} does {name} have"
        " now?",
        "{a} - {b} = {x} and {x} + {c} = {y} {things}.",
        _then_add(_subtract),
    ),
    Template(
        "{name} buys {a} packs of {b} {things} and already has {c} {things}. How many {things} does"
        " {name} have?",
        "The packs hold {a} * {b} = {x} {things}. Then {x} + {c} = {y}.",
        _then_add(_multiply),
    ),
    Template(
        "{name} fills {a} jars with {b} {things} each and gives {c} {things} away. How many"
        " {things} are left?",
        "The jars hold {a} * {b} = {x} {things}. Then {x} - {c} = {y}.",
        _then_subtract(_multiply),
    ),
    Template(
        "{name} puts {a} {things} equally into {b} bags and adds {c} more to the red bag. How many"
        " {things} are in the red bag?",
        "Each bag gets {a} / {b} = {x} {things}. Then {x} + {c} = {y}.",
        _then_add(_divide),
    ),
    Template(
        "A coach splits {a} players into {b} equal teams. {c} players leave one team. How many"
        " players are left in that team?",
        "Each team has {a} / {b} = {x} players. Then {x} - {c} = {y}.",
        _then_subtract(_divide),
    ),
    Template(
        "{name} read {a} pages and {other} read {b} pages more than {name}. How many pages did they"
        " read together?",
        "{other} read {a} + {b} = {x} pages. Together {a} + {x} = {y}.",
        _both(_add),
    ),
    Template(
        "{name} has {a} {things} and {other} has {b} times as many. How many {things} do they have"
        " together?",
        "{other} has {a} * {b} = {x} {things}. Together {a} + {x} = {y}.",
        _both(_multiply),
    ),
    Template(
        "{name} has {a} dollars and buys {b} tickets for {c} dollars each. How many dollars does"
        " {name} have left?",
        "The tickets cost {b} * {c} = {x} dollars. Then {a} - {x} = {y}.",
        _spend,
    ),
)


def generate(
    sizes: dict[str, int] | None = None, seed: int = SEED
) -> dict[str, list[dict[str, str]]]:
    """Generate the rows. No question occurs twice, within a split or across.

    Templates take turns, so every sequence of rows has all of them about equally often.

    Args:
      sizes: split -> number of rows; None: SPLITS.
      seed: of the random numbers.

    Returns:
      Split -> rows with `question`, `rationale` (ends "The answer is N.") and `answer` (N).
    """
    rng = random.Random(seed)
    seen: set[str] = set()

    def row(template: Template) -> dict[str, str]:
        while True:
            name, other = rng.sample(NAMES, 2)
            numbers = template.numbers(rng.randint)
            words = {"name": name, "other": other, "things": rng.choice(THINGS)} | numbers
            question = template.question.format(**words)
            if question not in seen:
                seen.add(question)
                answer = str(numbers.get("y", numbers["x"]))
                return {
                    "question": question,
                    "rationale": f"{template.rationale.format(**words)} The answer is {answer}.",
                    "answer": answer,
                }

    return {
        split: [row(TEMPLATES[i % len(TEMPLATES)]) for i in range(size)]
        for split, size in (sizes or SPLITS).items()
    }


class GeneratedRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Rows {question, rationale, answer} that are generated."""

    # No downloads, no checksums. Left to itself, TFDS looks for a checksum file through a package
    # that it does not install.
    url_infos: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def rows() -> dict[str, list[dict[str, str]]]:
        """Split -> its rows."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {"question": text, "rationale": text, "answer": text}
            ),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: object
    ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {split: self._generate_examples(rows) for split, rows in self.rows().items()}

    def _generate_examples(
        self, rows: list[dict[str, str]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(rows)


class Arithmetic(GeneratedRows):
    """Splits train, validation and test of `generate()`.

    Raise VERSION with any change of the rows, because prepared data is kept by version.
    """

    VERSION = tfds.core.Version("1.0.0")

    @staticmethod
    def rows() -> dict[str, list[dict[str, str]]]:
        return generate()
