"""Answers: what is read in a text, and which answers are right."""

import pytest

from zflora_jax.data.answers import (
    ANSWERS,
    ANY,
    BELIEF,
    ENDINGS,
    LETTER,
    NUMBER,
    OPTIONS,
    SOLUTIONS,
    TEXT,
    TRUE_FALSE,
    belief_state,
    values,
)

# Completions, and the answer that is read of each.
TABLE = {
    TRUE_FALSE: {
        "the correct answer is True.": "true",
        "That is untrue, so the answer is false": "false",
        "untrue": "",
        "Some say true, but the correct answer is false": "false",
        "the answer is true. No: the answer is false.": "false",
        "the answer is\n\nfalse, not true": "false",
        "": "",
    },
    ANSWERS: {
        "the correct answer is Answer3": "answer3",
        "the correct answer is Answer 3.": "answer3",
        "answer1 is wrong, so the correct answer is answer4": "answer4",
        "the correct answer is answer12": "",
        "the correct answer is solution1": "",
        "answer2\n\nanswer1": "answer2",
    },
    SOLUTIONS: {"resolution1 or solution2": "solution2"},
    ENDINGS: {"pending1, ending3": "ending3"},
    OPTIONS: {"OPTION2": "option2", "not option1; the answer is option2": "option2"},
    NUMBER: {
        "2 + 2 = 4. The answer is 4.": "4",
        "The answer is 4. There were 10 at first.": "4",
        "The answer is 3/4.": "0.75",
        "The answer is 1 1/2 cups": "1.5",
        "The answer is -1 1/2": "-1.5",
        "It took 5-3": "3",
        "The answer is 5-3=2": "2",
        "The answer is −3": "-3",
        "The answer is -$3.50": "-3.50",
        "The answer is $1,250.50 in 3 days.": "1250.50",
        "The answer is 1,234,567": "1234567",
        "The answer is 50%.": "50",
        "The answer is .5": ".5",
        "The answer is 49 - 34 = 15 customers.": "15",
        "The answer is 3. No: the answer is -7.\nAsk 9 more.": "-7",
        "So on 3/4/2020 there were 7": "7",
        "The answer is 4/0": "4",
        "The answer is 4. Then 4 + 1 = 5.": "4",
        "The answer is 5 hours (5 * 60 = 300 minutes).": "5",
        "The answer is\n42\n\nThere were 10.": "42",
        "The answer is 5 apples + 3 apples = 8 apples.": "8",
        "The answer is - 5": "-5",
        "The answer is 1–3 apples": "1",
        "The answer is x = 5 - 2 = 3": "3",
        "The answer is \\frac{-3}{4}.": "-0.75",
        "**Answer:** 12\nCheck: 3*5=15": "12",
        "The answer is 2 * 5 = 10 = x.": "10",
        "The answer is 1.5e3": "1.5e3",
        "no idea": "",
        "The answer is unknown, as 3 is 4.\n6": "3",
    },
    LETTER: {
        "The answer is B": "B",
        "The answer is (c)": "C",
        "The answer is b) 5": "B",
        "the answer is 5 km, option c": "C",
        "A man walks 5 miles, so option D": "D",
        "A man walks 5 miles": "",
        "The answer is A": "A",
        "The answer is 23.65, (A).": "A",
        "The answer is a number": "",
        "Add them. Carl's Dog Eats": "",
        "Rationale: (A) is too small and (B) too big, so (C)": "C",
        "The correct answer is **D) 40**": "D",
        "Plan A-1, B-side": "",
    },
    BELIEF: {
        "price range: cheap; area: East": "area: east; price range: cheap",
        "area: east; area:  east ; request: phone.\nUser: thanks": "area: east; request: phone",
        "None.": "none",
        "I do not know": "",
    },
    TEXT: {" A summary. ": "A summary."},
}
CASES = [(answers, *case) for answers, cases in TABLE.items() for case in cases.items()]


@pytest.mark.parametrize(("answers", "text", "found"), CASES, ids=[c[1][:30] for c in CASES])
def test_what_is_read(answers, text, found):
    assert answers.parse(text) == found


@pytest.mark.parametrize(
    ("answers", "prediction", "answer", "right"),
    [
        (NUMBER, "4.0009", "4", True),
        (NUMBER, "4.0011", "4", False),
        (NUMBER, "1012", "1,012", True),
        (NUMBER, "", "4", False),
        (NUMBER, "0.333333333333", "0.3333333333333333", True),
        (TRUE_FALSE, "true", "True", True),
        (TRUE_FALSE, "", "true", False),
        (LETTER, "", "B", False),
        (BELIEF, "area: east", "area: east; food: thai", False),
        (BELIEF, "area: east", "area: east; request: phone", True),  # the joint goal
        (BELIEF, "area: east; request: food", "area: east; request: phone", True),
        (BELIEF, "none", "request: phone", True),
        (BELIEF, "", "none", False),
        (TEXT, "The  end.", "the end.", True),
        (TEXT, "The end", "the end.", False),
        # In mixed files the right answer says which type it is.
        (ANY, "The answer is 4. Of 10.", "4.0", True),
        (ANY, "The answer is 36 dollars in 3 days", "36", True),
        (ANY, "The answer is 36 dollars in 3 days", "3", False),
        (ANY, "", "4", False),
        (ANY, "Because: the answer is (D).", "D", True),
        (ANY, "Because: the answer is (D).", "B", False),
        (ANY, "untrue, the answer is false", "false", True),
        (ANY, "The answer is untrue", "true", False),
        (ANY, "the correct answer is answer2", "answer1", False),
        (ANY, "answer 2", "answer2", True),
        (ANY, "I have 2 ideas: solution1", "solution1", True),
        (ANY, "New York", "new york", True),
        (ANY, "The answer is New York, I think", "new york", True),
        (ANY, "The answer is", "the answer", True),
    ],
)
def test_scores(answers, prediction, answer, right):
    assert answers.score(prediction, answer) is right


def test_values_and_belief_states():
    found = values("1/2 of 3 1/4, 6 / 2, 1,000.5, $.50, 10%, solution1, v2, 4th, 3,4 and 7/8/9")
    assert found == ["0.5", "3.25", "6", "2", "1000.5", ".50", "10", "4", "3", "4", "7", "8", "9"]
    state = "food: north american; price range: dontcare; request: address"
    assert belief_state(state) == state == belief_state(belief_state(state))
