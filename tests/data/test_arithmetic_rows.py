"""The generated arithmetic rows are right and always the same, and are prepared once."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from support.paths import ROOT

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import open_prepared
from zflora_jax.data.builders.arithmetic import TEMPLATES, Arithmetic, generate


@pytest.fixture(scope="module")
def generated():
    return generate()


def test_the_generated_rows_are_these(generated):
    digest = hashlib.sha256(json.dumps(generated).encode()).hexdigest()
    assert digest.startswith("24d46120650970c5"), (
        "The generated rows changed. If you meant it, raise Arithmetic.VERSION (prepared data is"
        " kept by version) and update this digest."
    )


def test_splits_are_disjoint_and_without_duplicates(generated):
    assert {split: len(rows) for split, rows in generated.items()} == {
        "train": 4000,
        "validation": 400,
        "test": 400,
    }
    questions = [row["question"] for rows in generated.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_every_split_holds_every_template_evenly(generated):
    assert len(TEMPLATES) >= 12
    assert len({t.question for t in TEMPLATES}) == len(TEMPLATES)
    for rows in generated.values():
        for i, row in enumerate(rows):
            form = re.escape(TEMPLATES[i % len(TEMPLATES)].question)
            assert re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", form), row["question"]), row


def test_every_worked_answer_is_right(generated):
    """Every "a op b = c" of a rationale holds, uses numbers of the question or results before it,
    and the last result is the answer.
    """
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    seen = set()
    for row in itertools.chain(*generated.values()):
        known = [int(n) for n in re.findall(r"\d+", row["question"])]
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["rationale"])
        assert steps
        for a, op, b, c in steps:
            assert int(a) in known and int(b) in known, row
            assert operations[op](int(a), int(b)) == int(c) > 0, row
            known.append(int(c))
            seen.add(op)
        assert row["answer"] == steps[-1][3]
        assert row["rationale"].endswith(f"The answer is {row['answer']}.")
    assert seen == set("+-*/")


def test_generation_is_the_same_in_another_process(generated):
    code = (
        "import json; from zflora_jax.data.builders.arithmetic import generate;"
        " print(json.dumps(generate()))"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        cwd=ROOT,
    )
    assert json.loads(out.stdout) == generated


def test_round_trip_through_array_record_without_tensorflow(generated, tmp_path):
    """In two processes at once: both prepare, both read all rows in order, neither imports
    tensorflow, stdout stays clean.
    """
    code = """
import sys
from zflora_jax.data.builders import open_prepared
from zflora_jax.data.builders.arithmetic import Arithmetic, generate
for split, rows in generate().items():
    source = open_prepared(Arithmetic, split, sys.argv[1])
    assert len(source) == len(rows)
    assert [{k: v.decode() for k, v in source[i].items()} for i in range(len(rows))] == rows
import grain
print("tensorflow" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    root = ROOT
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
        )
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "False\n"
    # No half-written directory is left.
    assert [path.name for path in (tmp_path / "cache" / "arithmetic").iterdir()] == ["1.0.0"]


def test_a_preparation_that_lost_the_race_reads_what_the_winner_wrote(tmp_path):
    def make(**arguments):
        def lose_the_race():
            Arithmetic(**arguments).download_and_prepare()
            raise FileExistsError("Cannot rename")

        builder = Arithmetic(**arguments)
        if not builder.is_prepared():
            builder.download_and_prepare = lose_the_race
        return builder

    assert len(open_prepared(make, "test", tmp_path)) == 400


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot prepare.*file.*ZFLORA_CACHE"):
        open_prepared(Arithmetic, "test", tmp_path / "file")
