"""Answers: what is read in a text, and which answers are right."""

import re

import pytest

from zflora_jax.data import answers
from zflora_jax.data.answers import BELIEF, values

# Type and answer, and completions that give it; "-": none.
READ = r"""
TRUE_FALSE true; the correct answer is True.; not false, it is true; _true_; 'True'
TRUE_FALSE true; \boxed{\text{True}}; true rather than false
TRUE_FALSE false; That is untrue, so the answer is false
TRUE_FALSE false; Some say true, but the correct answer is false
TRUE_FALSE false; the answer is true. No: the answer is false.; the answer is\n\nfalse, not true
TRUE_FALSE false; **False**; <answer>false</answer> true; isn't true, false; cannot be true: false
TRUE_FALSE -; untrue; It is not true; neither true
ANSWERS answer3; the correct answer is Answer3; the correct answer is Answer 3.
ANSWERS answer4; answer1 is wrong, so the correct answer is answer4
ANSWERS answer2; answer2\n\nanswer1; not answer1 but answer2; <answer>answer2</answer>; _answer 2_
ANSWERS -; the correct answer is answer12; the correct answer is solution1
SOLUTIONS solution2; resolution1 or solution2
ENDINGS ending3; pending1, ending3
OPTIONS option2; OPTION2; not option1, the answer is option2
NUMBER 4; 2 + 2 = 4. The answer is 4.; The answer is 4. There were 10 at first.; The answer is 4/0
NUMBER 4; The answer is 4. Then 4 + 1 = 5.; He has 20 dollars minus 4; Cost minus 4
NUMBER 0.75; The answer is 3/4.
NUMBER 1.5; The answer is 1 1/2 cups
NUMBER -1.5; The answer is -1 1/2
NUMBER 3; It took 5-3; The answer is x = 5 - 2 = 3; The answer is unknown, as 3 is 4.\n6
NUMBER 2; The answer is 5-3=2; The answer is 5 -3 = 2; 1 + 1 = 2, not 3
NUMBER 2; <think>The answer is 5</think>The answer is 2
NUMBER -3; The answer is −3
NUMBER -3.50; The answer is -$3.50
NUMBER 1250.50; The answer is $1,250.50 in 3 days.
NUMBER 1234567; The answer is 1,234,567
NUMBER 50; The answer is 50%.
NUMBER .5; The answer is .5
NUMBER 15; The answer is 49 - 34 = 15 customers.; not 3 but 15; I have 15, not 6.; 5 * 3 = 15
NUMBER 15; The answer is 5 x 3 = 15; Answer = 15, of 7; The answer is 3*$5 = $15.; Answer: 3@5 = 15
NUMBER 15; The answer is 5 · 3 = 15; The answer is 5 apples in 3 bags = 15; Answer: 18 – 3 = 15
NUMBER -7; The answer is 3. No: the answer is -7.\nAsk 9 more.
NUMBER 7; So on 3/4/2020 there were 7
NUMBER 5; The answer is 5 hours (5 * 60 = 300 minutes).
NUMBER 42; The answer is\n42\n\nThere were 10.
NUMBER 8; The answer is 5 apples + 3 apples = 8 apples.
NUMBER -5; The answer is - 5; 5 - 10 = - 5; The answer is x = - 5; It is - 5 degrees
NUMBER 1; The answer is 1–3 apples
NUMBER -0.75; The answer is \frac{-3}{4}.
NUMBER 12; **Answer:** 12\nCheck: 3*5=15
NUMBER 10; The answer is 2 * 5 = 10 = x.
NUMBER 843; _843_; **843**; <answer>843</answer> as 2; ８４３; #### 843; \boxed{843} is 2 less
NUMBER 208; The answer is 208 because 5 - 3 = 2.; The answer is 208, since 5-3=2
NUMBER 208; The answer is 208 with 5 - 3 = 2 left.; The answer is \$208 in 4
NUMBER 0.5; ½; The answer is $\frac{1}{2}$; The answer is 50% = 0.5; #### Step 2\nThe answer is 1/2
NUMBER -; no idea
LETTER B; The answer is B; The answer is b) 5; b.; 'B'; _B_; “B”; (b).; Answer: b; option 'b'
LETTER C; The answer is (c); the answer is 5 km, option c; The answer is option c as D is small
LETTER C; Rationale: (A) is too small and (B) too big, so (C); c); "C"; `C`; not B but C
LETTER C; It is C, not D; **Answer**: C; (Ｃ); neither A nor B, so C
LETTER C; The answer is neither A nor B, it is C.; The answer is not (A) or B, it is C
LETTER D; A man walks 5 miles, so option D; The correct answer is **D) 40**; isn't B. D
LETTER D; D, because A, B and C are wrong; D\n\nA is wrong, not C; D) 5\n\nSo B is 6.
LETTER D; The correct option is D. Option B is 4; D is correct. B is 6; D rather than E; I'd say D
LETTER D; The answer should be (D).; <think>A? B?</think>D
LETTER A; The answer is A; The answer is 23.65, (A).; A; <answer>A</answer>; the answer is: "A"; (a)
LETTER A; $\boxed{\text{(A)}}$; a; Ⓐ; #### A
LETTER -; A man walks 5 miles; The answer is a number; Add them. Carl's Dog Eats; Plan A-1, B-side
LETTER -; Carl's Dog; An apple; 'tis a dog; not B; C_{6}
""".strip().splitlines()


@pytest.mark.parametrize("line", READ)
def test_what_is_read(line):
    first, *texts = line.replace(r"\n", "\n").split("; ")
    name, found = first.split(" ")
    read = getattr(answers, name).parse
    assert {x: read(x) for x in texts} == dict.fromkeys(texts, "" if found == "-" else found)


# In files of mixed answers: the right answer | completions that are right | and wrong ones.
MIXED = r"""
5 | 5.0; 5 apples; The answer is 5!; +5; \frac{10}{2}; $5$; 5 🎉; => 5...; (5) | -5; 52; 5,6; 5@3
-5 | The answer is -5.; −5 | 5; It fell by 5
1,000 | 1000; $1,000 in all; The answer is 1000 km. | 1; 100
0.001 | 1e-3; 1/1000 | 0.003; 1
9007199254740993 | 9007199254740993 | 9007199254740991
5½ | 5.5; 5 1/2; 11/2; 5 and a half; 5\frac12 | 51/2; 5
52 | 52 | 5²
5% | 5%; The answer is 5%, so half.; \boxed{5\%} | 5; 50%; 5 percent
5 km | The answer is 5 km because 2 + 3 = 5.; 5 km\nIt is. | 5; 5 miles; 15 km
5x | 5X | 5; 5y; x; 5x+1; 5x^2
3x+5 | 3x+5; The answer is 3x+5. | 3x-5; 3x; 3
3x + 5 | \boxed{3x+5}; $3x + 5$ | 3x - 5; 2(3x + 5)
3 | 3 km; 3-year; 3(x) = 3; 2*3 | 3a+2b; x+5; 2:4; 33rd
6 | <think>5?</think>6 | <think>It is 6, but wait
C | C; (C) + 1 | C++; C#; The answer is C+.; <think>C?
A | *A*; **A** | A*; A+; A-
6 | x = 6; The answer is 6 | The answer is 7-6.; x > 7
4th | The answer is 4th. | 5th; 4
10:30 | The answer is 10:30. | 10; 10:31; 30
2020-01-05 | 2020-01-05 | 2020; 2020-01-06
3 - 1 | 3 - 1 | 3; 2
Infinity | The answer is infinity. | NaN; inf; 1e999
C++ | The answer is C++.; `C++` | C#; C; C+
x < 3 | $x < 3$; The answer is x < 3. | x > 3; x ≤ 3; 3
f(2,3) | f(2, 3) | f(3, 2); f(2,3)²; 3
$x^2$ | $x^2$; The answer is $x^2$.; x^2; \(x²\); x^{2} | x; $x$
\boxed{4} | \boxed{4}; 4; The answer is \boxed{4}. | 5
100\% | 100\%; 100% | 10\%
m² | m^2 | m2; m³
दिन | The answer is दिन. | दान
😀 | The answer is 😀! | 😢
❤️ | ❤ | ♥
+ | The answer is +. | -
≥ | ≥ | ≤; >
naïve | NAÏVE; naïve | naive
__init__ | `__init__`; The answer is __init__. | init_
New York | new  york.; Ｎew York; The answer is New York, I think | New York City; York; New
Paris | "Paris"; **Paris**; <answer>Paris</answer>; Paris. It is. | Paris, Texas; not Paris
Paris | \boxed{\text{Paris}}; Paris\n\nIt is.; Paris, as it is; <think>Rome?</think>Paris | Rome
yes | Yes.; Yes, the sky is.; The answer is: yes; Yes because | No.; Yesterday; yes men
no | No, it is not. | No idea; Nobody
no answer: 5 | no answer: 5 | 5
42 men women cats dogs birds | 42 men women cats dogs birds | 42; 42 men
D | Because: the answer is (D). | Because: the answer is (B).
False | untrue, the answer is false | The answer is untrue
answer2 | answer 2; the correct answer is answer2 | the correct answer is answer1
solution1 | I have 2 ideas: solution1 | solution2
""".strip().splitlines()
SCORED = """
NUMBER 4 | 4.0009 | 4.0011
NUMBER 0 | 1e-9999999999999999999 | 1e9999999999999999999; nan
NUMBER 1,012 | 1012 | 1
NUMBER 0.3333333333333333 | 0.333333333333 | 0.34
TRUE_FALSE True | true | false
TEXT the end. | The  end. | The end
""".strip().splitlines()


@pytest.mark.parametrize("line", [f"ANY {line}" for line in MIXED] + SCORED)
def test_scores(line):
    name, answer, right, wrong = re.fullmatch(r"(\w+) (.*) \| (.*) \| (.*)", line).groups()
    score = getattr(answers, name).score
    texts = dict.fromkeys(right.split("; "), True) | dict.fromkeys(["", *wrong.split("; ")], False)
    assert {x: score(x.replace(r"\n", "\n"), answer) for x in texts} == texts


def test_values_and_belief_states():
    found = values("1/2 of 3 1/4, 6 / 2, 1,000.5, $.50, 10%, solution1, v2, 4th, 3,4 and 7/8/9")
    assert found == ["0.5", "3.25", "6", "2", "1000.5", ".50", "10", "4", "3", "4", "7", "8", "9"]
    for text, found in (
        ("price range: very cheap; area: East", "area: east; price range: very cheap"),
        ("area: east; area:  east ; request: phone.\nUser: x", "area: east; request: phone"),
        ("None.", "none"),
        ("I do not know", ""),
    ):
        assert BELIEF.parse(text) == found
    # The joint goal, without requests.
    east = "area: east; request: phone"
    assert all(BELIEF.score(x, east) for x in ("area: east", "area: east; request: food"))
    assert BELIEF.score("none", "request: phone") and not BELIEF.score("", "none")
    assert not BELIEF.score("area: east", "area: east; food: thai")
