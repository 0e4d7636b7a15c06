"""Contamination: test questions that a model has seen in training, found by their
normalised text.
"""

from __future__ import annotations

from collections.abc import Iterable

from zflora_jax.data.conversations import last_answer
from zflora_jax.data.splits import normalise
from zflora_jax.data.tasks import Example


def question(example: Example) -> str:
    """What identifies a question, normalised: its prompt and input, or all that is said before the
    last answer of a conversation; of a text, the text.
    """
    said = [turn["content"] for turn in example.turns]
    asked = said[: last_answer(example)] if said else [example.prompt, example.input]
    return normalise(" ".join(asked)) or normalise(example.target)


def questions(examples: Iterable[Example]) -> frozenset[str]:
    """What `contaminated` compares with: the normalised questions of the training examples."""
    return frozenset(question(example) for example in examples)


def contaminated(test_examples: Iterable[Example], seen: frozenset[str]) -> list[bool]:
    """For each test example, whether its question is one of `seen` (equal normalised text, not
    nearly equal).
    """
    return [question(example) in seen for example in test_examples]
