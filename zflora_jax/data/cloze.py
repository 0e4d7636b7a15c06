"""Multiple choice in cloze form: the text of an option completes the question.

A row in LLM-Adapters' words lists its options and asks for a label ("answer2"), which a small model
answers by habit. In cloze form the model sees the question alone, and each option is scored by its
likelihood as the continuation, as lm-evaluation-harness does. The prompts of ARC, OpenBookQA, PIQA
and Social IQa are those of its tasks. HellaSwag's text is as the rows have it, where the harness
also tidies it, and of WinoGrande the whole end of the sentence is scored, where the harness scores
what follows the blank alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from zflora_jax.core.fields import require
from zflora_jax.data.splits import Record
from zflora_jax.data.task import Example, FileTask

_HEAD = re.compile(
    r"Please choose the correct \w+ to (?:the question|(?:fill in the blank to )?complete the given"
    r" sentence): "
)
_FORMAT = re.compile(r"\s+Answer format: *(\S+/\S+)\s*\Z")
BLANK = "_"  # of WinoGrande
CLOZE = "_cloze"  # ends the name of a task in cloze form


@dataclass(frozen=True)
class ClozeTask(FileTask):
    """A multiple-choice task in cloze form.

    Attributes:
      form: the prompt, with {} in place of the question.
    """

    form: str = "{}"

    @property
    def dataset(self) -> str:
        return self.name.removesuffix(CLOZE)

    def example(self, record: Record) -> Example:
        return as_cloze(super().example(record), self.form)


def as_cloze(example: Example, form: str) -> Example:
    """Turn a multiple-choice example into its cloze form.

    Args:
      example: in LLM-Adapters' words, with its options listed.
      form: the prompt, with {} in place of the question. A question with a blank ("_") ends before
        it, and its options go on with what follows the blank.

    Returns:
      An example of plain texts: its options begin with the space that separates them from the
      prompt.

    Raises:
      ConfigError: the question is in other words.
    """
    question, texts = listed_options(example.prompt)
    before, blank, after = question.partition(BLANK)
    if blank and example.answer.startswith("option"):
        question, texts = before.rstrip(), [f"{text}{after}" for text in texts]
    prompt = form.format(question)
    options = tuple(f" {text}" for text in texts)
    target = options[example.options.index(example.target)]
    return replace(
        example,
        prompt=prompt,
        target=target,
        answer=target.strip(),
        options=options,
        plain=True,
        asked=example.prompt,
    )


def listed_options(prompt: str) -> tuple[str, list[str]]:
    """(Question, texts of its options) of a prompt in LLM-Adapters' words.

    Raises:
      ConfigError: the prompt is in other words.
    """
    head, ending = _HEAD.match(prompt), _FORMAT.search(prompt)
    expected = (
        "cloze form reads rows in LLM-Adapters' words, 'Please choose the correct answer to the"
        " question: ... Answer1: ... Answer2: ... Answer format: answer1/answer2'"
    )
    require(bool(head and ending), f"{expected}; this row is {prompt[:80]!r}.")
    assert head and ending
    labels = [label.title() for label in ending.group(1).split("/")]
    rest, parts = prompt[head.end() : ending.start()], []
    # From the last label to the first: a question may contain the words "Answer1:".
    for label in reversed(labels):
        rest, found, text = rest.rpartition(f"{label}:")
        require(bool(found), f"{expected}; this row lists no {label!r}.")
        parts.append(text.strip())
    require(all(parts), f"an option of {prompt[:80]!r} is empty, so it has no likelihood.")
    return rest.strip(), parts[::-1]
