"""Answers: reading them from completions, and scoring them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

TOLERANCE = Decimal("1e-3")  # absolute, between numeric answers: the one of LLM-Adapters


@dataclass(frozen=True)
class Answers:
    """The parser and the score of one type of answers."""

    parse: Callable[[str], str]  # a completion -> its answer, or "" if it gives none
    score: Callable[[str, str], bool]  # (parsed answer, right answer) -> whether it is right


# --- texts ----------------------------------------------------------------------------------------

_ALIKE = str.maketrans("’‘–", "''-", "\N{VARIATION SELECTOR-16}")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁻]+")
_MIXED = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")  # 1½


def _spelled(text: str) -> str:
    """Returns a text in NFKC, but does not make 52 of "5²" and 51/2 of "5½"."""
    text = _SUPERSCRIPT.sub(lambda found: "^" + found.group(), _MIXED.sub(" ", text))
    return unicodedata.normalize("NFKC", text).replace("\N{FRACTION SLASH}", "/")


def _folded(text: str) -> str:
    """Returns a text in one case, with single spaces; symbols, marks and vowel signs stay."""
    text = _spelled(_spelled(text).casefold()).translate(_ALIKE)
    return " ".join(text.split())


_LATEX = re.compile(
    r"\$(?=\S)([^$\n]*?\S)\$(?!\d)|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}|\\([%$#&_])|\\[()\[\]]"
)
_COMMANDS = {"times": "×", "cdot": "×", "div": "÷", "pi": "π", "sqrt": "√", "pm": "±", "le": "≤"}
_COMMANDS |= {"leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "lt": "<", "gt": ">"}
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)
_HASHED = re.compile(r"^####[ \t]*(\S+)[ \t]*$", re.MULTILINE)
_STATED = re.compile(
    r"answer[*_`\"']*(?:\s+(?:is|should be|would be|must be)\b[*_`\"']*:?|\s*[:=])", re.IGNORECASE
)


def _marked(text: str) -> str:
    """Returns a completion without its thoughts and LaTeX, its marked answers as statements:
    \\boxed{...}, <answer>...</answer> and the line "#### ...".
    """
    text = _spelled(text).rpartition("</think>")[2].partition("<think>")[0].replace("{,}", ",")
    text = re.sub(r"\^?\{?\\(?:circ|degree)(?![a-z])\}?", "°", text)
    text = re.sub(r"\\([a-z]+)", lambda found: _COMMANDS.get(found[1], found[0]), text)
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[,;:! ]", "", text)
    text = re.sub(r"([\^_√])\{(-?\d+|\w)\}(?!\d)", r"\1\2", text)  # x^{2}, \sqrt{2}
    for _ in range(2):  # \text{} in $...$
        text = _LATEX.sub(lambda found: found[1] or found[2] or found[3] or " ", text)
    text = _BOXED.sub(r" answer: \1 ", text)
    return _HASHED.sub(r"answer: \1", _TAGGED.sub(r" answer: \1\n", text))


def _places(text: str) -> list[str]:
    """Returns the texts to search for an answer: the line after the last "answer is" or "answer:"
    (or the next line with text), all that follows it, the whole text.
    """
    found = list(_STATED.finditer(text))
    if not found:
        return [text]
    after = text[found[-1].end() :]
    return [after.strip().partition("\n")[0].strip(), after, text]


_CUE = re.compile(rf"{_STATED.pattern}|\\boxed\s*\{{|<answer>|^####|</think>", re.I | re.M)
# A whole word or number, not a part of "it's", "no-one", -2, 2.5 and 1/2. Thai and East Asian words
# follow each other without spaces.
_IN_WORD = r"[^\W\u0e00-\u0eff\u3040-\u9fff\uac00-\ud7af]"
_START = rf"(?:(?!{_IN_WORD})|(?<!{_IN_WORD})(?<!{_IN_WORD}['’-])(?<!\d[.,/:])(?<![-−](?=\d)))"
_END = rf"(?:(?<!{_IN_WORD})|(?!['’-]?{_IN_WORD})(?![.,/:]\d))"


def around_answer(text: str, answer: str) -> tuple[str, ...]:
    """Returns the texts before and after a target's stated answer: the one after the last "answer
    is", or else the first; () if there is none.
    """
    found = [m.span() for m in re.finditer(_START + re.escape(answer) + _END, text)]
    behind = max((m.end() for m in _CUE.finditer(text)), default=0)
    may_be_article = answer == "A" and not behind  # "A dog"
    found.sort(key=lambda x: (x[0] < behind, may_be_article and text[x[1] + 1 :][:1].islower()))
    return (text[: found[0][0]], text[found[0][1] :]) if found else ()


# Emphasis and quotes around words, not operators and apostrophes between them.
_AROUND = re.compile(
    r"(?<![^\W_])[*_`]+(?=\S)|(?<=\S)[*_`]+(?![^\W_]|\{)|(?<!\w)[\"'“‘’]+(?=\S)|(?<=\S)[\"'”’]+(?!\w)"
)
_CLAIM = r"(?:(?:be|the|(?-i:an?)|option|choice|answer)\s+)*[$(\[-]*\w+(?:[.,/]\w+)*[)\]]*"
_DENIED = re.compile(
    r"(?:\b(?:can)?not|\b(?:neither|rather\s+than|instead\s+of)|n['’]t)\s+"
    rf"{_CLAIM}(?:,?\s+n?or\s+{_CLAIM})*",
    re.IGNORECASE,
)


def _words(text: str) -> str:
    """Returns a completion without marks around its words, and without denied answers: "not B"."""
    return _DENIED.sub(" ", _AROUND.sub("", _marked(text)))


# --- numbers --------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRAC = re.compile(r"\\[dt]?frac(?:\{(-?\d+)\}\{(\d+)\}|(\d)(\d)(?!\d))")
# 3/4, 1 1/2, else a plain number: in "5-3" the minus is no sign, in "solution1" and "cm^2" there is
# no number.
_VALUE = re.compile(
    r"(?<![\w./])(-?)(?:(\d{1,15}) +)?(\d{1,15})/(\d{0,14}[1-9]\d{0,14})(?![\w/]|\.\d)"
    r"|((?<![\w.^])(?<!\^-)-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)",
    re.ASCII,
)
_CLAUSE_END = re.compile(r"[.;,:!?](?=\s|$)|\(|\b(?:because|since)\b")
_OPERATION = re.compile(r"\d.*[-+*/×÷^x].*\d")
_ASIDE = re.compile(r"\b(?:with|where|when|if|as|given)\b")  # "4 with 3 + 1 = 4" states 4


def _plain(text: str) -> str:
    """Returns a text with numbers in one form; see `values`."""
    text = text.replace("\N{MINUS SIGN}", "-")
    text = re.sub(r"(?<![\w.])\N{EN DASH}(?=[\d.$])", "-", text)
    text = re.sub(r"((?:=|\b(?:is|are|was|equals))[ \t]*)- (?=[\d.$])", r"\1-", text)  # x = - 12
    text = re.sub(r"(?<![\w.])-([$€£¥₹])(?=[\d.])", r"\1-", _THOUSANDS.sub("", text))
    text = re.sub(r"(?<![\w./])(\d+) and a half\b", r"\1 1/2", text)
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)  # 1\frac{1}{2}
    return _FRAC.sub(lambda found: f"{found[1] or found[3]}/{found[2] or found[4]}", text)


def values(text: str) -> list[str]:
    """Returns the numbers in a text, in order, without thousands commas. "3/4" and "\\frac{3}{4}"
    are 0.75, "1 1/2" is 1.5; "−3" (U+2212), "–3" (an en dash, but not in "1–3") and "-$3" are -3.
    """
    return [_value(found) for found in _VALUE.finditer(_plain(text))]


def _value(match: re.Match[str]) -> str:
    sign, whole, above, below, plain = match.groups()
    return plain if plain is not None else f"{sign}{int(whole or 0) + int(above) / int(below):.12g}"


def parse_number(text: str) -> str:
    """Returns the answer of a worked solution: the number stated after the last "answer is", else
    the last number of the text, else "".
    """
    text = _words(text)
    statement, *rest = _places(text)
    found = _stated_number(statement) if rest else ""
    return found or next(reversed(values(text)), "")


def _stated_number(statement: str) -> str:
    """Returns the first number of "36 dollars.", of "4. Then 4 + 1 = 5." and of "4 with 3 + 1 = 4",
    and the result of "49 - 34 = 15 customers.", "x = 5 - 2 = 3" and "3 = 5 - 2".
    """
    # "- 5": nothing stands before it to subtract from.
    statement = re.sub(r"^[-\N{EN DASH}\N{MINUS SIGN}]\s*(?=[\d.$])", "-", statement)
    clause = _plain(_CLAUSE_END.split(statement, maxsplit=1)[0])
    parts = clause.split("=")
    while len(parts) > 1 and not values(parts[-1]):  # "5 - 2 = 3 = x"
        parts.pop()
    before, after = "=".join(parts[:-1]), parts[-1]
    result = values(after) if before and not _ASIDE.search(before) else []
    if _OPERATION.search(after) and values(before):
        result = []
    return next(iter(result or values(clause) or values(statement)), "")


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)


def _number(text: str) -> Decimal | None:
    """Returns the finite number that a text is."""
    text = text.strip().replace(",", "")
    if not _NUMBER.fullmatch(text) or math.isinf(float(text)):
        return None
    return Decimal(text) if float(text) else Decimal(0)  # a zero's exponent has a limit


def same_number(prediction: str, answer: str) -> bool:
    """Returns whether both are numbers that differ by at most TOLERANCE."""
    a, b = _number(prediction), _number(answer)
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


# --- words, letters, belief states ----------------------------------------------------------------


def parse_word(text: str, words: Sequence[str]) -> str:
    """Returns the first of `words` in a text, as a whole word in any case and not denied, or "".
    "answer 2" counts as "answer2". The last statement "answer is ..." is searched first, then the
    text behind it, then all of the text.
    """
    pattern = re.compile(
        rf"(?<!\w)(?:{'|'.join(re.sub(r'(?=[0-9])', ' ?', word) for word in words)})(?!\w)",
        re.IGNORECASE,
    )
    places = _places(_words(text))
    found = next((match for place in places if (match := pattern.search(place))), None)
    return found.group().replace(" ", "").lower() if found else ""


# The only group that matches holds the letter. Where the letter may be a word, only capitals count,
# and "A" only before a mark or an end: else it is the article.
_FIRST = re.compile(
    r"[\W_]*(?i:(?:option|choice|answer)\b[\W_]*)?(?:([A-E])(?![\w'’+#-])|\(([a-e])\)|([a-e])(?=\)|[\W_]*$))"
)
_NAMED = re.compile(r"(?i:\b(?:option|choice|answer)\s*(?:is\s*)?:?\s*)[(*]*([A-E])(?![\w'’+#-])")
_OPTION = re.compile(r"(?i:\boption\s+)([A-Ea-e])(?![\w'’+#-])")
_IN_PARENTHESES = re.compile(r"\(([A-Ea-e])\)")
_SINGLE = re.compile(r"(?<![\w'’-])([B-E](?![\w'’+#-])|A(?=\s*(?:$|[.,;:)\]!?*\n])))")


# A choice that begins a text and is explained behind it: "B\n", "B) 15\n\n", "B, because", "B is
# correct.", if no later line begins with another one.
_LEADING = re.compile(
    r"[\W_]*(?i:(?:option|choice)\s+)?\(?([A-E])(?:[).:]*\s*?(?=\n|$)|[).:][^\n]*(?=\n\s*\n)"
    r"|\)?,?\s+(?i:because|since|as|is\s+(?:the\s+)?(?:correct|right|best)"
    r"(?:\s+(?:answer|option|choice|one))?(?=[.,;!\n]|$)))"
    r"(?![\s\S]*\n[\W_]*(?i:option |choice )?\(?[A-E](?:[).:]|\s*(?:\n|$)))"
)
_CHOSEN = re.compile(
    r"\b(?i:(?:correct|right|best) (?:option|choice) is:?)(?=\s*[(*]*[A-E](?![\w'’+#-]))"
)


def parse_letter(text: str) -> str:
    """Returns the option letter that a text chooses: stated after the last "answer is", else at its
    start ("B, because"), else named ("option B"), else in parentheses, else a single letter. If
    there are several, the first in a statement and the last in a text counts.
    """
    text = _words(
        re.sub(r"(?<!\*)(?<=\b[A-E])\*(?!\*)", "#", text) if text.count("*") == 1 else text
    )
    text = _CHOSEN.sub("answer is", text)
    for place in _places(text)[:-1]:
        found = _FIRST.match(place)
        for pattern in (_IN_PARENTHESES, _OPTION, _SINGLE):
            found = found or pattern.search(place)
        if found:
            return next(filter(None, found.groups())).upper()
    if found := _LEADING.match(text):
        return found[1]
    for pattern in (_NAMED, _IN_PARENTHESES, _OPTION, _SINGLE):
        if hits := pattern.findall(text):
            return hits[-1].upper()
    found = re.fullmatch(r"\s*([a-e])\W*", text)
    return found[1].upper() if found else ""


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
    """Returns whether two belief states agree in all slots that the user informs of, without
    requests: joint goal accuracy (Mrksic et al. 2017, section 5).
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
TEXT = Answers(str.strip, lambda a, b: _folded(a) == _folded(b))
BELIEF = Answers(belief_state, same_goals)


# --- mixed answers --------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
# The place where a stated text ends and a comment begins; "Paris, Texas" is one text.
_COMMENT = re.compile(
    r"\s+(?:because|since)\b"
    r"|[,;]\s+(?:because|since|as|so|which|but|not|I|it|he|she|they|this|that|there|we|you)\b"
    r"|(?:(?<=^yes)|(?<=^no))[,;:]",
    re.IGNORECASE,
)
_ENDS, _QUOTES = " .!", " `\"'“”‘’"
_MARKS = "*_" + _QUOTES


def _score_any(text: str, answer: str) -> bool:
    """Scores a completion by the type of its right answer, for files of mixed answers: a letter, a
    word, a number if it is nothing else, or else the whole text that is stated.
    """
    marked = _marked(answer).strip()  # "answer: 4" of "\\boxed{4}", x^2 of "$x^2$"
    head = _STATED.match(marked)
    stated = (marked[head.end() :].strip() if head else marked) or answer.strip()
    wanted = _folded(stated)
    if stated in tuple("ABCDE"):
        return parse_letter(text) == stated
    if words := next((words for words in CHOICES if wanted in words), None):
        return parse_word(text, words) == wanted
    if not {_joined(wanted), _joined(wanted.rstrip("."))}.isdisjoint(_stated_texts(text)):
        return True
    number = _value(whole) if (whole := _VALUE.fullmatch(_plain(_spelled(stated)))) else ""
    return same_number(parse_number(text), number)


def _stated_texts(text: str) -> set[str]:
    """Returns the possible answers of a completion: all of it, the text or the line after "answer
    is", or else its first line; each whole, up to the end of a sentence, or up to a comment.
    """
    found, text = {_folded(text)}, _marked(text)
    statement, *rest = _places(text)
    for part in (text, *rest[:1], statement if rest else text.strip().partition("\n")[0]):
        part = part.strip()
        for cut in (part, *(x.split(part, 1)[0] for x in (_SENTENCE_END, _COMMENT))):
            cut = _folded(cut)
            bare = {cut.strip(x).rstrip(x + _ENDS) for x in ("", _QUOTES, _MARKS)}
            found |= {cut, *bare}
    return {_joined(x) for x in found} - {""}


def _joined(text: str) -> str:
    """Returns a text without spaces around operators and behind commas: 3x + 5 is 3x+5."""
    text = re.sub(r", (?!\d{3}(?!\d))", ",", text)  # 1,234 is one number
    return re.sub(r" ?([-+*/^=<>×÷≤≥]) ?", r"\1", text)


ANY = Answers(str.strip, _score_any)
"""Answers of mixed types: numbers, letters, words or texts, by the right answer."""
