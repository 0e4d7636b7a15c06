"""What a task is: how its rows become examples, and how answers are read and scored."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import answers
from zflora_jax.data.answers import PARSERS, Kind, Rule
from zflora_jax.data.sources import NAMED, Source
from zflora_jax.data.splits import Record, Split, read_split


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
      prompt: the user's text.
      target: the completion to learn, without EOS.
      answer: the right answer, which a parsed completion is compared with; "" if there is no single
        right one.
      input: more of the user's text, such as a document.
      options: completions to compare by likelihood, each in the target's form ("the correct answer
        is answer2"); the target is one of them.
      references: texts to compare a completion with by ROUGE; the target is the first.
      document: whether `input` is a long text that may be cut at its end.
      turns: of a conversation, as chat templates read them; prompt and target are then the user's
        and the assistant's last ones.
      tools: that a chat template is told, for such a conversation.
      settings: other arguments of the template (chat_template_kwargs).
      context: number of its first turns that are given and not learned.
      plain: whether prompt and target are texts as they are, in no template.
      form: of a row of one's own, a key of `builders.rows.FORMS`.
      asked: what identifies the question, where `prompt` is another form of it.
      unit: what rows that belong together share, such as those of one dialogue; "" of others.
      where: the row's position, for messages.
    """

    prompt: str
    target: str
    answer: str
    input: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    document: bool = False
    turns: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    context: int = 0
    plain: bool = False
    form: str = ""
    asked: str = ""
    unit: str = field(default="", compare=False)
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """A task. Subclasses say where its rows come from.

    Attributes:
      name: its key in `TASKS`.
      group: "commonsense", "math", "summary" or "other".
      kind: the form of its answers.
    """

    name: str
    group: str
    kind: Kind

    @property
    def dataset(self) -> str:
        """The task whose rows it has, which is also the name of their public dataset."""
        return self.name

    @property
    def own(self) -> bool:
        """Whether its rows are the user's own, so that data.data_dir says which they are."""
        return False

    def split(self, split: str, data: DataConfig, folders: Collection[str] = ()) -> Split:
        """Open the rows of a split.

        Args:
          split: "train", "validation" or "test".
          data: data_dir is read.
          folders: of all tasks, in lower case; files are not looked for in another task's folder.

        Raises:
          ConfigError: there is no such split, or its files cannot be read.
        """
        raise NotImplementedError

    def example(self, record: Record) -> Example:
        """The example of a row; ConfigError where the row does not fit the task."""
        raise NotImplementedError

    def rule(self, parser: str) -> Rule:
        """How answers are read and scored: "legacy" is LLM-Adapters' way, "fixed" corrects
        it; see `data.answers`.
        """
        require(parser in PARSERS, f"unknown parser {parser!r}: {nearest(parser, PARSERS)}.")
        return self.kind.legacy if parser == "legacy" else self.kind.fixed

    def parse_as(self, text: str, parser: str) -> str:
        """Read the answer of a completion; "" if it gives none."""
        return self.rule(parser).parse(text)

    def score_as(self, prediction: str, answer: str, parser: str) -> bool:
        """Whether an answer that the same parser has read is right."""
        return self.rule(parser).score(prediction, answer)

    def parse(self, text: str) -> str:
        return self.parse_as(text, "fixed")

    def score(self, prediction: str, answer: str) -> bool:
        return self.score_as(prediction, answer, "fixed")

    def gold(self, example: Example) -> str:
        """A completion that states the right answer and that both parsers read."""
        return self.kind.state(example.answer) if example.answer else example.target


@dataclass(frozen=True)
class Generated(Task):
    """Generated word problems; no question is in two splits. `data.data_dir`, if it is set, is the
    directory that keeps them.

    Attributes:
      builder: the module of its builder in `data.builders`, and the class, "module:Class".
    """

    builder: str

    def split(self, split: str, data: DataConfig, folders: Collection[str] = ()) -> Split:
        from zflora_jax.data.builders import open_prepared

        module, _, name = self.builder.partition(":")
        make = getattr(importlib.import_module(f"zflora_jax.data.builders.{module}"), name)
        folder = data.data_dir
        if folder and (folder.startswith(NAMED) or Path(folder).expanduser().is_file()):
            folder = None  # where the rows of another task are, and nothing can be kept
        rows = open_prepared(make, split, folder)
        return Split(rows, range(len(rows)), f"{self.name}, {split}")

    def example(self, record: Record) -> Example:
        return Example(
            _text(record["question"]), _text(record["rationale"]), _text(record["answer"])
        )


@dataclass(frozen=True)
class FileTask(Task):
    """Rows of files, or of the public dataset of the same name.

    Attributes:
      source: where the rows come from.
      document: whether the input of its examples is a text that may be cut.
    """

    source: Source
    document: bool = False

    @property
    def own(self) -> bool:
        return self.source.own

    def split(self, split: str, data: DataConfig, folders: Collection[str] = ()) -> Split:
        form = data.row_format or ""
        found = self.source, split, data.data_dir, folders, form if self.own else ""
        return read_split(self.name, *found, dataset=self.dataset)

    def example(self, record: Record) -> Example:
        prompt, target, answer, extra = (
            _text(record.get(name, "")) for name in ("instruction", "output", "answer", "input")
        )
        references = tuple(map(_text, record.get("references", ())))
        require(
            bool(answer or references) or self.kind is answers.ANY,
            f"the answer is empty, and {self.name!r} is scored by it. Rows without an answer can be"
            " trained on as task 'rows'.",
        )
        form, unit = _text(record.get("form", "")), _text(record.get("unit", ""))
        if messages := _text(record.get("messages", "")):
            settings = json.loads(_text(record["settings"]) or "{}")
            return Example(
                prompt,
                target,
                "",
                turns=tuple(json.loads(messages)),
                tools=tuple(json.loads(_text(record["tools"]) or "[]")),
                settings=tuple(settings.items()),
                context=int(_text(record["context"])),
                form=form,
                unit=unit,
            )
        plain = form in ("text", "prompt-completion")
        return Example(
            prompt,
            target,
            answer,
            extra,
            () if plain else self._options(prompt, target, answer),
            references,
            self.document,
            plain=plain,
            form=form,
            unit=unit,
        )

    def _options(self, prompt: str, target: str, answer: str) -> tuple[str, ...]:
        try:
            return options_of(prompt, target, answer)
        except ConfigError:  # rows of one's own may say "Answer format: DD/MM/YYYY"
            if self.own:
                return ()
            raise


_FORMAT = re.compile(r"Answer format: *(\S+/\S+)\s*\Z")


def options_of(prompt: str, target: str, answer: str) -> tuple[str, ...]:
    """The completions that a question allows.

    Args:
      prompt: the question; its last line may be "Answer format: answer1/answer2".
      target: the right completion.
      answer: the right answer, which is a part of the target.

    Returns:
      The target with each allowed answer in place of the right one; empty if the prompt has no such
      line or there is no answer.

    Raises:
      ConfigError: the right answer is not an allowed one, or the target does not state it.
    """
    found = _FORMAT.search(prompt)
    if not found or not answer:
        return ()
    allowed = found.group(1).split("/")
    require(
        answer in allowed,
        f"the answer is {answer!r}, which is not one of the options that the question lists,"
        f" {', '.join(allowed)}.",
    )
    before, stated_answer, after = target.rpartition(answer)
    require(bool(stated_answer), f"the output {target!r} does not state the answer {answer!r}.")
    return tuple(f"{before}{option}{after}" for option in allowed)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
