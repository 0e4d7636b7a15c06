"""Multiple choice in cloze form: the text of an option completes the question.

In LLM-Adapters' words a row lists its options and asks for a label ("answer2"), which a small model
answers by habit. In cloze form the model sees only the question, and each option is scored by its
likelihood as the continuation. The prompts are those of lm-evaluation-harness, which also tidies
HellaSwag's text, and of WinoGrande scores only what follows the blank.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from zflora_jax.core.fields import require

if TYPE_CHECKING:
    from zflora_jax.data.task import Example

_HEAD = re.compile(
    r"Please choose the correct \w+ to (?:the question|(?:fill in the blank to )?complete the given"
    r" sentence): "
)
_FORMAT = re.compile(r"\s+Answer format: *(\S+/\S+)\s*\Z")
BLANK = "_"  # of WinoGrande
CLOZE = "_cloze"  # ends the name of a task in cloze form


def as_cloze(example: Example, form: str) -> Example:
    """Returns the cloze form of a multiple-choice example in LLM-Adapters' words; ConfigError if it
    is in other words.

    A question with a blank ("_") ends before it, and its options go on with what follows. Options
    begin with the space that separates them from the prompt.

    Args:
      example: An example with its options listed.
      form: The prompt, with {} in place of the question.
    """
    question, texts = listed_options(example.prompt)
    before, blank, after = question.partition(BLANK)
    if blank and example.answer.startswith("option"):
        question, texts = before.rstrip(), [f"{text}{after}" for text in texts]
    options = tuple(f" {text}" for text in texts)
    target = options[example.options.index(example.target)]
    return replace(
        example,
        prompt=form.format(question),
        target=target,
        answer=target.strip(),
        options=options,
        plain=True,
        asked=example.prompt,
    )


def listed_options(prompt: str) -> tuple[str, list[str]]:
    """Splits a prompt in LLM-Adapters' words into its question and the texts of its options;
    ConfigError if it is in other words.
    """
    head, ending = _HEAD.match(prompt), _FORMAT.search(prompt)
    expected = (
        "cloze form reads rows in LLM-Adapters' words, 'Please choose the correct answer to the"
        " question: ... Answer1: ... Answer2: ... Answer format: answer1/answer2'"
    )
    require(bool(head and ending), f"{expected}; this row is {prompt[:80]!r}.")
    assert head and ending
    rest, parts = prompt[head.end() : ending.start()], []
    # From the last label to the first: a question may contain the words "Answer1:".
    for label in reversed([label.title() for label in ending.group(1).split("/")]):
        rest, found, text = rest.rpartition(f"{label}:")
        require(bool(found), f"{expected}; this row lists no {label!r}.")
        parts.append(text.strip())
    require(all(parts), f"an option of {prompt[:80]!r} is empty, so it has no likelihood.")
    return rest.strip(), parts[::-1]
