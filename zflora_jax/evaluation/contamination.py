"""Contamination: test questions that a model has seen in training, found by their
normalised text.
"""

from __future__ import annotations

from collections.abc import Iterable

from zflora_jax.data.splits import normalise
from zflora_jax.data.tasks import Example


def question(example: Example) -> str:
    """What identifies a question: its prompt and input, normalised."""
    return normalise(f"{example.prompt} {example.input}")


def questions(examples: Iterable[Example]) -> frozenset[str]:
    """What `contaminated` compares with: the normalised questions of the training examples."""
    return frozenset(question(example) for example in examples)


def contaminated(test_examples: Iterable[Example], seen: frozenset[str]) -> list[bool]:
    """For each test example, whether its question is one of `seen` (equal normalised text, not
    nearly equal).
    """
    return [question(example) in seen for example in test_examples]
