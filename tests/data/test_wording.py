"""The wording of prompts and answers gives the rows that LLM-Adapters published, byte for byte."""

import re

import pytest
from support.runs import real_data

from zflora_jax.data.builders import wording
from zflora_jax.data.builders.formats import (
    read_rows,
)

PATTERNS = {
    "boolq": r"Please answer .*?, question: (.*)\?\n\nAnswer format: true/false",
    "piqa": r"Please choose .*?: (.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\nAnswer format: .*",
    "social_i_qa": (
        r"Please choose .*?: (.*)\n\nAnswer1: (.*) Answer2: (.*) Answer3: (.*)\n\nAnswer format: .*"
    ),
    "hellaswag": (
        r"Please choose .*?: (.*?): (.*)\n\nEnding1: (.*) Ending2: (.*) Ending3: (.*) Ending4:"
        r" (.*)\n\nAnswer format: .*"
    ),
    "winogrande": r"Please choose .*?: (.*)\n\nOption1: (.*) Option2: (.*) Answer format: .*",
    "ARC-Easy": (
        r"Please choose .*?: (.*)\n\nAnswer1: (.*) Answer2: (.*) Answer3: (.*?)(?: Answer4:"
        r" (.*?))?(?: Answer5: (.*?))?\n\nAnswer format: .*"
    ),
}
PATTERNS |= {"ARC-Challenge": PATTERNS["ARC-Easy"], "openbookqa": PATTERNS["ARC-Easy"]}
WORDINGS = {"piqa": wording.piqa, "winogrande": wording.winogrande}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_wording_gives_llm_adapters_rows_byte_for_byte(name):
    """Every test row taken apart and put together again."""
    for row in read_rows(real_data(f"llm_adapters/dataset/{name}/test.json")):
        parts = [
            part
            for part in re.fullmatch(PATTERNS[name], row["instruction"], re.DOTALL).groups()
            if part is not None
        ]
        if name == "boolq":
            made = wording.boolq(parts[0], row["answer"] == "true")
        elif name == "hellaswag":
            made = wording.hellaswag(parts[0], parts[1], parts[2:], int(row["answer"][-1]) - 1)
        else:
            made = WORDINGS.get(name, wording.answer_choice)(
                parts[0], parts[1:], int(row["answer"][-1]) - 1
            )
        assert made == row
