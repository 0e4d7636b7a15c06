"""Generated word problems with worked answers: the same rows on every machine, no question twice.

`arithmetic` has one or two steps, `arithmetic_steps` one to five, so that its scores have neither a
floor nor a ceiling.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

NAMES = "Ada Ben Cleo Dan Eva Finn Gia Hugo Jack Kim Leo Mia Noah Paul Rosa Sam Tara Zoe".split()
THINGS = (
    "apples books coins cards stickers marbles pencils shells stamps cookies balloons beads".split()
)
LEVELS = 5  # steps of the longest problem of `arithmetic_steps`
LARGEST = 999  # and the largest number in its steps

Problem = dict[str, str]  # prompt, target (ends "The answer is N."), answer (N)
Change = tuple[str, int, str]  # (what happens, the number after it, the worked step)

# Each template: "operations: question => worked answer", over names and numbers.
_TEMPLATES = """
add: {name} has {a} {things} and buys {b} more. How many {things} does {name} have now?
  => {name} has {a} + {b} = {x} {things}.
subtract: {name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have left?
  => {a} - {b} = {x} {things}.
multiply: There are {a} boxes with {b} {things} in each box. How many {things} are there in all?
  => {a} * {b} = {x} {things}.
divide: {name} shares {a} {things} equally among {b} friends. How many {things} does each get?
  => {a} / {b} = {x} {things} each.
add: {other} is {a} years old. {name} is {b} years older than {other}. How old is {name}?
  => {name} is {a} + {b} = {x} years old.
multiply: {name} walks {a} miles every day. How many miles does {name} walk in {b} days?
  => {a} * {b} = {x} miles.
add, then add: {name} found {a} {things} on Monday, {b} on Tuesday and {c} on Friday. How many
  {things} did {name} find?
  => {a} + {b} = {x} and {x} + {c} = {y} {things}.
add, then subtract: A bus had {a} riders. Then {b} got on and {c} got off. How many riders are on
  the bus?
  => After {b} got on there were {a} + {b} = {x} riders. Then {x} - {c} = {y}.
subtract, then add: {name} had {a} {things}, lost {b} and then found {c}. How many {things} does
  {name} have now?
  => {a} - {b} = {x} and {x} + {c} = {y} {things}.
multiply, then add: {name} buys {a} packs of {b} {things} and already has {c} {things}. How many
  {things} does {name} have?
  => The packs hold {a} * {b} = {x} {things}. Then {x} + {c} = {y}.
multiply, then subtract: {name} fills {a} jars with {b} {things} each and gives {c} {things} away.
  How many {things} are left?
  => The jars hold {a} * {b} = {x} {things}. Then {x} - {c} = {y}.
divide, then add: {name} puts {a} {things} equally into {b} bags and adds {c} more to the red bag.
  How many {things} are in the red bag?
  => Each bag gets {a} / {b} = {x} {things}. Then {x} + {c} = {y}.
divide, then subtract: A coach splits {a} players into {b} equal teams. {c} players leave one team.
  How many players are left in that team?
  => Each team has {a} / {b} = {x} players. Then {x} - {c} = {y}.
add, then sum: {name} read {a} pages and {other} read {b} pages more than {name}. How many pages did
  they read together?
  => {other} read {a} + {b} = {x} pages. Together {a} + {x} = {y}.
multiply, then sum: {name} has {a} {things} and {other} has {b} times as many. How many {things} do
  they have together?
  => {other} has {a} * {b} = {x} {things}. Together {a} + {x} = {y}.
spend: {name} has {a} dollars and buys {b} tickets for {c} dollars each. How many dollars does
  {name} have left?
  => The tickets cost {b} * {c} = {x} dollars. Then {a} - {x} = {y}.
"""


class Template(NamedTuple):
    """A word problem of one or two operations, with results x and y."""

    first: str
    then: str  # "" for one operation
    question: str
    rationale: str


def _template(entry: str) -> Template:
    operations, text = " ".join(entry.split()).split(": ", 1)
    first, _, then = operations.partition(", then ")
    return Template(first, then, *text.split(" => "))


TEMPLATES = [_template(entry) for entry in re.split(r"\n(?=\w)", _TEMPLATES.strip())]


def _numbers(template: Template, draw: Callable[[int, int], int]) -> dict[str, int]:
    """Draws the numbers of a problem; draw(low, high) includes both ends."""
    c, y = 0, 0
    if template.first == "add":
        a, b = draw(3, 40), draw(2, 30)
        x = a + b
    elif template.first == "subtract":
        b, x = draw(2, 30), draw(2, 30)
        a = b + x
    elif template.first == "multiply":
        a, b = draw(2, 12), draw(2, 10)
        x = a * b
    elif template.first == "divide":
        b, x = draw(2, 10), draw(2, 12)
        a = b * x
    else:  # spend
        b, c, y = draw(2, 6), draw(2, 9), draw(1, 20)
        x = b * c
        a = x + y
    if template.then == "add":
        c = draw(2, 20)
        y = x + c
    elif template.then == "subtract":
        c = draw(1, x - 1)  # a positive answer
        y = x - c
    elif template.then == "sum":
        y = a + x
    return {"a": a, "b": b, "c": c, "x": x, "y": y or x}


def _arithmetic(rng: random.Random, index: int) -> Problem:
    template = TEMPLATES[index % len(TEMPLATES)]
    name, other = rng.sample(NAMES, 2)
    numbers = _numbers(template, rng.randint)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)} | numbers
    answer = str(numbers["y"])
    return {
        "prompt": template.question.format(**words),
        "target": f"{template.rationale.format(**words)} The answer is {answer}.",
        "answer": answer,
    }


def _changes(rng: random.Random, name: str, other: str, have: int) -> list[Change]:
    """Lists each operation that keeps the things that `name` has within 2..LARGEST."""
    more, times = rng.randint(3, 99), rng.randint(2, 9)
    found = []
    if have + more <= LARGEST:
        text = rng.choice((f"{name} finds {more} more.", f"{other} brings {more} more."))
        found.append((text, have + more, f"{have} + {more}"))
    if have - more >= 2:
        text = rng.choice((f"{name} gives {more} to {other}.", f"{name} loses {more} of them."))
        found.append((text, have - more, f"{have} - {more}"))
    if have * times <= LARGEST:
        text = f"{name} gets so many that there are {times} times as many."
        found.append((text, have * times, f"{have} * {times}"))
    parts = [n for n in range(2, 10) if have % n == 0 and have // n >= 2]
    if parts:
        n = rng.choice(parts)
        text = f"{name} divides them into {n} equal parts and keeps one part."
        found.append((text, have // n, f"{have} / {n}"))
    return found


def _arithmetic_steps(rng: random.Random, index: int) -> Problem:
    """Draws a problem of 1 + index % LEVELS steps."""
    (name, other), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    have = rng.randint(5, 99)
    told, worked = [f"{name} has {have} {things}."], []
    for _ in range(1 + index % LEVELS):
        text, have, step = rng.choice(_changes(rng, name, other, have))
        told.append(text)
        worked.append(f"{step} = {have}.")
    told.append(f"How many {things} does {name} have now?")
    worked.append(f"The answer is {have}.")
    return {"prompt": " ".join(told), "target": " ".join(worked), "answer": str(have)}


_SIZES = {"train": 12000, "validation": 500, "test": 1000}
# Name -> (draws the row of an index in its split, sizes of the splits, seed).
GENERATORS = {
    "arithmetic": (_arithmetic, {"train": 4000, "validation": 400, "test": 400}, 20250),
    "arithmetic_steps": (_arithmetic_steps, _SIZES, 20261),
}


def generate(name: str) -> dict[str, list[Problem]]:
    """Generates the rows of each split of a task, a key of GENERATORS; no question occurs twice."""
    draw, sizes, seed = GENERATORS[name]
    rng, seen = random.Random(seed), set[str]()

    def row(index: int) -> Problem:
        while (found := draw(rng, index))["prompt"] in seen:
            pass
        seen.add(found["prompt"])
        return found

    return {split: [row(i) for i in range(n)] for split, n in sizes.items()}
