"""Contamination: test questions that a model has seen in training, found by their normalised text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zflora_jax.data.tasks import Example

_OTHER = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Lower case, and every run of characters that are neither letters nor digits as one space, none at the ends."""
    return _OTHER.sub(" ", text.lower()).strip()


def question(example: Example) -> str:
    """What identifies a question: its prompt and input, normalised."""
    return normalise(f"{example.prompt} {example.input}")


def contaminated(test_examples: Iterable[Example], train_examples: Iterable[Example]) -> list[bool]:
    """For each test example, whether its question is also one of the training examples' (equal normalised text, not nearly equal)."""
    seen = {question(example) for example in train_examples}
    return [question(example) in seen for example in test_examples]
