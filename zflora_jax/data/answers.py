"""Answers: reading them from completions, and scoring them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOLERANCE = 1e-3  # absolute, between numeric answers: the one of LLM-Adapters


@dataclass(frozen=True)
class Answers:
    """How a type of answers is read and scored."""

    parse: Callable[[str], str]  # a completion -> its answer, or "" if it gives none
    score: Callable[[str, str], bool]  # (parsed answer, right answer) -> whether it is right


_STATED = re.compile(r"answer(?: is\b:?|:)", re.IGNORECASE)


def _places(text: str) -> list[str]:
    """Returns the texts to search for an answer: the line after the last "answer is" or "answer:"
    (or the next line with text), all that follows it, the whole text.
    """
    found = list(_STATED.finditer(text))
    if not found:
        return [text]
    after = text[found[-1].end() :]
    return [after.strip().partition("\n")[0].strip(), after, text]


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRAC = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
# 3/4, 1 1/2, else a plain number: in "5-3" the minus is no sign, in "solution1" there is no number.
_VALUE = re.compile(
    r"(?<![\w./])(-?)(?:(\d+) +)?(\d+)/(\d*[1-9]\d*)(?![\w/]|\.\d)"
    r"|((?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)",
    re.ASCII,
)
_CLAUSE_END = re.compile(r"[.;,:!?](?=\s|$)|\(")
_OPERATION = re.compile(r"\d.*[-+*/×÷^x].*\d")


def values(text: str) -> list[str]:
    """Returns the numbers in a text, in order, without thousands commas. "3/4" and "\\frac{3}{4}"
    are 0.75, "1 1/2" is 1.5; "−3" (U+2212), "–3" (an en dash, but not in "1–3") and "-$3" are -3.
    """
    text = re.sub(r"(?<![\w.])\N{EN DASH}(?=[\d.$])", "-", text.replace("\N{MINUS SIGN}", "-"))
    text = _FRAC.sub(r"\1/\2", re.sub(r"-\$(?=[\d.])", "-", _THOUSANDS.sub("", text)))
    return [_value(match) for match in _VALUE.finditer(text)]


def _value(match: re.Match[str]) -> str:
    sign, whole, above, below, plain = match.groups()
    return plain if plain is not None else f"{sign}{int(whole or 0) + int(above) / int(below):.12g}"


def parse_number(text: str) -> str:
    """Returns the answer of a worked solution: the number stated after the last "answer is", else
    the last number of the text, else "".
    """
    statement, *rest = _places(text)
    anywhere = values(text)
    return (_stated_number(statement) if rest else "") or (anywhere[-1] if anywhere else "")


def _stated_number(statement: str) -> str:
    """Returns the first number of "36 dollars." and of "4. Then 4 + 1 = 5.", and the result of
    "49 - 34 = 15 customers.", "x = 5 - 2 = 3" and "3 = 5 - 2".
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


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def same_number(prediction: str, answer: str) -> bool:
    """Returns whether both are numbers that differ by at most TOLERANCE."""
    a, b = _as_float(prediction), _as_float(answer)
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


def parse_word(text: str, words: Sequence[str]) -> str:
    """Returns the first of `words` in a text, as a whole word in any case, or "". "answer 2" counts
    as "answer2". The last statement "answer is ..." is searched first, then the text behind it,
    then all of the text.
    """
    pattern = re.compile(
        rf"(?<!\w)(?:{'|'.join(re.sub(r'(?=[0-9])', ' ?', word) for word in words)})(?!\w)",
        re.IGNORECASE,
    )
    found = next((match for place in _places(text) if (match := pattern.search(place))), None)
    return found.group().replace(" ", "").lower() if found else ""


# The only group that matches holds the letter. Where the letter may be a word, only capitals count,
# and "A" only before a mark or an end: else it is the article.
_FIRST = re.compile(
    r"[\W_]*(?i:(?:option|choice|answer)\b[\W_]*)?(?:([A-E])(?![\w'’-])|\(([a-e])\)|([a-e])(?=\)|[\W_]*$))"
)
_NAMED = re.compile(r"(?i:\b(?:option|choice|answer)\s*(?:is\s*)?:?\s*)[(*]*([A-E])(?![\w'’-])")
_OPTION = re.compile(r"(?i:\boption\s+)([A-Ea-e])(?![\w'’-])")
_IN_PARENTHESES = re.compile(r"\(([A-Ea-e])\)")
_SINGLE = re.compile(r"(?<![\w'’-])([B-E](?![\w'’-])|A(?=\s*(?:$|[.,;:)\]!?*\n])))")


def parse_letter(text: str) -> str:
    """Returns the option letter that a text chooses: stated after the last "answer is", else named
    ("option B"), else in parentheses, else a single letter. Of several, the first of a statement
    and the last of a text count.
    """
    for place in _places(text)[:-1]:
        found = _FIRST.match(place)
        for pattern in (_IN_PARENTHESES, _OPTION, _SINGLE):
            found = found or pattern.search(place)
        if found:
            return next(filter(None, found.groups())).upper()
    for pattern in (_NAMED, _IN_PARENTHESES, _OPTION, _SINGLE):
        if hits := pattern.findall(text):
            return hits[-1].upper()
    return text.strip().upper() if re.fullmatch(r"\s*[a-e]\W*", text) else ""


def belief_state(text: str) -> str:
    """Returns the slots of the first line, "area: east; request: phone", in one spelling: lower
    case, sorted, without repetitions; "none" for no slot.
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
    """Returns whether two belief states agree in all that the user informs of, without requests:
    joint goal accuracy (Mrksic et al. 2017, section 5).
    """
    a, b = (
        [x for x in state.split("; ") if x != "none" and not x.startswith("request: ")]
        for state in (prediction, answer)
    )
    return prediction != "" and a == b


def one_of(*words: str) -> Answers:
    """Returns the type of answers that are one of a few words, such as answer1 to answer5."""
    return Answers(
        lambda text: parse_word(text, words), lambda found, word: found == word.strip().lower()
    )


CHOICES = (
    ("true", "false"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("solution1", "solution2"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
TRUE_FALSE, ANSWERS, SOLUTIONS, ENDINGS, OPTIONS = (one_of(*words) for words in CHOICES)
NUMBER = Answers(parse_number, same_number)
LETTER = Answers(parse_letter, lambda prediction, answer: prediction == answer)
TEXT = Answers(str.strip, lambda a, b: a.casefold().split() == b.casefold().split())
BELIEF = Answers(belief_state, same_goals)


def _score_any(text: str, answer: str) -> bool:
    """Scores a completion by the type of its right answer, for files of mixed answers."""
    if _as_float(answer) is not None:
        return same_number(parse_number(text), answer)
    if answer in tuple("ABCDE"):
        return parse_letter(text) == answer
    if words := next((words for words in CHOICES if answer in words), None):
        return parse_word(text, words) == answer
    given, wanted = (re.findall(r"\w+", x.lower()) for x in (_places(text)[0] or text, answer))
    return bool(wanted) and given[: len(wanted)] == wanted


ANY = Answers(str.strip, _score_any)
"""Numbers, letters or words, as the right answer is."""
