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
    assert contaminated(asked, questions([])) == [False] * 5


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
    known = {"addsub": 330, "multiarith": 491, "singleeq": 425}
    known |= {"svamp": 800, "gsm8k": 1055, "aqua": 203}
    marks = {task: contaminated(rows(task, "test"), asked) for task in known}
    assert {task: sum(of) for task, of in marks.items()} == known
    assert list(map(len, marks.values())) == [395, 600, 508, 1000, 1319, 254]
    assert not any(contaminated(rows("gsm8k", "train", "validation"), asked))
