"""Scores of records, of tasks and of groups of tasks, with their intervals, units and pages."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.runs import EVAL, TASK_DATA, choice
from support.tasks import write_questions

from zflora_jax import ConfigError, RunConfig, TrainedOn, evaluate, evaluate_tasks
from zflora_jax.data.tasks import load_examples
from zflora_jax.evaluation import records as records_module, scores as scoring, task as task_module
from zflora_jax.evaluation.scores import as_dicts, group_scores, scores_of


def run_of(data, **changes):
    return RunConfig(model="tiny", data=data, eval=dataclasses.replace(EVAL, **changes))


@pytest.fixture
def two_tasks(arc, tmp_path):
    """arc_easy and arc_challenge, of 12 and 5 rows."""
    (tmp_path / "ARC-Challenge").mkdir()
    (tmp_path / "ARC-Challenge" / "test.json").write_text(json.dumps([choice(i) for i in range(5)]))
    return ["arc_easy", "arc_challenge"]


def score(run, model, tasks, out, **more):
    return evaluate_tasks(run, model, iter(tasks), out, "tiny", console=False, **more)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- intervals ------------------------------------------------------------------------------------


def test_scores_have_bootstrap_intervals():
    draw = np.random.default_rng(0)
    records = [
        {"correct": bool(x), "rouge1": float(y)}
        for x, y in zip(draw.random(400) < 0.3, draw.random(400), strict=True)
    ]
    scores = scores_of(records)
    assert scores.keys() == {"accuracy", "rouge1"} and scores == scores_of(records)
    for name, key in (("accuracy", "correct"), ("rouge1", "rouge1")):
        values = np.asarray([r[key] for r in records], float)
        error = 1.96 * values.std() / np.sqrt(400)
        assert scores[name].mean == pytest.approx(values.mean())
        assert scores[name].low == pytest.approx(values.mean() - error, abs=0.006)
        assert scores[name].high == pytest.approx(values.mean() + error, abs=0.006)
    assert scores_of([]) == {}


def test_all_right_or_all_wrong_is_not_certainty():
    wrong, right = scores_of([{"correct": False}] * 100), scores_of([{"correct": True}] * 3)
    assert str(wrong["accuracy"]) == "0.000 [0.000, 0.037]"
    assert str(right["accuracy"]) == "1.000 [0.438, 1.000]"
    # A task of few rows that agree, beside one of many: its own rows are what little is known of.
    few, many = [{"correct": True}] * 4, [{"correct": i % 2 == 0} for i in range(100)]
    mixed = group_scores([few, many])["accuracy"]
    assert 0.45 < mixed.low < 0.52 and mixed.high == pytest.approx(0.80, abs=0.01)
    opposite = group_scores([few, [{"correct": False}] * 4])["accuracy"]
    assert (opposite.low, opposite.high) == pytest.approx((0.239, 0.761), abs=0.03)
    six = group_scores([[{"correct": True}]] * 6)["accuracy"]
    assert six.low < 0.7 and six.high == 1.0


def test_a_group_s_mean_counts_tasks_alike_and_only_scores_all_have():
    tables = [
        [{"correct": True, "correct_sum": False}] * 10,
        [{"correct": i < 50} for i in range(100)],
    ]
    scores = group_scores(tables)
    assert scores.keys() == {"accuracy"} and scores["accuracy"].mean == pytest.approx(0.75)
    # Ten right rows leave the truth of their task open down to 0.71.
    assert 0.57 < scores["accuracy"].low < 0.62 and 0.78 < scores["accuracy"].high < 0.81
    assert group_scores([]) == {}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_sums_of_units_are_those_of_their_rows(units):
    scores = np.random.default_rng(0).normal(size=len(units))
    sums, rows = scoring.by_unit(scores, units)
    if len(set(units)) == 1:  # drawn one by one
        units = list(range(len(units)))
    names = sorted(set(units))
    assert list(rows) == [units.count(name) for name in names]
    np.testing.assert_allclose(sums, [scores[np.equal(units, name)].sum() for name in names])


def test_units_are_numbered_where_rows_share_them():
    assert scoring.shared_units(["a", "b", "a", "", "b", ""]) == [0, 1, 0, 2, 1, 3]
    assert [scoring.shared_units(names) for names in ([], ["a"], ["", ""], ["a", "b"])] == [
        None
    ] * 4


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


# --- several tasks --------------------------------------------------------------------------------


def test_a_stopped_evaluation_of_several_tasks_goes_on_in_the_task_it_was_in(
    model, arc, two_tasks, tmp_path, monkeypatch
):
    run = run_of(arc, likelihood=False, loss=False, batch_size=1)
    score(run, model, two_tasks, tmp_path / "whole")
    asked: list[int] = []
    original = records_module.generate_tokens

    def generate(model, prompts, **settings):
        asked.append(len(prompts))
        if sum(asked) > 14:
            raise KeyboardInterrupt
        return original(model, prompts, **settings)

    monkeypatch.setattr(records_module, "generate_tokens", generate)
    with pytest.raises(KeyboardInterrupt):
        score(run, model, two_tasks, tmp_path / "out")
    [partial] = (tmp_path / "out").glob("arc_challenge*.partial.jsonl")
    with partial.open("a") as file:
        file.write('{"index": 4, "output": "to')  # torn by a kill
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    asked[:] = [-99]
    summary = score(run, model, two_tasks, tmp_path / "out")
    assert sum(asked) == 3 - 99 and [task["rows"] for task in summary["tasks"]] == [12, 5]
    for rows in (tmp_path / "whole").glob("*.jsonl"):
        assert (tmp_path / "out" / rows.name).read_bytes() == rows.read_bytes()
    asked[:] = [-99]  # other settings: nothing of it counts
    longer = run_of(arc, likelihood=False, loss=False, batch_size=1, max_new_tokens=5)
    score(longer, model, two_tasks, tmp_path / "other")
    assert sum(asked) == 17 - 99
    assert not list((tmp_path / "out").glob("*.partial.jsonl"))
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    limit = "Answers that reached the limit of new tokens: arc_easy"
    for text in (limit, "Chance: arc_easy 0.333", "contamination was not checked"):
        assert text in page


def test_a_summary_of_tasks(model, arc, two_tasks, tmp_path):
    """Also of a model that is taken apart once the losses of all tasks are there."""
    run = run_of(arc, generate=False)
    summary = score(run, model, two_tasks, tmp_path / "out")
    given = dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params))
    again = score(run, given, two_tasks, tmp_path / "again", donate=True)
    assert not jax.tree.leaves(given.params)
    assert again["origin"] == summary["origin"] and again["groups"] == summary["groups"]
    assert [t["loss"] for t in again["tasks"]] == [t["loss"] for t in summary["tasks"]]
    mean = np.mean([task["likelihood_sum"] for task in summary["tasks"]])
    assert summary["groups"]["commonsense"]["all"]["likelihood_sum"]["mean"] == pytest.approx(mean)
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert "| arc_easy | all | 12 |" in page and "mean of 2 commonsense" in page
    assert "likelihood_sum, likelihood_norm: the likeliest option" in page
    with pytest.raises(ConfigError, match=r"piqa.*test\.json"):
        score(run, model, ["arc_easy", "piqa"], tmp_path / "none")
    with pytest.raises(ConfigError, match="leave out the /"):
        evaluate_tasks(run, model, two_tasks, tmp_path / "none", "a/../../c")
    assert not (tmp_path / "none").exists()  # said before the first task has run
    with pytest.raises(ConfigError, match=r"summary-test-tiny\.md is no directory"):
        evaluate(run_of(arc), model, out=tmp_path / "out" / "summary-test-tiny.md" / "x")
    with pytest.raises(ConfigError, match=r"summary-test-tiny\.md is no directory"):
        score(run, model, two_tasks, tmp_path / "out" / "summary-test-tiny.md")


def test_a_summary_of_other_scores_is_not_replaced(model, arc, tmp_path):
    given = {"generate": False, "loss": False, "limit": 3, "prompt_style": "alpaca"}
    score(run_of(arc, **given), model, ["arc_easy"], tmp_path)
    for name, value in (("prompt_style", None), ("limit", 2)):
        message = rf"other settings \(eval.{name}\); give another --out"
        with pytest.raises(ConfigError, match=message):
            score(run_of(arc, **given | {name: value}), model, ["arc_easy"], tmp_path)


# --- clean rows -----------------------------------------------------------------------------------


def test_clean_rows_are_scored_apart(model, arc, tmp_path):
    seen = load_examples("arc_easy", "train", arc)
    result = evaluate(run_of(arc), model, out=tmp_path / "r", trained_on=seen, console=False)
    assert (result["rows"], result["clean_rows"]) == (12, 9)
    rows = lines_of(tmp_path / "r.jsonl")
    assert [row["index"] for row in rows if row["contaminated"]] == [9, 10, 11]
    for name, key in (("accuracy", "correct"), ("likelihood_sum", "correct_sum")):
        assert result[name] == pytest.approx(np.mean([row[key] for row in rows]))
        assert result[f"{name}_clean"] == pytest.approx(np.mean([row[key] for row in rows[:9]]))
    assert result["likelihood_sum_clean"] != result["likelihood_sum"]
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert json.loads((tmp_path / "r.json").read_text())["config"]["eval"]["max_new_tokens"] == 6
    only = run_of(arc, clean_only=True, limit=None)
    clean = evaluate(only, model, trained_on=seen, console=False)
    assert (clean["rows"], clean["clean_rows"]) == (9, 9)
    assert clean["likelihood_sum"] == result["likelihood_sum_clean"]


def test_only_clean_rows_are_scored_where_asked(model, arc, tmp_path):
    rows = load_examples("arc_easy", "test", arc)
    only = run_of(arc, clean_only=True, limit=3)
    evaluate(only, model, out=tmp_path / "few", trained_on=rows[:2], console=False)
    # Dropped, then limited.
    assert [row["index"] for row in lines_of(tmp_path / "few.jsonl")] == [2, 3, 4]
    written = json.loads((tmp_path / "few.json").read_text())
    assert (written["questions"], written["contaminated"]) == (12, 2)
    assert written["scores"].keys() == {"clean"}
    for seen, message in ((None, "clean_only=True needs the training"), (rows, "leaves none")):
        with pytest.raises(ConfigError, match=message):
            evaluate(only, model, trained_on=seen, console=False)


def test_a_run_s_own_held_out_rows_are_clean_and_those_of_a_model_trained_elsewhere_are_not(
    model, tmp_path
):
    """json: 40 rows, 4 of them held out; arithmetic: three splits that share nothing."""
    sums = [(f"{i} + 1?", str(i + 1)) for i in range(40)]
    rows = [{"instruction": x, "output": f"The answer is {y}.", "answer": y} for x, y in sums]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    own = dataclasses.replace(TASK_DATA, task="rows", data_dir=str(tmp_path))

    def clean(task, data, here):
        run = run_of(data, generate=False, loss=False, limit=4)
        given = [TrainedOn(dataclasses.replace(data, task=task), here)]
        out = tmp_path / f"{task}-{data.task}-{here}"
        summary = score(run, model, [data.task], out, trained_on=given)
        return summary["tasks"][0]["clean_rows"]

    assert (clean("rows", own, True), clean("rows", own, False)) == (4, 0)
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(
        json.dumps([row | {"instruction": row["instruction"].upper()} for row in rows[:4]])
    )
    # Of another task, every row of the file counts.
    assert clean("rows", dataclasses.replace(own, task="arc_easy"), True) == 0
    generated = dataclasses.replace(own, task="arithmetic", data_dir=str(tmp_path / "made"))
    assert (clean("arithmetic", generated, True), clean("arithmetic", generated, False)) == (4, 4)


def test_the_rows_held_out_of_a_cloze_form_are_those_of_its_task(model, tmp_path):
    """Trained on one form, scored on the other: the rows that were held out are clean."""
    (tmp_path / "ARC-Easy").mkdir()
    asks = "Please choose the correct answer to the question: "
    rows = [choice(i) | {"instruction": asks + choice(i)["instruction"]} for i in range(40)]
    (tmp_path / "ARC-Easy" / "train.json").write_text(json.dumps(rows))
    data = dataclasses.replace(TASK_DATA, task="arc_easy", data_dir=str(tmp_path))
    run = run_of(data, generate=False, loss=False, limit=4)
    given = [TrainedOn(dataclasses.replace(data, task="arc_easy_cloze"))]
    [result] = score(run, model, ["arc_easy"], tmp_path / "o", trained_on=given)["tasks"]
    assert result["clean_rows"] == result["rows"] == 4


def test_a_row_without_options_leaves_the_others_their_likelihoods(model, tmp_path, monkeypatch):
    def records(examples, **_):
        return [{"correct_sum": True, "correct_norm": False} for e in examples if e.options]

    monkeypatch.setattr(task_module, "likelihood_records", records)
    rows = [choice(0, "answer1"), {"instruction": "Hi.", "output": "Hello."}, choice(1, "answer3")]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    data = dataclasses.replace(TASK_DATA, task="rows", data_dir=str(tmp_path))
    summary = score(run_of(data, generate=False, loss=False), model, ["rows"], tmp_path / "o")
    [result] = summary["tasks"]
    assert (result["rows"], result["rows_with_options"], result["likelihood_sum"]) == (3, 2, 1.0)
    page = (tmp_path / "o" / "summary-test-tiny.md").read_text()
    assert "Rows with options, which likelihoods and chance are over: rows 2 of 3." in page


def test_rows_of_another_folder_do_not_replace_an_evaluation(model, tmp_path):
    runs = []
    for name in ("a", "b"):
        write_questions(tmp_path / name / "test.jsonl", [f"{name} {i}?" for i in range(3)])
        data = dataclasses.replace(TASK_DATA, task="rows", data_dir=str(tmp_path / name))
        runs.append(run_of(data, generate=False, likelihood=False))
    out = tmp_path / "out"
    score(runs[0], model, ["rows"], out)
    score(runs[0], model, ["rows"], out)
    with pytest.raises(ConfigError, match=r"other settings \(data.data_dir\); give another --out"):
        score(runs[1], model, ["rows"], out)
    assert '"prompt": "a 0?' in (out / "rows-test-tiny.jsonl").read_text()


# --- units of the data ----------------------------------------------------------------------------


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
    run = run_of(data, loss=False)
    summary = score(run, model, ["woz"], tmp_path / "out", trained_on=[TrainedOn(data)])
    rows = lines_of(tmp_path / "out" / "woz-test-tiny.jsonl")
    assert [row["unit"] for row in rows] == [0, 0, 1, 1, 1, 2]
    assert [row["contaminated"] for row in rows] == [True] + [False] * 5
    (kept,) = summary["tasks"]
    assert kept[scoring.UNITS]["accuracy"] == kept[scoring.UNITS]["rougeL"] == "0 1 1 1 2"
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert "those of one dialogue are drawn together" in page
    assert scoring.UNITS not in scoring.rows_kept(
        [{"correct": True, "prompt": "", "input": "", "answer": ""}]
    )
