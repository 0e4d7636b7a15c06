"""Contamination: test questions that a model has seen in training, found by their normalised text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zflora_jax.data.tasks import Example

_OTHER = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Lower case, and every run of characters that are neither letters nor digits as one space, none at the ends.

    It errs on the side of "found": questions that differ in operators or signs alone ("7 - 3", "7 * 3") are one to it.
    """
    return _OTHER.sub(" ", text.lower()).strip()


def question(example: Example) -> str:
    """What identifies a question: its prompt and input, normalised."""
    return normalise(f"{example.prompt} {example.input}")


def questions(examples: Iterable[Example]) -> frozenset[str]:
    """What `contaminated` compares with: the normalised questions of the training examples."""
    return frozenset(question(example) for example in examples)


def contaminated(test_examples: Iterable[Example], seen: frozenset[str]) -> list[bool]:
    """For each test example, whether its question is one of `seen` (equal normalised text, not nearly equal)."""
    return [question(example) in seen for example in test_examples]
