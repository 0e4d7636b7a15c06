"""The generated problems are right and always the same, and are prepared once."""

import hashlib
import itertools
import json
import operator
import os
import re
import subprocess
import sys

import pytest
from support.paths import ROOT

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import generated
from zflora_jax.data.builders.generated import generate
from zflora_jax.data.builders.prepared import Rows, RowsConfig, open_rows, prepared
from zflora_jax.data.tasks import TASKS

SIZES = {"train": 4000, "validation": 400, "test": 400}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.fixture(scope="module", params=["arithmetic", "arithmetic_steps"])
def rows(request):
    return request.param, generate(request.param)


def test_the_rows_are_these(rows):
    name, splits = rows
    digests = {"arithmetic": "b5e1b03a071d7260", "arithmetic_steps": "d9fd3d0328a6c5d3"}
    found = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    assert found[:16] == digests[name], "the rows changed, and with them all results on them"
    code = "import json; from zflora_jax.data.builders.generated import generate;"
    code += f" print(json.dumps(generate({name!r})))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=ROOT,
    )
    assert json.loads(other.stdout) == splits


def test_no_question_occurs_twice(rows, monkeypatch):
    name, splits = rows
    questions = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)
    # Also where the same ones come up: with two names and one thing.
    monkeypatch.setattr(generated, "NAMES", ["Ada", "Ben"])
    monkeypatch.setattr(generated, "THINGS", ["beads"])
    monkeypatch.setattr(generated, "LEVELS", 1)
    some = generate(name, {"train": 800, "test": 200})
    assert len({row["prompt"] for rows in some.values() for row in rows}) == 1000


def test_every_worked_answer_is_right(rows):
    """Every "a op b = c" holds, uses numbers of the question or results before it, and the last
    result is the answer.
    """
    seen, task = set(), TASKS[rows[0]]
    for row in itertools.chain(*rows[1].values()):
        known = [int(n) for n in re.findall(r"\d+", row["prompt"])]
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["target"])
        for a, op, b, c in steps:
            assert int(a) in known and int(b) in known, row
            assert OPERATIONS[op](int(a), int(b)) == int(c) > 0, row
            assert rows[0] == "arithmetic" or 2 <= int(c) <= generated.LARGEST
            known.append(int(c))
            seen.add(op)
        assert row["answer"] == steps[-1][3]
        assert row["target"].endswith(f" The answer is {row['answer']}.")
        wrong = row["target"].replace(f"is {row['answer']}.", "is 9999.")
        assert task.score(task.parse(row["target"]), row["answer"])
        assert not task.score(task.parse(wrong), row["answer"])
    assert seen == set("+-*/")


def test_round_trip_through_array_record_without_tensorflow(tmp_path):
    """In two processes at once: both prepare, both read all rows in order, neither imports
    tensorflow, stdout stays clean.
    """
    code = """
import sys
from functools import partial
from zflora_jax.data.builders.generated import generate
from zflora_jax.data.builders.prepared import open_rows
for split, rows in generate("arithmetic").items():
    source = open_rows("arithmetic", partial(generate, "arithmetic"), split)
    assert [*source] == rows and len(source) == len(rows)
import grain
print("tensorflow" in sys.modules)
"""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    given["env"] = os.environ | {"ZFLORA_CACHE": str(tmp_path / "cache")}
    processes = [subprocess.Popen([sys.executable, "-c", code], **given) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "False\n"
    [config] = (tmp_path / "cache" / "rows").iterdir()
    # No half-written directory is left.
    assert [path.name for path in config.iterdir()] == ["1.0.0"]


def test_a_preparation_that_lost_the_race_reads_what_the_winner_wrote(own_data_cache):
    config = RowsConfig(name="a", read=lambda: {"test": [{"prompt": "1"}, {"prompt": "2"}]})

    def make(**arguments):
        def lose_the_race():
            Rows(config=config, **arguments).download_and_prepare()
            raise FileExistsError("Cannot rename")

        builder = Rows(config=config, **arguments)
        if not builder.is_prepared():
            builder.download_and_prepare = lose_the_race
        return builder

    assert len(prepared(make).as_data_source("test")) == 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot prepare.*file.*ZFLORA_CACHE"):
        open_rows("a", lambda: {"test": [{"prompt": "1"}]}, "test")
