"""Contamination: what counts as the same question, and the overlaps of the real files."""

import functools

import pytest
from support.runs import real_data

from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import SPLITS, Example, load_examples
from zflora_jax.evaluation.contamination import contaminated, normalise, questions


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("  There are 7 crayons ,\n in_the  DRAWER . ", "there are 7 crayons in_the drawer", True),
        ("Été: 1,000.5!", "e\u0301té 1,000.5", True),
        ("1 + 1 ?", "1+1", True),
        ("दान क्या है?", "दिन क्या है?", False),  # vowel signs
        ("กิน", "กัน", False),
        ("\u05d1\u05b7", "\u05d1\u05b4", False),
        ("😀", "😢", False),
        ("7 - 3", "7 + 3", False),
        ("x ≥ 3", "x ≤ 3", False),
        ("1.5", "1 5", False),
        ("???", "!", False),
    ],
)
def test_what_is_the_same_question(a, b, same):
    assert (normalise(a) == normalise(b)) is same and normalise(a)
    turns = [
        [{"role": "user", "content": x}, {"role": "assistant", "content": "y"}] for x in (a, b)
    ]
    chats = [Example("", "y", turns=tuple(talk)) for talk in turns]
    assert contaminated(chats[:1], questions(chats[1:])) == [same]


def test_a_question_is_its_prompt_and_input():
    train = [Example("What is 1 + 1 ?", "2", "2"), Example("Sum.", "3", "3", input="1, 2")]
    asked = [
        Example("what is 1+1?", "x", "4"),
        Example("Sum. 1 2", "3", "3"),
    ]  # whatever the answer
    asked += [Example(x, "2", "2") for x in ("What is 1 + 2?", "Sum.")]
    asked += [Example("Sum.", "4", "4", input="1, 3")]
    assert contaminated(asked, questions(train)) == [True, True, False, False, False]


@pytest.fixture(scope="module")
def rows():
    root = str(real_data())

    @functools.cache
    def read(task, *splits):
        return [
            example
            for split in splits
            for example in load_examples(task, split, DataConfig(data_dir=root))
        ]

    return read


@pytest.mark.soak
def test_overlaps_of_the_real_files_on_normalised_text(rows):
    """The numbers known of these files; in cloze form many more questions than with options."""
    train = rows("math_data", *SPLITS)
    # Rows held out whose question stands in train, written otherwise.
    assert len(train) == 3260 - 12
    asked = questions(train)
    known = {"addsub": 330, "multiarith": 491, "singleeq": 425}
    known |= {"svamp": 800, "gsm8k": 1055, "aqua": 203}
    marks = {task: contaminated(rows(task, "test"), asked) for task in known}
    assert {task: sum(of) for task, of in marks.items()} == known
    assert list(map(len, marks.values())) == [395, 600, 508, 1000, 1319, 254]
    assert not any(contaminated(rows("gsm8k", "train", "validation"), asked))
    tasks, known = ("arc_easy", "arc_challenge", "openbookqa"), {"": [1, 0, 0]}
    known |= {"_cloze": [3, 4, 21]}
    for form, counts in known.items():
        seen = questions(row for task in tasks for row in rows(task + form, "train"))
        marks = [contaminated(rows(task + form, "test")[:500], seen) for task in tasks]
        assert [sum(of) for of in marks] == counts
