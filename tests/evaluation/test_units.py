"""Rows that belong together, such as the turns of a dialogue: intervals draw them whole."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.runs import EVAL, TASK_DATA

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.data.tasks import load_examples
from zflora_jax.evaluation.paired import paired_difference
from zflora_jax.evaluation.statistics import (
    DIGEST,
    ROWS,
    UNITS,
    as_dicts,
    group_scores,
    rows_kept,
    scores_of,
)
from zflora_jax.evaluation.suite import evaluate_tasks, kept_scores
from zflora_jax.evaluation.units import by_unit, shared_units
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.differences import compare_runs

DIALOGUES, TURNS = 40, 5
ROW_UNITS = np.repeat(np.arange(DIALOGUES), TURNS)


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


def test_one_unit_is_no_certainty():
    """Its rows are drawn one by one: it does not show how units differ."""
    records = [{"correct": right} for right in (True, True, True, False, False)]
    one, alone = ([row | of for row in records] for of in ({"unit": 7}, {}))
    assert scores_of(one) == scores_of(alone)
    assert group_scores([one, one]) == group_scores([alone, alone])
    gap = np.array([[1.0, 1.0, 1.0, 0.0, 0.0]])
    found = [paired_difference([gap], [gap * 0], units=[units]) for units in ([7] * 5, None)]
    assert found[0] == found[1]


def test_rows_written_several_times_say_no_more_than_once():
    """In a unit of equal rows, whatever their order; and a unit of one row is the row."""
    rng = np.random.default_rng(0)
    method, reference = (rng.random((3, DIALOGUES)) < share for share in (0.7, 0.4))
    once = paired_difference([method], [reference])
    order = rng.permutation(DIALOGUES * TURNS)
    copies = [np.repeat(scores, TURNS, axis=1)[:, order] for scores in (method, reference)]
    drawn = [
        paired_difference([copies[0]], [copies[1]], units=[ROW_UNITS[order]]),
        paired_difference([method], [reference], units=[range(DIALOGUES)]),
        paired_difference([method], [reference], units=[None]),
    ]
    for found in drawn:
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(once))
    of_one = [
        paired_difference([copies[0][:1]], [copies[1][:1]], units=[units])
        for units in (None, ROW_UNITS[order])
    ]
    assert of_one[0].high - of_one[0].low < 0.6 * (of_one[1].high - of_one[1].low)

    records = [{"correct": bool(right)} for right in method[0]]
    many = [record | {"unit": i} for i, record in enumerate(records) for _ in range(TURNS)]
    scores = [as_dicts(scores_of(found))["accuracy"] for found in (records, many)]
    assert scores[0] == pytest.approx(scores[1])
    for right in (True, False):  # ten rows of two dialogues say as much as two rows
        rows = [{"correct": right, "unit": unit} for unit in (0, 1) for _ in range(5)]
        of_two = as_dicts(scores_of([{"correct": right}] * 2))["accuracy"]
        assert as_dicts(scores_of(rows))["accuracy"] == pytest.approx(of_two)


def test_few_dialogues_are_not_certainty():
    """The rule of three and the sign test count dialogues, and not their turns."""
    won, units = np.full((3, 4), 100.0), np.repeat(np.arange(4), TURNS)
    once = paired_difference([won], [won * 0], best=100.0)
    turns = np.repeat(won, TURNS, axis=1)
    assert paired_difference([turns], [turns * 0], best=100.0, units=[units]) == once
    assert once.p == 1 / 8 and once.low == 100 - 200 * 3 / 4


def test_units_count_by_their_rows():
    """A long dialogue counts as much as its turns."""
    records = [{"correct": True, "unit": 0}] * 9 + [{"correct": False, "unit": 1}]
    assert scores_of(records)["accuracy"].mean == 0.9
    gap = np.array([[1.0] * 9 + [0.0]])
    assert paired_difference([gap], [np.zeros_like(gap)], units=[[0] * 9 + [1]]).mean == 0.9


@pytest.mark.parametrize("lengths", [(5, 5), (1, 9)])
@pytest.mark.parametrize(("seeds", "of_seeds"), [(1, 0.0), (3, 0.0), (3, 0.05)])
def test_intervals_of_units_cover_a_true_difference(seeds, of_seeds, lengths):
    """300 draws of dialogues, of equal or unequal lengths, whose turns go the same way, each run
    going its own: intervals that draw dialogues hold the truth, those that draw turns too seldom.
    """
    rng, held = np.random.default_rng(1), np.zeros(2)
    turns = rng.integers(lengths[0], lengths[1] + 1, DIALOGUES)
    units = np.repeat(np.arange(DIALOGUES), turns)
    for _ in range(300):
        of_dialogue = rng.normal(0, 0.3, (1, DIALOGUES)) + rng.normal(0, 0.2, (seeds, DIALOGUES))
        gap = of_dialogue[:, units] + rng.normal(0, 0.2, (seeds, len(units)))
        gap += rng.normal(0, of_seeds, (seeds, 1))
        for i, given_units in enumerate((units, None)):
            found = paired_difference([gap], [gap * 0], resamples=1000, units=[given_units])
            held[i] += (found.low <= 0 <= found.high) / 300
    assert abs(held[0] - 0.95) < 3 * (0.95 * 0.05 / 300) ** 0.5
    assert held[1] < (0.7 if seeds == 1 else 0.93)


def test_units_of_other_rows_are_refused():
    gap = np.zeros((2, 3))
    with pytest.raises(ConfigError, match="one number for each row: got 2 numbers for 3 rows"):
        paired_difference([gap], [gap], units=[[0, 1]])
    with pytest.raises(ConfigError, match="got units of 2 tasks, and 1 tasks"):
        paired_difference([gap], [gap], units=[[0, 1, 2], None])


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


def test_dialogues_are_drawn_whole_from_their_file_to_the_differences(model, tmp_path):
    """WOZ: the turns of a dialogue share a unit in records, those of clean rows are kept, and a
    comparison finds them in whichever record has them.
    """

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
    assert kept_scores(summary)["woz"][UNITS] == kept[UNITS]  # as a sweep's record has them

    plan = Comparison(
        "units",
        run,
        {label: AdapterConfig(label) for label in ("lora", "ffa")},
        (1e-3,),
        (0,),
        tasks=("woz",),
        scoring=EVAL,
        reference="lora",
        contrasts=(("ffa", "lora"),),
    )
    told = " ".join(str(row // 3) for row in range(24))
    runs = {
        label: [{"seed": 0, "scores": {"woz": {ROWS: {"accuracy": text}}}}]
        for label, text in (("lora", "1" * 24), ("ffa", "111000" * 4))
    }
    base = {"woz": {ROWS: {"accuracy": "0" * 24}}}
    alone, whole = (
        compare_runs(plan, runs, {"woz": base["woz"] | units}, "accuracy")
        for units in ({}, {UNITS: {"accuracy": told}})
    )
    gaps = [found.to_reference["ffa"]["woz"] for found in (alone, whole)]
    assert gaps[0].mean == gaps[1].mean == -50 and gaps[1].p > 2 * gaps[0].p
    assert whole.contrasts["ffa - lora"]["woz"] == gaps[1]
    assert UNITS not in rows_kept([{"correct": True, "prompt": "", "input": "", "answer": ""}])
    other = {"lora": runs["lora"], "ffa": [{"seed": 1, "scores": {"woz": {ROWS: {}, DIGEST: "a"}}}]}
    told = {UNITS: {"accuracy": told}, DIGEST: "b"}
    with pytest.raises(ConfigError, match="records of woz are of different rows"):
        compare_runs(plan, other, {"woz": base["woz"] | told}, "accuracy")
