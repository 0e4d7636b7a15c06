"""Tasks, which turn rows into examples, and choose how answers are read and scored."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.answers import ANY, Answers, around_answer

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "validate", "dev"),
    "test": ("test",),
}
LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters, folder dataset/"
CLOZE = "_cloze"  # ends the name of a task in cloze form
_FORMAT = re.compile(r"Answer format: *(\S+/\S+)\s*\Z")


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
      prompt: The user's text.
      target: The completion to learn, without EOS.
      answer: The right answer, which a parsed completion is compared with; "" if there is none.
      input: More of the user's text, such as a document.
      options: Completions to compare by likelihood; the target is one of them.
      references: Texts to compare a completion with by ROUGE; the target is the first.
      document: Whether `input` is a long text that may be cut at its end.
      turns: The turns of a conversation, in the form of chat templates; prompt and target are then
        the last ones of the user and the assistant.
      tools, settings: Arguments of the template: tools, and chat_template_kwargs.
      context: Number of first turns that are given and not learned.
      plain: Whether prompt and target are plain texts, without a template.
      form: Form of the user's row, a key of `builders.own.FORMS`.
      asked: The text that identifies the question, if `prompt` is another form of it.
      rejected: The example with the worse answer to the same prompt, of a pair for train.loss=dpo.
      unit: Text that rows of one dialogue share; "" for others.
      where: The row's position, for messages.
    """

    prompt: str
    target: str
    answer: str = ""
    input: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    document: bool = False
    turns: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    context: int = 0
    plain: bool = False
    form: str = ""
    asked: str = ""
    rejected: Example | None = None
    unit: str = field(default="", compare=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Files:
    """Files of a task."""

    format: str  # a key of `builders.published.FORMATS`, or "" for the user's rows
    names: Mapping[str, tuple[str, ...]]  # split -> stems


def named(format: str, pattern: str = "{}") -> Files:
    """Returns `Files` named by `pattern`, with SPLIT_WORDS in place of {}."""
    names = {split: tuple(map(pattern.format, words)) for split, words in SPLIT_WORDS.items()}
    return Files(format, names)


@dataclass(frozen=True)
class Task:
    """A task: a row of `tasks.TASKS`.

    Attributes:
      name: Its key in `TASKS`.
      group: "commonsense", "math", "summary" or "other".
      answers: Type of its answers, which reads and scores them.
      folder: The folder of its files.
      files: The formats of its files, tried in this order for each split.
      origin: Where people get the files.
      source: "files": files, or the public dataset of the same name; "own": the user's rows, in
        any files or dataset that data.data_dir names; "generated".
      document: Whether the input of its examples is a text that may be cut.
      cloze: The prompt of a task in cloze form, with {} in place of the question; "" for others.
    """

    name: str
    group: str
    answers: Answers
    folder: str = ""
    files: tuple[Files, ...] = (named("llm_adapters"),)
    origin: str = LLM_ADAPTERS
    source: Literal["files", "own", "generated"] = "files"
    document: bool = False
    cloze: str = ""

    @property
    def dataset(self) -> str:
        """The name of the public dataset of its rows."""
        return self.name.removesuffix(CLOZE)

    @property
    def own(self) -> bool:
        """True if its rows are the user's."""
        return self.source == "own"

    def example(self, row: Mapping[str, Any], where: str = "") -> Example:
        """Returns the example of a row with some of its fields; ConfigError if they are wrong."""
        fields: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
        example = Example(**fields, document=self.document, where=where)
        if isinstance(worse := fields.get("rejected"), Mapping):
            example = replace(example, rejected=self.example(worse))
        require(
            bool(example.answer or example.references) or self.answers is ANY,
            f"the answer is empty, and {self.name!r} is scored by it. Rows without an answer can be"
            " trained on as task 'rows'.",
        )
        if not example.plain and not example.turns:
            # The user's rows may say "Answer format: DD/MM/YYYY".
            with contextlib.suppress(*[ConfigError] if self.own else []):
                example = replace(example, options=_options_of(example))
        return as_cloze(example, self.cloze) if self.cloze else example


def _options_of(e: Example) -> tuple[str, ...]:
    """Returns the completions that a question allows: the target with each answer of its last line
    "Answer format: answer1/answer2"; none without such a line.
    """
    found = _FORMAT.search(e.prompt)
    if not found or not e.answer:
        return ()
    allowed = found.group(1).split("/")
    require(
        e.answer in allowed,
        f"the answer is {e.answer!r}, which is not one of the options that the question lists,"
        f" {', '.join(allowed)}.",
    )
    parts = around_answer(e.target, e.answer)
    require(bool(parts), f"the output {e.target!r} does not state the answer {e.answer!r}.")
    return tuple(option.join(parts) for option in allowed)


# --- cloze form -----------------------------------------------------------------------------------

_HEAD = re.compile(
    r"Please choose the correct \w+ to (?:the question|(?:fill in the blank to )?complete the given"
    r" sentence): "
)


def as_cloze(example: Example, form: str) -> Example:
    """Returns the cloze form of a multiple-choice example in LLM-Adapters' words, which lists its
    options and asks for a label ("answer2"); ConfigError if it is in other words.

    In cloze form the model sees only the question, and the text of each option is scored by its
    likelihood. The prompts are those of lm-evaluation-harness, which also tidies HellaSwag's text.
    A question of WinoGrande ends before its blank ("_"), and its options include the rest.

    Args:
      example: An example with its options listed.
      form: The prompt, with {} in place of the question.
    """
    question, texts = listed_options(example.prompt)
    before, blank, after = question.partition("_")
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
    words = "'Please choose the correct answer to the question: ... Answer1: ... Answer format: '"
    wrong = f"cloze form reads rows in LLM-Adapters' words, {words}; {prompt[:80]!r}"
    if not head or not ending:
        raise ConfigError(f"{wrong} is another.")
    rest, parts = prompt[head.end() : ending.start()], []
    # From the last label to the first: a question may contain the words "Answer1:".
    for label in reversed(ending.group(1).title().split("/")):
        rest, found, text = rest.rpartition(f"{label}:")
        require(bool(found), f"{wrong} lists no {label!r}.")
        parts.append(text.strip())
    require(all(parts), f"an option of {prompt[:80]!r} is empty, so it has no likelihood.")
    return rest.strip(), parts[::-1]
