"""Answers: what LLM-Adapters' rules and the corrected ones read in the same text, side by side."""

import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.data import answers
from zflora_jax.data.answers import (
    ANY,
    BELIEF,
    LETTER,
    NUMBER,
    TEXT,
    Kind,
    belief_state,
    values,
    words,
)
from zflora_jax.data.tasks import PARSERS, TASKS

BOOLQ, PIQA, ARC, HELLASWAG, WINOGRANDE = (
    words(*allowed)
    for allowed in (
        answers.TRUE_FALSE,
        answers.SOLUTIONS,
        answers.ANSWERS,
        answers.ENDINGS,
        answers.OPTIONS,
    )
)

# kind, completion, legacy, fixed
TABLE: list[tuple[Kind, str, str, str]] = [
    # true / false
    (BOOLQ, "the correct answer is true", "true", "true"),
    (BOOLQ, "the correct answer is false", "false", "false"),
    (BOOLQ, "the correct answer is True.", "", "true"),
    (BOOLQ, "FALSE", "", "false"),
    (BOOLQ, "That is untrue, so the answer is false", "true", "false"),
    (BOOLQ, "untrue", "true", ""),
    (BOOLQ, "falsehoods", "false", ""),
    (BOOLQ, "Some say true, but the correct answer is false", "true", "false"),
    (BOOLQ, "the answer is true. No: the answer is false.", "true", "false"),
    (BOOLQ, "the answer is\n\nfalse, not true", "false", "false"),
    (BOOLQ, "It is (false)", "false", "false"),
    (BOOLQ, "yes", "", ""),
    (BOOLQ, "", "", ""),
    # answers, solutions, endings, options
    (ARC, "the correct answer is answer3", "answer3", "answer3"),
    (ARC, "the correct answer is Answer3", "", "answer3"),
    (ARC, "the correct answer is Answer 3.", "", "answer3"),
    (ARC, "answer1 is wrong, so the correct answer is answer4", "answer1", "answer4"),
    (ARC, "the correct answer is answer5", "answer5", "answer5"),
    (ARC, "the correct answer is answer12", "answer1", ""),
    (ARC, "the correct answer is answer6", "", ""),
    (ARC, "the correct answer is solution1", "", ""),
    (ARC, "answer2\n\nanswer1", "answer2", "answer2"),
    (PIQA, "the correct answer is solution2", "solution2", "solution2"),
    (PIQA, "Solution1", "", "solution1"),
    (PIQA, "resolution1 or solution2", "solution1", "solution2"),
    (PIQA, "the correct answer is both", "", ""),
    (HELLASWAG, "the correct answer is ending4", "ending4", "ending4"),
    (HELLASWAG, "Ending 2", "", "ending2"),
    (HELLASWAG, "pending1, ending3", "ending1", "ending3"),
    (HELLASWAG, "ending5", "", ""),
    (WINOGRANDE, "the correct answer is option1", "option1", "option1"),
    (WINOGRANDE, "OPTION2", "", "option2"),
    (WINOGRANDE, "not option1; the answer is option2", "option1", "option2"),
    # numbers
    (NUMBER, "2 + 2 = 4. The answer is 4.", "4.", "4"),
    (NUMBER, "The answer is 4. There were 10 at first.", "10", "4"),
    (NUMBER, "The answer is 3/4.", "4.", "0.75"),
    (NUMBER, "The answer is 1 1/2 cups", "2", "1.5"),
    (NUMBER, "The answer is -1 1/2", "2", "-1.5"),
    (NUMBER, "The answer is 1/3", "3", "0.333333333333"),
    (NUMBER, "It took 5-3", "-3", "3"),
    (NUMBER, "The answer is 5-3=2", "2", "2"),
    (NUMBER, "The answer is -3", "-3", "-3"),
    (NUMBER, "The answer is \N{MINUS SIGN}3", "3", "-3"),
    (NUMBER, "The answer is -$3.50", "3.50", "-3.50"),
    (NUMBER, "The answer is $1,250.50 in 3 days.", "3", "1250.50"),
    (NUMBER, "The answer is $9.", "9.", "9"),
    (NUMBER, "The answer is 1,234,567", "1234567", "1234567"),
    (NUMBER, "They are 3,4", "34", "4"),
    (NUMBER, "The answer is 50%.", "50", "50"),
    (NUMBER, "The answer is .5", "5", ".5"),
    (NUMBER, "The answer is 49 - 34 = 15 customers.", "15", "15"),
    (NUMBER, "THE ANSWER IS: **12**", "12", "12"),
    (NUMBER, "The answer is 3. No: the answer is -7.\nAsk 9 more.", "9", "-7"),
    (NUMBER, "solution1", "1", ""),
    (NUMBER, "So on 3/4/2020 there were 7", "7", "7"),
    (NUMBER, "The answer is 4/0", "0", "4"),
    (NUMBER, "The answer is 4. Then 4 + 1 = 5.", "5.", "4"),
    (NUMBER, "The answer is 12. Check: 3 * 5 = 15", "15", "12"),
    (NUMBER, "The answer is 5 hours (5 * 60 = 300 minutes).", "300", "5"),
    (NUMBER, "The answer is 36 = 6^2", "2", "36"),
    (NUMBER, "The answer is\n42\n\nThere were 10.", "10.", "42"),
    (NUMBER, "The answer is 5 apples + 3 apples = 8 apples.", "8", "8"),
    (NUMBER, "The answer is (5)", "5", "5"),
    (NUMBER, "The answer is - 5", "5", "-5"),
    (NUMBER, "The answer is \N{EN DASH}5.", "5.", "-5"),
    (NUMBER, "The answer is 1\N{EN DASH}3 apples", "3", "1"),
    (NUMBER, "The answer is x = 5 - 2 = 3", "3", "3"),
    (NUMBER, "The answer is 10% of 50 = 5", "5", "5"),
    (NUMBER, r"The answer is \frac{3}{4}.", "4", "0.75"),
    (NUMBER, r"The answer is \frac{-3}{4}.", "4", "-0.75"),
    (NUMBER, "Answer: 12. There are 30 days.", "30", "12"),
    (NUMBER, "**Answer:** 12\nCheck: 3*5=15", "15", "12"),
    (NUMBER, "The answer is 2 * 5 = 10 = x.", "10", "10"),
    (NUMBER, "The answer is 1.5e3", "3", "1.5e3"),
    (NUMBER, "no idea", "", ""),
    # letters
    (LETTER, "The answer is (B).", "B", "B"),
    (LETTER, "Because of this the answer is (D).", "B", "D"),
    (LETTER, "The answer is B", "B", "B"),
    (LETTER, "The answer is option C.", "C", "C"),
    (LETTER, "The answer is (c)", "", "C"),
    (LETTER, "the answer is d.", "", "D"),
    (LETTER, "The answer is b) 5", "", "B"),
    (LETTER, "the answer is 5 km, option c", "", "C"),
    (LETTER, "B.", "B", "B"),
    (LETTER, "A", "A", "A"),
    (LETTER, "(E) 12", "E", "E"),
    (LETTER, "A man walks 5 miles. The answer is E.", "A", "E"),
    (LETTER, "A man walks 5 miles, so option D", "A", "D"),
    (LETTER, "A man walks 5 miles", "A", ""),
    (LETTER, "The answer is A", "A", "A"),
    (LETTER, "The answer is 23.65, (A).", "A", "A"),
    (LETTER, "The answer is a number", "", ""),
    (LETTER, "Add them. Carl's Dog Eats", "A", ""),
    (LETTER, "Rationale: (A) is too small and (B) too big, so (C)", "A", "C"),
    (LETTER, "Answer: E", "A", "E"),
    (LETTER, "**Answer: (B)**", "A", "B"),
    (LETTER, "The answer is\nB", "B", "B"),
    (LETTER, "The correct answer is **D) 40**", "D", "D"),
    (LETTER, "Plan A-1, B-side", "A", ""),
    (LETTER, "the sum is 12", "", ""),
    # belief states and texts
    (
        BELIEF,
        "price range: cheap; area: East",
        "area: east; price range: cheap",
        "area: east; price range: cheap",
    ),
    (
        BELIEF,
        "area: east; area:  east ; request: phone.\nUser: thanks",
        "area: east; request: phone",
        "area: east; request: phone",
    ),
    (BELIEF, "None.", "none", "none"),
    (BELIEF, "I do not know", "", ""),
    (TEXT, " A summary. ", "A summary.", "A summary."),
]


@pytest.mark.parametrize(
    ("kind", "text", "legacy", "fixed"),
    TABLE,
    ids=[f"{i}-{text[:30]!r}" for i, (_, text, *_) in enumerate(TABLE)],
)
def test_both_rules(kind, text, legacy, fixed):
    assert (kind.legacy.parse(text), kind.fixed.parse(text)) == (legacy, fixed)


def test_the_table_has_rows_of_every_kind_and_the_rules_differ():
    assert len(TABLE) >= 60 and {id(kind) for kind, *_ in TABLE} == {
        id(k) for k in (BOOLQ, PIQA, ARC, HELLASWAG, WINOGRANDE, NUMBER, LETTER, BELIEF, TEXT)
    }
    assert sum(legacy != fixed for _, _, legacy, fixed in TABLE) > 30


@pytest.mark.parametrize(
    ("kind", "prediction", "answer", "legacy", "fixed"),
    [
        (NUMBER, "4.0009", "4", True, True),
        (NUMBER, "4.0011", "4", False, False),
        (NUMBER, "9.", "9.0", True, True),
        (NUMBER, "", "4", False, False),  # legacy: infinity
        (NUMBER, "0.333333333333", "0.3333333333333333", True, True),
        (BOOLQ, "true", "true", True, True),
        (BOOLQ, "true", "True", False, True),  # legacy: equal strings
        (BOOLQ, "", "true", False, False),
        (LETTER, "B", "B", True, True),
        (LETTER, "", "B", False, False),
        (BELIEF, "area: east", "area: east", True, True),
        (BELIEF, "area: east", "area: east; food: thai", False, False),
        (BELIEF, "area: east", "area: east; request: phone", True, True),  # the joint goal
        (BELIEF, "area: east; request: food", "area: east; request: phone", True, True),
        (BELIEF, "none", "request: phone", True, True),
        (BELIEF, "", "none", False, False),
        (BELIEF, "request: phone", "area: east", False, False),
        (TEXT, "The  end.", "the end.", True, True),
        (TEXT, "The end", "the end.", False, False),
    ],
)
def test_scores(kind, prediction, answer, legacy, fixed):
    assert (kind.legacy.score(prediction, answer), kind.fixed.score(prediction, answer)) == (
        legacy,
        fixed,
    )


@pytest.mark.parametrize(
    ("text", "answer", "legacy", "fixed"),
    [
        ("The answer is 4. Of 10.", "4.0", False, True),
        ("The answer is 3/4.", "0.75", False, True),
        ("Because: the answer is (D).", "D", False, True),
        ("Because: the answer is (D).", "B", True, False),
        ("the correct answer is option D", "D", True, True),
        ("untrue, the answer is false", "false", False, True),
        ("the correct answer is answer2", "answer2", True, True),
        ("the correct answer is answer2", "answer1", False, False),
        ("New York", "new york", True, True),
        ("(B) 12", "B", True, True),
        ("(B) 12", "A", False, False),
        ("I have 2 ideas: solution1", "solution1", True, True),
        ("I have 2 ideas: solution1", "solution2", False, False),
        ("answer 2", "answer2", False, True),
        ("The answer is 36 dollars in 3 days", "36", False, True),
        ("The answer is 36 dollars in 3 days", "3", True, False),
    ],
)
def test_in_mixed_files_the_gold_answer_says_which_rule_applies(text, answer, legacy, fixed):
    assert tuple(rule.score(rule.parse(text), answer) for rule in (ANY.legacy, ANY.fixed)) == (
        legacy,
        fixed,
    )


def test_what_is_stated_is_read_back_by_both_rules():
    for kind, gold in [
        (NUMBER, "-11.0"),
        (NUMBER, "1.1666666666666667"),
        (NUMBER, "7"),
        (LETTER, "E"),
        (ARC, "answer5"),
        (BOOLQ, "true"),
        (BELIEF, "none"),
    ]:
        for rule in (kind.legacy, kind.fixed):
            assert rule.score(rule.parse(kind.state(gold)), gold), (gold, rule)


def test_values_and_belief_states():
    assert values("1/2 of 3 1/4, 6 / 2, 1,000.5 and 7/8/9") == [
        "0.5",
        "3.25",
        "6",
        "2",
        "1000.5",
        "7",
        "8",
        "9",
    ]
    state = "food: north american; price range: dontcare; request: address"
    assert belief_state(state) == state == belief_state(belief_state(state))


def test_parsers_are_named():
    task = TASKS["boolq"]
    assert {p: task.parse_as("untrue", p) for p in PARSERS} == {"legacy": "true", "fixed": ""}
    assert (
        task.parse("untrue") == ""
        and task.score("true", "true")
        and task.score_as("true", "true", "legacy")
    )
    with pytest.raises(ConfigError, match=r"unknown parser 'legcy': did you mean 'legacy'"):
        task.parse_as("true", "legcy")
