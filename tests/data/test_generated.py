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

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.fixture(scope="module", params=["arithmetic", "arithmetic_steps"])
def rows(request):
    return request.param, generate(request.param)


def test_the_rows_are_these(rows):
    """Whatever PYTHONHASHSEED is, which is another in each test run."""
    name, splits = rows
    digests = {"arithmetic": "b5e1b03a071d7260", "arithmetic_steps": "d9fd3d0328a6c5d3"}
    found = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    assert found[:16] == digests[name], "the rows changed, and with them all results on them"
    questions = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


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
        assert task.answers.score(task.answers.parse(row["target"]), row["answer"])
        assert not task.answers.score(task.answers.parse(wrong), row["answer"])
    assert seen == set("+-*/")


@pytest.mark.soak  # a process of its own
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
    assert [*open_rows("arithmetic", partial(generate, "arithmetic"), split)] == rows
import grain
print("tensorflow" in sys.modules)
"""
    env = os.environ | {"ZFLORA_CACHE": str(tmp_path / "cache")}
    given = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": env}
    processes = [subprocess.Popen([sys.executable, "-c", code], **given) for _ in range(2)]
    assert [x.communicate(timeout=120)[0] for x in processes] == ["False\n"] * 2
    [config] = (tmp_path / "cache" / "rows").iterdir()
    assert [path.name for path in config.iterdir()] == ["1.0.0"]  # and nothing half-written


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
