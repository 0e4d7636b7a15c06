"""Published rows as rows of a task, with LLM-Adapters' wording of multiple choice and this
project's of summaries and dialogues.

A reader takes a row of a file or dataset and returns the rows of the task that it holds: prompt,
target, answer, and if there are any input, references and unit (see `task.Example`). A new format
is a reader and a line of FORMATS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.data.builders.files import Raw

Row = dict[str, Any]


class Format(NamedTuple):
    """A format of rows: its reader, and the fields of a row, for messages. `columns` identify a
    form of the user's rows; the first one is decisive.
    """

    read: Callable[[Raw], list[Row]]
    fields: str
    columns: tuple[str, ...] = ()

    def rows(self, row: Raw, where: str) -> list[Row]:
        """Reads a row; ConfigError names the row (`where`) if it is malformed."""
        try:
            found = self.read(row)
            json.dumps(found, ensure_ascii=False).encode()
            return found
        except KeyError as error:
            raise ConfigError(
                f"{where}: no field {error}, the row has {', '.join(map(repr, row)) or 'none'}."
                f" Expected {self.fields}."
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except (TypeError, ValueError) as error:  # also half a character, or a date of Parquet
            raise ConfigError(f"{where}: {error}. Expected {self.fields}.") from error


def field(row: Raw, name: str, kind: type = str) -> Any:
    """Returns a field of a row; KeyError if it is missing, TypeError if it is of another type."""
    if not isinstance(row[name], kind):
        wanted = "string" if kind is str else kind.__name__
        found = f"{type(row[name]).__name__} {row[name]!r:.80}"
        raise TypeError(f"field {name!r} must be a {wanted}, got {found}")
    return row[name]


_ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks: 48/2 = <<48/2=24>>24
_MARKER = re.compile(r"\s*(?:A:\s*)?")  # LLM-Adapters outputs start "\nA: "


def _llm_adapters(row: Raw) -> list[Row]:
    """Cuts white space around the output and, if there is an answer, an "A:" before it."""
    if "question" in row and "instruction" not in row:
        return gsm8k(row)
    output = field(row, "output").strip()
    output = _MARKER.sub("", output, count=1) if "answer" in row else output
    return instruction({**row, "output": output})


def instruction(row: Raw) -> list[Row]:
    """Reads instruction, input, output and answer; input and answer may be absent. An empty output
    becomes "The answer is {answer}.".
    """
    answer = field(row, "answer").strip() if "answer" in row else ""
    output, more = field(row, "output"), field(row, "input") if "input" in row else ""
    require(
        bool(output.strip() or answer),
        "'output' is empty and there is no 'answer', so there is nothing to learn.",
    )
    target = output if output.strip() else f"The answer is {answer}."
    return _question(field(row, "instruction"), target, answer, more)


def gsm8k(row: Raw) -> list[Row]:
    """Reads question and answer. Calculator annotations are cut, the last line, "#### N", becomes
    "The answer is N.", and N loses its thousands commas.
    """
    answer = field(row, "answer")
    rationale, mark, number = answer.rpartition("####")
    result = number.strip().replace(",", "")
    require(
        bool(mark and result),
        f"field 'answer' must end with '#### N', got {answer[-40:]!r}. Task 'rows' reads answers"
        " without that line.",
    )
    target = f"{_ANNOTATION.sub('', rationale).strip()}\nThe answer is {result}.".lstrip()
    return _question(field(row, "question"), target, result)


def _question(prompt: str, target: str, answer: str, input: str = "") -> list[Row]:
    require(bool(prompt.strip()), "the instruction (or question) is empty.")
    return [{"prompt": prompt, "input": input, "target": target, "answer": answer}]


def _choice(
    question: str, word: str, texts: list[str], gold: Any, between: str = " ", end: str = "\n\n"
) -> list[Row]:
    """Writes multiple choice; `gold` is the index of the right one of `texts`."""
    listed = between.join(f"{word.title()}{i}: {text}" for i, text in enumerate(texts, 1))
    allowed = "/".join(f"{word}{i}" for i in range(1, len(texts) + 1))
    prompt = f"Please choose the correct {question}\n\n{listed}{end}Answer format: {allowed}"
    return _labelled(prompt, f"{word}{int(gold) + 1}")


def _labelled(prompt: str, answer: str) -> list[Row]:
    return _question(prompt, f"the correct answer is {answer}", answer)


def _answers(question: str, texts: list[str], gold: Any) -> list[Row]:
    return _choice(f"answer to the question: {question}", "answer", texts, gold)


def _boolq(row: Raw) -> list[Row]:
    """Reads BoolQ without the passage, as in LLM-Adapters."""
    prompt = f"Please answer the following question with true or false, question: {row['question']}"
    answer = "true" if row["answer"] else "false"
    return _labelled(f"{prompt}?\n\nAnswer format: true/false", answer)


def _piqa(row: Raw) -> list[Row]:
    question, texts = f"solution to the question: {row['goal']}", [row["sol1"], row["sol2"]]
    return _choice(question, "solution", texts, row["label"], between="\n\n")


def _social_i_qa(row: Raw) -> list[Row]:
    texts = [row[f"answer{letter}"] for letter in "ABC"]
    return _answers(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


def _hellaswag(row: Raw) -> list[Row]:
    sentence = f"{row['activity_label']}: {row['context']}"
    question = f"ending to complete the given sentence: {sentence}"
    return _choice(question, "ending", row["endings"], row["label"])


def _winogrande(row: Raw) -> list[Row]:
    question = f"answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return _choice(question, "option", [row["option1"], row["option2"]], row["label"], end=" ")


def _arc(row: Raw) -> list[Row]:
    labels, texts = zip(
        *zip(row["choices"]["label"], row["choices"]["text"], strict=True), strict=True
    )
    return _answers(row["question"], [*texts], labels.index(row["answerKey"]))


def _openbookqa(row: Raw) -> list[Row]:
    texts = [row["question"][f"choice_{letter}"] for letter in "ABCD"]
    return _answers(row["question"]["stem"], texts, row["answerKey"])


_SUMMARIES = ("summary", "highlights", "summary1", "summary2", "summary3")


def _summary(row: Raw) -> list[Row]:
    """Several summaries are the references; the first is the target."""
    name = next((name for name in ("article", "document") if name in row), "dialogue")
    names = [name for name in _SUMMARIES if name in row] or ["summary"]
    summaries = [field(row, x).strip() for x in names]
    require(all(summaries), "a summary is empty.")
    prompt = f"Summarize the following {name.replace('document', 'article')}."
    return _reply(prompt, field(row, name).strip(), summaries)


def _reply(prompt: str, input: str, references: list[str], answer: str = "") -> list[Row]:
    row = {"prompt": prompt, "input": input, "target": references[0], "answer": answer}
    return [row | {"references": references}]


def _dialogue(row: Raw) -> list[Row]:
    """A row for each reply of the second speaker (in MultiWOZ the system)."""
    turns = field(row, "dialog", list) if "turns" not in row else row["turns"]
    if isinstance(turns, dict):  # a table of columns, as on the hub
        turns = turns["utterance"]
    turns = [field(turn, "utterance") if isinstance(turn, dict) else turn for turn in turns]
    require(all(isinstance(turn, str) for turn in turns), "every turn must be a string.")
    spoken = [" ".join(turn.split()) for turn in turns]
    lines = [f"Speaker {i % 2 + 1}: {text}" for i, text in enumerate(spoken)]
    prompt = "Write the next reply of Speaker 2 in the following dialogue."
    return [
        row | {"unit": " ".join(turns[:2])}
        for i in range(1, len(turns), 2)
        if spoken[i]
        for row in _reply(prompt, "\n".join(lines[:i]), [spoken[i]])
    ]


_WOZ_PROMPT = (
    "Below is a dialogue between a user and a system that finds restaurants. Give the state after"
    " the user's last turn: what the user is looking for, as area, food and price range, and each"
    ' detail requested in that turn, in the form "area: ...; food: ...; price range: ...; request:'
    ' ...", or "none".'
)


def _woz(row: Raw) -> list[Row]:
    """Returns a row for each turn of the user: the dialogue so far and its belief state, "area:
    east; food: dontcare; request: phone" or "none".
    """
    unit, lines, rows = str(row["dialogue_idx"]), list[str](), list[Row]()
    for turn in field(row, "dialogue", list):
        for speaker, name in (("System", "system_transcript"), ("User", "transcript")):
            if text := " ".join(field(turn, name).split()):
                lines.append(f"{speaker}: {text}")
        slots = {
            ("request" if act["act"] == "request" else name, value)
            for act in field(turn, "belief_state", list)
            for name, value in act["slots"]
        }
        state = "; ".join(f"{name}: {value}" for name, value in sorted(slots)) or "none"
        [found] = _reply(_WOZ_PROMPT, "\n".join(lines), [state], answer=state)
        rows.append(found | {"unit": unit})
    return rows


FORMATS = {
    "llm_adapters": Format(
        _llm_adapters,
        "instruction, output and, if there are any, input and answer (LLM-Adapters), or question,"
        " answer (GSM8K)",
    ),
    "gsm8k": Format(gsm8k, "question, answer"),
    "boolq": Format(_boolq, "question, answer"),
    "piqa": Format(_piqa, "goal, sol1, sol2, label"),
    "social_i_qa": Format(_social_i_qa, "context, question, answerA to answerC, label"),
    "hellaswag": Format(_hellaswag, "activity_label, context, endings, label"),
    "winogrande": Format(_winogrande, "sentence, option1, option2, label"),
    "arc": Format(_arc, "question, choices, answerKey"),
    "openbookqa": Format(_openbookqa, "question, answerKey"),
    "summary": Format(
        _summary, "dialogue, article or document, and summary, highlights or summary1 to summary3"
    ),
    "dialogue": Format(
        _dialogue, "dialog, a list of strings (DailyDialog), or turns with utterance (MultiWOZ 2.2)"
    ),
    "woz": Format(
        _woz,
        "dialogue_idx and dialogue, a list of turns with system_transcript, transcript and"
        " belief_state, a list of {act, slots: [[name, value]]} (WOZ 2.0)",
    ),
}
