"""Contamination: what counts as the same question, and the overlaps of the real files."""

import functools

import pytest
from support.runs import real_data

from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import SPLITS, Example, load_examples
from zflora_jax.evaluation.contamination import contaminated, normalise, questions


def test_normalise():
    assert (
        normalise("  There are 7 crayons ,\n in_the  DRAWER . ")
        == "there are 7 crayons in the drawer"
    )
    assert normalise("Été: 1,000.5!") == "été 1 000 5"
    assert normalise("...") == ""


def test_a_question_is_its_prompt_and_input():
    train = [Example("What is 1 + 1 ?", "2", "2"), Example("Sum.", "3", "3", input="1, 2")]
    asked = [
        Example("what is 1+1?", "x", "4"),  # whatever the answer
        Example("What is 1 + 2?", "2", "2"),
        Example("Sum. 1 2", "3", "3"),
        Example("Sum.", "3", "3"),
        Example("Sum.", "4", "4", input="1, 3"),
    ]
    assert contaminated(asked, questions(train)) == [True, False, True, False, False]
    assert (
        contaminated([], questions(train)) == []
        and contaminated(asked, questions([])) == [False] * 5
    )


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


def test_overlaps_of_the_real_files_on_normalised_text(rows):
    """Counted on lower-cased text with every run of other characters than letters and digits as one
    space: the numbers known of these files.
    """
    train = rows("math_data", *SPLITS)
    # Rows held out whose question stands in train, written otherwise.
    assert len(train) == 3260 - 12
    asked = questions(train)
    known = {
        "addsub": (330, 395),
        "multiarith": (491, 600),
        "singleeq": (425, 508),
        "svamp": (800, 1000),
        "gsm8k": (1055, 1319),
        "aqua": (203, 254),
    }
    for task, (found, size) in known.items():
        marks = contaminated(rows(task, "test"), asked)
        assert (sum(marks), len(marks)) == (found, size), task
    assert not any(contaminated(rows("gsm8k", "train", "validation"), asked))

    mawps = questions(rows("mawps", "train", "validation"))
    assert {
        task: sum(contaminated(rows(task, "test"), mawps))
        for task in ("addsub", "multiarith", "singleeq")
    } == {
        "addsub": 327,
        "multiarith": 452,
        "singleeq": 416,
    }


def test_pairs_that_are_clean_or_nearly(rows):
    asked = questions(rows("gsm8k", "train", "validation"))
    for task in ("addsub", "multiarith", "singleeq", "svamp", "aqua"):
        assert not any(contaminated(rows(task, "test"), asked)), task
    own = {
        task: sum(contaminated(rows(task, "test"), questions(rows(task, "train", "validation"))))
        for task in ("arc_easy", "arc_challenge", "boolq", "openbookqa")
    }
    # As published: three questions occur in train and in test.
    assert own == {
        "arc_easy": 2,
        "arc_challenge": 0,
        "boolq": 1,
        "openbookqa": 0,
    }
