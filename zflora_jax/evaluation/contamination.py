"""Contamination: test questions whose text, as the model reads it, occurs in the training data."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterable

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.encoding import last_answer
from zflora_jax.data.task import listed_options
from zflora_jax.data.tasks import Example

# White space and marks, but not in numbers, and not operators: "7 - 3" and "7 + 3" are two.
_MARKS = re.compile(r"(?:[\s?!;:'\"]|[.,](?![0-9]))+")
_SPACED = re.compile(r" ?([!-/:-@\[-`{-~]) ?")  # "1 + 1", "1+1"


def normalise(text: str) -> str:
    """Returns a text in one case and Unicode form (NFKC), with one space for white space and marks,
    and none around operators. Symbols, vowel signs and emoji stay; so does a text of only marks.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _SPACED.sub(r"\1", _MARKS.sub(" ", folded)).strip() or text.strip()


def question(example: Example) -> str:
    """Returns the normalised text that identifies a question, without the words of its template.

    It is the prompt with the input. In cloze form, where the model does not read the options, it is
    only the question. For a conversation, it is the turns of user, assistant and tools before the
    last answer; for a text, the text.
    """
    if example.turns:
        return _asked(example, last_answer(example))
    if example.asked:
        return normalise(listed_options(example.asked)[0])
    return normalise(f"{example.prompt} {example.input}") or normalise(example.target)


def questions(examples: Iterable[Example]) -> frozenset[str]:
    """Returns the normalised questions of training examples: for a conversation those of all its
    answers, for multiple choice both forms, with and without the options.
    """
    found = set()
    for example in examples:
        answers = [i for i, turn in enumerate(example.turns) if turn["role"] == "assistant"]
        found |= {_asked(example, i) for i in answers} or {question(example)}
        if example.options:
            with contextlib.suppress(ConfigError):  # with other wording it has one form
                listed = example.asked or example.prompt
                found |= {normalise(listed), normalise(listed_options(listed)[0])}
    return frozenset(found)


def _asked(example: Example, answer: int) -> str:
    """Returns the text before a turn, without the system's turn."""
    turns = (turn for turn in example.turns[:answer] if turn["role"] != "system")
    return normalise(" ".join(turn["content"] for turn in turns))


def contaminated(test_examples: Iterable[Example], seen: frozenset[str]) -> list[bool]:
    """Returns whether the normalised question of each test example is in `seen`."""
    return [question(example) in seen for example in test_examples]
