"""The texts of rows: LLM-Adapters' wording of multiple choice, this project's of summaries and
dialogues.

A change here changes prepared rows: raise VERSION of the builders that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Fields = dict[str, Any]


def choice(
    question: str,
    word: str,
    texts: Sequence[str],
    gold: int,
    *,
    between: str = " ",
    before_format: str = "\n\n",
) -> Fields:
    """A multiple-choice row in LLM-Adapters' words: "QUESTION Answer1: ... Answer format:
    answer1/answer2", output "the correct answer is answer2".

    Args:
      question: the first paragraph, such as "Please choose the correct answer to the question:
        ...".
      word: "answer", "solution", "ending" or "option".
      texts: the options.
      gold: the index of the right one.
      between: separates the options.
      before_format: separates the answer format.
    """
    listed = between.join(f"{word.title()}{i}: {text}" for i, text in enumerate(texts, start=1))
    allowed = "/".join(f"{word}{i}" for i in range(1, len(texts) + 1))
    return _answered(
        f"{question}\n\n{listed}{before_format}Answer format: {allowed}", f"{word}{gold + 1}"
    )


def boolq(question: str, answer: bool) -> Fields:
    """A BoolQ row, without the passage, as in LLM-Adapters.

    Args:
      question: as published: lower case, without a question mark.
      answer: the right answer.
    """
    text = (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer"
        " format: true/false"
    )
    return _answered(text, "true" if answer else "false")


def answer_choice(question: str, texts: Sequence[str], gold: int) -> Fields:
    """A row of social_i_qa (the question after its context), ARC or openbookqa."""
    return choice(
        f"Please choose the correct answer to the question: {question}", "answer", texts, gold
    )


def piqa(goal: str, texts: Sequence[str], gold: int) -> Fields:
    """A PIQA row."""
    return choice(
        f"Please choose the correct solution to the question: {goal}",
        "solution",
        texts,
        gold,
        between="\n\n",
    )


def hellaswag(activity: str, context: str, texts: Sequence[str], gold: int) -> Fields:
    """A HellaSwag row."""
    question = (
        f"Please choose the correct ending to complete the given sentence: {activity}: {context}"
    )
    return choice(question, "ending", texts, gold)


def winogrande(sentence: str, texts: Sequence[str], gold: int) -> Fields:
    """A WinoGrande row."""
    question = (
        "Please choose the correct answer to fill in the blank to complete the given sentence:"
        f" {sentence}"
    )
    return choice(question, "option", texts, gold, before_format=" ")


def _answered(instruction: str, answer: str) -> Fields:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def summary(what: str, text: str, references: Sequence[str]) -> Fields:
    """A row of a text and its summary; there is no single right answer.

    Args:
      what: "dialogue" or "article".
      text: the text.
      references: summaries; the first is the one to learn.
    """
    return {
        "instruction": f"Summarize the following {what}.",
        "input": text,
        "output": references[0],
        "references": list(references),
    }


def replies(turns: Sequence[str], unit: str) -> list[Fields]:
    """One row per reply of the second speaker, from the dialogue so far.

    Args:
      turns: the utterances, the first speaker's first.
      unit: names the dialogue; its rows are always on the same side of a hold-out.
    """
    said = [f"Speaker {i % 2 + 1}: {' '.join(turn.split())}" for i, turn in enumerate(turns)]
    return [
        {
            "instruction": "Write the next reply of Speaker 2 in the following dialogue.",
            "input": "\n".join(said[:i]),
            "output": " ".join(turns[i].split()),
            "references": [" ".join(turns[i].split())],
            "unit": unit,
        }
        for i in range(1, len(turns), 2)
        if turns[i].strip()
    ]


def belief(turns: Sequence[tuple[str, str]], slots: Sequence[tuple[str, str]], unit: str) -> Fields:
    """A WOZ row: from the turns so far to the belief state, "area: east; food: dontcare; request:
    phone" or "none".

    Args:
      turns: (system, user) utterances.
      slots: (slot, value) of the state.
      unit: names the dialogue.
    """
    lines = [
        f"{who}: {' '.join(text.split())}"
        for pair in turns
        for who, text in zip(("System", "User"), pair, strict=True)
        if text.strip()
    ]
    state = "; ".join(f"{name}: {value}" for name, value in sorted(set(slots))) or "none"
    instruction = (
        "Below is a dialogue between a user and a system that finds restaurants. Give the state"
        " after the user's last turn: what the user is looking for, as area, food and price range,"
        ' and each detail requested in that turn, in the form "area: ...; food: ...; price range:'
        ' ...; request: ...", or "none".'
    )
    return {
        "instruction": instruction,
        "input": "\n".join(lines),
        "output": state,
        "answer": state,
        "references": [state],
        "unit": unit,
    }
