"""Contamination: test questions that occur in the training data, by their normalised text."""

from __future__ import annotations

from collections.abc import Iterable

from zflora_jax.data.encoding import last_answer
from zflora_jax.data.splits import normalise
from zflora_jax.data.tasks import Example


def question(example: Example) -> str:
    """Returns the normalised text that identifies a question: its prompt and input; of a
    conversation, the turns of user, assistant and tools before the last answer; of a text, the
    text.
    """
    if example.turns:
        return _asked(example, last_answer(example))
    asked = example.asked or f"{example.prompt} {example.input}"
    return normalise(asked) or normalise(example.target)


def questions(examples: Iterable[Example]) -> frozenset[str]:
    """Returns the normalised questions of training examples, of a conversation those of all its
    answers.
    """
    found = set()
    for example in examples:
        answers = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
        found |= {_asked(example, i) for i in answers} or {question(example)}
    return frozenset(found)


def _asked(example: Example, answer: int) -> str:
    """Returns the text before a turn, without the system's."""
    turns = (turn for turn in example.turns[:answer] if turn["role"] != "system")
    return normalise(" ".join(turn["content"] for turn in turns))


def contaminated(test_examples: Iterable[Example], seen: frozenset[str]) -> list[bool]:
    """Returns for each test example whether its question is one of `seen` (equal normalised text,
    not nearly equal).
    """
    return [question(example) in seen for example in test_examples]
