"""Rows that belong together, such as the turns of a dialogue: intervals draw them whole."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.runs import EVAL, TASK_DATA

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.data.tasks import load_examples
from zflora_jax.evaluation.statistics import (
    UNITS,
    as_dicts,
    group_scores,
    rows_kept,
    scores_of,
)
from zflora_jax.evaluation.suite import evaluate_tasks
from zflora_jax.evaluation.units import by_unit, shared_units


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 3))
def test_sums_of_units_are_those_of_their_rows(units, seeds):
    scores = np.random.default_rng(0).normal(size=(seeds, len(units)))
    column = by_unit(scores, units)
    if len(set(units)) == 1:  # drawn one by one
        units = list(range(len(units)))
    names = sorted(set(units))
    assert list(column.rows) == [units.count(name) for name in names]
    expected = [scores[:, np.equal(units, name)].sum(axis=1) for name in names]
    np.testing.assert_allclose(column.sums, np.stack(expected, axis=1))


def test_units_are_numbered_where_rows_share_them():
    assert shared_units(["a", "b", "a", "", "b", ""]) == [0, 1, 0, 2, 1, 3]
    assert [shared_units(names) for names in ([], ["a"], ["", ""], ["a", "b"])] == [None] * 4


def test_units_are_drawn_whole():
    """One unit does not show how units differ, so its rows are drawn one by one; rows written
    several times in a unit say no more than once; a long unit counts by its rows.
    """
    records = [{"correct": right} for right in (True, True, True, False, False)]
    one = [row | {"unit": 7} for row in records]
    assert scores_of(one) == scores_of(records)
    assert group_scores([one, one]) == group_scores([records, records])
    some = [{"correct": bool(right)} for right in np.random.default_rng(0).random(40) < 0.7]
    many = [row | {"unit": i} for i, row in enumerate(some) for _ in range(5)]
    once, copied = (as_dicts(scores_of(found))["accuracy"] for found in (some, many))
    assert copied == pytest.approx(once)
    for right in (True, False):  # ten rows of two dialogues say as much as two rows
        rows = [{"correct": right, "unit": unit} for unit in (0, 1) for _ in range(5)]
        of_two = as_dicts(scores_of([{"correct": right}] * 2))["accuracy"]
        assert as_dicts(scores_of(rows))["accuracy"] == pytest.approx(of_two)
    long = [{"correct": True, "unit": 0}] * 9 + [{"correct": False, "unit": 1}]
    assert scores_of(long)["accuracy"].mean == 0.9


def test_units_of_other_rows_are_refused():
    with pytest.raises(ConfigError, match="one number for each row: got 2 numbers for 3 rows"):
        by_unit(np.zeros((2, 3)), [0, 1])


def test_rows_of_one_s_own_that_begin_alike_share_a_unit(tmp_path):
    def talk(*said):
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return {"messages": turns}

    talks = [talk("Hi.", "Yes?"), talk("Hi.", "Yes?", "Bye.", "Bye."), talk("Hello.", "Yes?")]
    asked = [{"instruction": text, "output": "4"} for text in ("2 + 2?", "2 + 2?", "1 + 3?")]
    for rows in (talks, asked):
        (tmp_path / "train.json").write_text(json.dumps(rows))
        data = dataclasses.replace(TASK_DATA, data_dir=str(tmp_path / "train.json"))
        examples = load_examples("rows", "train", data)
        found = sorted(example.unit for example in examples)
        assert len(found) == 3 and len(set(found)) == 2 and all(found)


def test_dialogues_are_units_from_their_file_to_the_summary(model, tmp_path):
    """WOZ: the turns of a dialogue share a unit in records, and those of clean rows are kept."""

    def turn(said):
        return {"system_transcript": "", "transcript": said, "belief_state": []}

    def write(split, dialogues):
        rows = [
            {"dialogue_idx": i, "dialogue": [turn(said) for said in of]}
            for i, of in enumerate(dialogues)
        ]
        (tmp_path / "woz").mkdir(exist_ok=True)
        (tmp_path / "woz" / f"woz_{split}_en.json").write_text(json.dumps(rows))

    write("train", [["Hi."], ["Hello."]])
    write("test", [["Hi.", "East."], ["A cheap place?", "West.", "Bye."], ["Chinese?"]])
    data = dataclasses.replace(TASK_DATA, task="woz", data_dir=str(tmp_path))
    run = RunConfig(model="tiny", data=data, eval=dataclasses.replace(EVAL, loss=False))
    given_rows = {"trained_on": [TrainedOn(data)], "console": False}
    summary = evaluate_tasks(run, model, ["woz"], tmp_path / "out", "tiny", **given_rows)
    lines = (tmp_path / "out" / "woz-test-tiny.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["unit"] for row in rows] == [0, 0, 1, 1, 1, 2]
    assert [row["contaminated"] for row in rows] == [True] + [False] * 5
    (kept,) = summary["tasks"]
    assert kept[UNITS]["accuracy"] == kept[UNITS]["rougeL"] == "0 1 1 1 2"
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert "those of one dialogue are drawn together" in page
    assert UNITS not in rows_kept([{"correct": True, "prompt": "", "input": "", "answer": ""}])
