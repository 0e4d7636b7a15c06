"""Answers: reading them from completions, scoring them, and stating the right one. Pure functions.

Every kind of answer is read by two rules. `legacy` is LLM-Adapters' own evaluation, mistakes
included, for comparison with published numbers; `fixed` reads what the text says. A rule's `parse`
returns the answer, "" if there is none; its `score` compares it with the right answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PARSERS = ("legacy", "fixed")
TOLERANCE = 1e-3  # absolute, between numeric answers: the one of LLM-Adapters

TRUE_FALSE = ("true", "false")
ANSWERS = ("answer1", "answer2", "answer3", "answer4", "answer5")
SOLUTIONS = ("solution1", "solution2")
ENDINGS = ("ending1", "ending2", "ending3", "ending4")
OPTIONS = ("option1", "option2")
LETTERS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True)
class Rule:
    """How answers are read and scored.

    Attributes:
      parse: completion -> its answer, or "".
      score: (parsed answer, right answer) -> whether it is right.
    """

    parse: Callable[[str], str]
    score: Callable[[str, str], bool]


@dataclass(frozen=True)
class Kind:
    """A form of answers.

    Attributes:
      legacy: LLM-Adapters' rule.
      fixed: the corrected rule.
      state: right answer -> a sentence that both rules read it from.
    """

    legacy: Rule
    fixed: Rule
    state: Callable[[str], str]


# --- what is stated -------------------------------------------------------------------------------

_STATED = re.compile(r"answer(?: is\b:?|:)", re.IGNORECASE)


def stated(text: str) -> str | None:
    """The text after the last "answer is" or "answer:", to the end of its line (the next one with
    text).

    Returns:
      None if nothing is stated.
    """
    after = _after_statement(text)
    return None if after is None else after.strip().partition("\n")[0].strip()


def _after_statement(text: str) -> str | None:
    found = list(_STATED.finditer(text))
    return text[found[-1].end() :] if found else None


def _places(text: str) -> list[str]:
    """The texts to search for an answer, the likeliest first: statement, what follows it, whole
    text.
    """
    return [place for place in (stated(text), _after_statement(text), text) if place is not None]


# --- numbers --------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PLAIN = (  # in "5-3" the minus is no sign, in "solution1" there is no number
    r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
_NUMBER = re.compile(_PLAIN, re.ASCII)
_FRAC = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
# 3/4, 1 1/2, else a plain number.
_VALUE = re.compile(
    rf"(?<![\w./])(-?)(?:(\d+) +)?(\d+)/(\d*[1-9]\d*)(?![\w/]|\.\d)|({_PLAIN})", re.ASCII
)


def numbers(text: str) -> list[str]:
    """The numbers in a text, in order, without thousands commas."""
    return _NUMBER.findall(_THOUSANDS.sub("", text))


def values(text: str) -> list[str]:
    """Like `numbers`, and "3/4" and "\\frac{3}{4}" are 0.75, "1 1/2" is 1.5; "−3" (U+2212), "–3"
    (an en dash, but not in "1–3") and "-$3" are -3.
    """
    text = re.sub(r"(?<![\w.])\N{EN DASH}(?=[\d.$])", "-", text.replace("\N{MINUS SIGN}", "-"))
    text = _FRAC.sub(r"\1/\2", re.sub(r"-\$(?=[\d.])", "-", _THOUSANDS.sub("", text)))
    return [_value(match) for match in _VALUE.finditer(text)]


def _value(match: re.Match[str]) -> str:
    sign, whole, above, below, plain = match.groups()
    return plain if plain is not None else f"{sign}{int(whole or 0) + int(above) / int(below):.12g}"


def parse_number(text: str) -> str:
    """The answer of a worked solution: the number stated after the last "answer is", else the last
    number of the text, else "".
    """
    anywhere = values(text)
    return _stated_number(stated(text) or "") or (anywhere[-1] if anywhere else "")


_CLAUSE_END = re.compile(r"[.;,:!?](?=\s|$)|\(")
_OPERATION = re.compile(r"\d.*[-+*/×÷^x].*\d")


def _stated_number(statement: str) -> str:
    """The first number of "36 dollars." and of "4. Then 4 + 1 = 5.", and the result of "49 - 34 =
    15 customers.", "x = 5 - 2 = 3" and "3 = 5 - 2".
    """
    # "- 5": nothing stands before it to subtract from.
    statement = re.sub(r"^[-\N{EN DASH}\N{MINUS SIGN}]\s*(?=[\d.$])", "-", statement)
    clause = _CLAUSE_END.split(statement, maxsplit=1)[0]
    parts = clause.split("=")
    while len(parts) > 1 and not values(parts[-1]):  # "5 - 2 = 3 = x"
        parts.pop()
    before, after = "=".join(parts[:-1]), parts[-1]
    if before and (result := values(after)) and not (_OPERATION.search(after) and values(before)):
        return result[0]
    return next(iter(values(clause) or values(statement)), "")


def legacy_number(text: str) -> str:
    """LLM-Adapters' reading: commas deleted, then the last `-?\\d+\\.?\\d*`. "3/4" gives 4, "5-3"
    gives -3, "$9." gives "9.".
    """
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return found[-1] if found else ""


def as_float(text: str) -> float | None:
    """The number that a text is, None if it is not one."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def same_number(prediction: str, answer: str) -> bool:
    """Whether both are numbers that differ by at most TOLERANCE."""
    a, b = as_float(prediction), as_float(answer)
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


# --- words and letters ----------------------------------------------------------------------------


def legacy_word(text: str, words: Sequence[str]) -> str:
    """LLM-Adapters' reading: the first of the words, case-sensitive, also inside another word
    ("untrue" gives true).
    """
    found = re.search("|".join(words), text)
    return found.group() if found else ""


def fixed_word(text: str, words: Sequence[str]) -> str:
    """The first of the words that stands alone, in any case: in the last statement "answer is ...",
    else after it, else anywhere.

    A space before the number is allowed ("Answer 2" is answer2).
    """
    pattern = re.compile(
        rf"(?<!\w)(?:{'|'.join(re.sub(r'(?=[0-9])', ' ?', word) for word in words)})(?!\w)",
        re.IGNORECASE,
    )
    found = next((match for place in _places(text) if (match := pattern.search(place))), None)
    return found.group().replace(" ", "").lower() if found else ""


def legacy_letter(text: str) -> str:
    """LLM-Adapters' reading of AQuA: the first capital A to E anywhere ("Because" gives B)."""
    return legacy_word(text, LETTERS)


# A letter is the only group that matches. Where it may be a word, only capitals count, and "A" only
# before a mark or an end: else it is the article.
_FIRST = re.compile(
    r"[\W_]*(?i:(?:option|choice|answer)\b[\W_]*)?(?:([A-E])(?![\w'’-])|\(([a-e])\)|([a-e])(?=\)|[\W_]*$))"
)
_NAMED = re.compile(r"(?i:\b(?:option|choice|answer)\s*(?:is\s*)?:?\s*)[(*]*([A-E])(?![\w'’-])")
_OPTION = re.compile(r"(?i:\boption\s+)([A-Ea-e])(?![\w'’-])")
_IN_PARENTHESES = re.compile(r"\(([A-Ea-e])\)")
_ALONE = re.compile(r"(?<![\w'’-])([B-E](?![\w'’-])|A(?=\s*(?:$|[.,;:)\]!?*\n])))")


def fixed_letter(text: str) -> str:
    """The option letter that a text chooses: stated after the last "answer is", else named ("option
    B"), else in parentheses, else alone.

    A letter of a word never counts, and the article "A" only in the position of an answer. Of
    several, the first of a statement and the last of a text count.
    """
    for place in _places(text)[:-1]:
        if (
            found := _FIRST.match(place)
            or _IN_PARENTHESES.search(place)
            or _OPTION.search(place)
            or _ALONE.search(place)
        ):
            return next(filter(None, found.groups())).upper()
    for pattern in (_NAMED, _IN_PARENTHESES, _OPTION, _ALONE):
        if hits := pattern.findall(text):
            return hits[-1].upper()
    return text.strip().upper() if re.fullmatch(r"\s*[a-e]\W*", text) else ""


# --- texts ----------------------------------------------------------------------------------------


def same_text(prediction: str, answer: str) -> bool:
    """Whether two texts are equal except for case and white space."""
    return prediction.casefold().split() == answer.casefold().split()


def belief_state(text: str) -> str:
    """The slots of the first line, "area: east; request: phone", in one spelling: lower case,
    sorted, without repetitions; "none" for no slot.
    """
    line = text.strip().partition("\n")[0]
    slots = {
        tuple(" ".join(part.lower().split()) for part in slot.split(":", 1))
        for slot in line.rstrip(". ").split(";")
        if ":" in slot
    }
    if not slots:
        return "none" if line.lower().strip(". ") == "none" else ""
    return "; ".join(": ".join(slot) for slot in sorted(slots))


def same_goals(prediction: str, answer: str) -> bool:
    """Whether two belief states agree in all that the user informs of: joint goal accuracy (Mrksic
    et al. 2017, section 5). Details that are requested in a turn are not part of the goal.
    """
    return prediction != "" and _goals(prediction) == _goals(answer)


def _goals(state: str) -> list[str]:
    slots = [] if state == "none" else state.split("; ")
    return [slot for slot in slots if not slot.startswith("request: ")]


# --- kinds ----------------------------------------------------------------------------------------


def _equal(prediction: str, answer: str) -> bool:
    return prediction == answer


def _equal_word(prediction: str, answer: str) -> bool:
    return prediction != "" and prediction == answer.strip().lower()


def _state_choice(answer: str) -> str:
    return f"the correct answer is {answer}"


def words(*allowed: str) -> Kind:
    """The kind of answers that are one of a few words, such as answer1 to answer5."""
    legacy = Rule(lambda text: legacy_word(text, allowed), _equal)
    return Kind(legacy, Rule(lambda text: fixed_word(text, allowed), _equal_word), _state_choice)


NUMBER = Kind(
    Rule(legacy_number, same_number), Rule(parse_number, same_number), "The answer is {}.".format
)
LETTER = Kind(Rule(legacy_letter, _equal), Rule(fixed_letter, _equal), "The answer is ({}).".format)
TEXT = Kind(Rule(str.strip, same_text), Rule(str.strip, same_text), str)
BELIEF = Kind(Rule(belief_state, same_goals), Rule(belief_state, same_goals), str)


_FAMILIES = (TRUE_FALSE, ANSWERS, SOLUTIONS, ENDINGS, OPTIONS)


def _score_any(prediction: str, answer: str) -> bool:
    """The rule of one task needs no gold answer to read a text; in a file of mixed answers the form
    of the gold answer says which rule it is.
    """
    if as_float(answer) is not None:
        return same_number(parse_number(prediction), answer)
    if answer in LETTERS:
        return fixed_letter(prediction) == answer
    if family := next((words for words in _FAMILIES if answer in words), None):
        return fixed_word(prediction, family) == answer
    said, wanted = (
        re.findall(r"\w+", text.lower()) for text in (stated(prediction) or prediction, answer)
    )
    return bool(wanted) and said[: len(wanted)] == wanted


def _score_any_legacy(prediction: str, answer: str) -> bool:
    if as_float(answer) is not None:
        return same_number(legacy_number(prediction), answer)
    for family in (*_FAMILIES, LETTERS):
        if answer in family:
            return legacy_word(prediction, family) == answer
    return same_text(prediction, answer)


def _state_any(answer: str) -> str:
    return (
        NUMBER.state(answer)
        if as_float(answer) is not None
        else LETTER.state(answer)
        if answer in LETTERS
        else _state_choice(answer)
    )


ANY = Kind(Rule(str.strip, _score_any_legacy), Rule(str.strip, _score_any), _state_any)
"""Numbers, letters or words, as the gold answer is."""
