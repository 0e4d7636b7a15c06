"""Scores of records, of tasks and of groups of tasks, with their intervals and pages."""

import dataclasses
import json

import numpy as np
import pytest
from support.runs import EVAL, TASK_DATA, choice
from support.tasks import write_questions

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.data.tasks import load_examples
from zflora_jax.evaluation import records as records_module
from zflora_jax.evaluation.statistics import (
    as_dicts,
    group_scores,
    scores_of,
)
from zflora_jax.evaluation.suite import evaluate_tasks
from zflora_jax.evaluation.task import evaluate


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
    assert as_dicts(scores_of([{"correct": False}] * 100))["accuracy"] == pytest.approx(
        {"mean": 0.0, "low": 0.0, "high": 0.036995}, abs=1e-5
    )
    # A task of few rows that agree, beside one of many: its own rows are what little is known of.
    few, many = [{"correct": True}] * 4, [{"correct": i % 2 == 0} for i in range(100)]
    mixed = group_scores([few, many])["accuracy"]
    assert 0.45 < mixed.low < 0.52 and mixed.high == pytest.approx(0.80, abs=0.01)
    opposite = group_scores([few, [{"correct": False}] * 4])["accuracy"]
    assert (opposite.low, opposite.high) == pytest.approx((0.239, 0.761), abs=0.03)
    six = group_scores([[{"correct": True}]] * 6)["accuracy"]
    assert six.low < 0.7 and six.high == 1.0
    assert as_dicts(scores_of([{"correct": True}] * 3))["accuracy"] == pytest.approx(
        {"mean": 1.0, "low": 0.438494, "high": 1.0}, abs=1e-5
    )


def test_a_stopped_evaluation_of_several_tasks_goes_on_in_the_task_it_was_in(
    model, arc, tmp_path, monkeypatch
):
    (tmp_path / "ARC-Challenge").mkdir()
    (tmp_path / "ARC-Challenge" / "test.json").write_text(json.dumps([choice(i) for i in range(5)]))
    run = RunConfig(
        model="tiny",
        data=arc,
        eval=dataclasses.replace(EVAL, likelihood=False, loss=False, batch_size=1),
    )
    asked: list[int] = []
    original = records_module.generate_tokens

    def generate(model, prompts, **settings):
        asked.append(len(prompts))
        if sum(asked) > 14:
            raise KeyboardInterrupt
        return original(model, prompts, **settings)

    monkeypatch.setattr(records_module, "generate_tokens", generate)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(
            run, model, ["arc_easy", "arc_challenge"], tmp_path / "out", "tiny", console=False
        )
    asked[:] = [0]
    summary = evaluate_tasks(
        run, model, ["arc_easy", "arc_challenge"], tmp_path / "out", "tiny", console=False
    )
    assert sum(asked) == 3 and [task["rows"] for task in summary["tasks"]] == [12, 5]
    assert not list((tmp_path / "out").glob("*.partial.jsonl"))
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert (
        "contamination was not checked" in page
        and "Answers that reached the limit of new tokens: arc_easy" in page
        and "Chance: arc_easy 0.333" in page
        and "accuracy: the generated answer by this project's parser." in page
    )


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


def test_clean_rows_are_scored_apart(model, arc, tmp_path):
    run = RunConfig(model="tiny", data=arc, eval=EVAL)
    result = evaluate(
        run,
        model,
        out=tmp_path / "r",
        trained_on=load_examples("arc_easy", "train", arc),
        console=False,
    )
    assert (result["rows"], result["clean_rows"]) == (12, 9)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows if row["contaminated"]] == [9, 10, 11]
    for name, key in (
        ("accuracy", "correct"),
        ("likelihood_sum", "correct_sum"),
    ):
        assert result[name] == pytest.approx(np.mean([row[key] for row in rows]))
        assert result[f"{name}_clean"] == pytest.approx(np.mean([row[key] for row in rows[:9]]))
    assert result["likelihood_sum_clean"] != result["likelihood_sum"]
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert json.loads((tmp_path / "r.json").read_text())["config"]["eval"]["max_new_tokens"] == 6


def test_a_run_s_own_held_out_rows_are_clean_and_those_of_a_model_trained_elsewhere_are_not(
    model, tmp_path
):
    """json: 40 rows, of which this project holds 4 out; arithmetic: three splits that share
    nothing.
    """
    rows = [
        {
            "instruction": f"{i} + 1?",
            "input": "",
            "output": f"The answer is {i + 1}.",
            "answer": str(i + 1),
        }
        for i in range(40)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    own = dataclasses.replace(TASK_DATA, task="rows", data_dir=str(tmp_path))
    only = dataclasses.replace(EVAL, generate=False, loss=False)

    def clean(task, data, here):
        run = RunConfig(model="tiny", data=data, eval=dataclasses.replace(only, limit=4))
        given = [TrainedOn(dataclasses.replace(data, task=task), here)]
        (result,) = evaluate_tasks(
            run,
            model,
            [data.task],
            tmp_path / f"{task}-{data.task}-{here}",
            "tiny",
            trained_on=given,
            console=False,
        )["tasks"]
        return result["clean_rows"]

    assert (clean("rows", own, True), clean("rows", own, False)) == (4, 0)
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(
        json.dumps([row | {"instruction": row["instruction"].upper()} for row in rows[:4]])
    )
    # Of another task, every row of the file counts.
    assert clean("rows", dataclasses.replace(own, task="arc_easy"), True) == 0
    generated = dataclasses.replace(own, task="arithmetic", data_dir=str(tmp_path / "made"))
    assert (clean("arithmetic", generated, True), clean("arithmetic", generated, False)) == (4, 4)


def test_a_summary_of_tasks(model, arc, tmp_path):
    (tmp_path / "ARC-Challenge").mkdir()
    (tmp_path / "ARC-Challenge" / "test.json").write_text(json.dumps([choice(i) for i in range(5)]))
    run = RunConfig(
        model="tiny", data=arc, eval=dataclasses.replace(EVAL, generate=False, loss=False)
    )
    summary = evaluate_tasks(
        run, model, ["arc_easy", "arc_challenge"], tmp_path / "out", "tiny", console=False
    )
    assert [task["rows"] for task in summary["tasks"]] == [12, 5]
    mean = np.mean([task["likelihood_sum"] for task in summary["tasks"]])
    assert summary["groups"]["commonsense"]["all"]["likelihood_sum"]["mean"] == pytest.approx(mean)
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert "| arc_easy | all | 12 |" in page and "mean of 2 commonsense" in page
    assert "likelihood_sum, likelihood_norm: the likeliest option" in page
    other = dataclasses.replace(
        run, eval=dataclasses.replace(run.eval, limit=3, prompt_style="alpaca")
    )
    evaluate_tasks(other, model, ["arc_easy"], tmp_path / "o", "tiny", console=False)
    with pytest.raises(
        ConfigError,
        match=(
            r"summary-test-tiny.json holds scores of other settings \(eval.prompt_style\); give"
            r" another --out"
        ),
    ):
        evaluate_tasks(run, model, ["arc_easy"], tmp_path / "o", "tiny", console=False)
    fewer = dataclasses.replace(other, eval=dataclasses.replace(other.eval, limit=2))
    with pytest.raises(ConfigError, match=r"more rows than eval.limit=2 \(3 of arc_easy\)"):
        evaluate_tasks(fewer, model, ["arc_easy"], tmp_path / "o", "tiny", console=False)
    with pytest.raises(ConfigError, match=r"piqa.*test\.json"):
        evaluate_tasks(run, model, ["arc_easy", "piqa"], tmp_path / "none", "tiny", console=False)
    assert not (tmp_path / "none").exists()  # said before the first task has run


def test_only_clean_rows_are_scored_where_asked(model, arc, tmp_path):
    only = dataclasses.replace(EVAL, clean_only=True, limit=None)
    seen = load_examples("arc_easy", "train", arc)
    result = evaluate(
        RunConfig(model="tiny", data=arc, eval=only),
        model,
        out=tmp_path / "r",
        trained_on=seen,
        console=False,
    )
    assert (result["rows"], result["clean_rows"]) == (9, 9)
    assert [
        json.loads(line)["index"] for line in (tmp_path / "r.jsonl").read_text().splitlines()
    ] == list(range(9))
    few = dataclasses.replace(only, limit=3)
    seen_first = load_examples("arc_easy", "test", arc)[:2]
    evaluate(
        RunConfig(model="tiny", data=arc, eval=few),
        model,
        out=tmp_path / "few",
        trained_on=seen_first,
        console=False,
    )
    # dropped, then limited.
    assert [
        json.loads(line)["index"] for line in (tmp_path / "few.jsonl").read_text().splitlines()
    ] == [
        2,
        3,
        4,
    ]
    written = json.loads((tmp_path / "few.json").read_text())
    assert (written["questions"], written["contaminated"]) == (12, 2) and written[
        "scores"
    ].keys() == {"clean"}
    all_rows = evaluate(
        RunConfig(model="tiny", data=arc, eval=EVAL), model, trained_on=seen, console=False
    )
    assert result["likelihood_sum"] == all_rows["likelihood_sum_clean"]
    with pytest.raises(ConfigError, match="clean_only=True needs the training data"):
        evaluate(RunConfig(model="tiny", data=arc, eval=only), model, console=False)
    with pytest.raises(ConfigError, match="leaves none"):
        evaluate(
            RunConfig(model="tiny", data=arc, eval=only),
            model,
            trained_on=load_examples("arc_easy", "test", arc),
            console=False,
        )


def test_the_rows_held_out_of_a_cloze_form_are_those_of_its_task(model, tmp_path):
    """Trained on one form, scored on the other: the rows that were held out are clean."""
    (tmp_path / "ARC-Easy").mkdir()
    asks = "Please choose the correct answer to the question: "
    rows = [choice(i) | {"instruction": asks + choice(i)["instruction"]} for i in range(40)]
    (tmp_path / "ARC-Easy" / "train.json").write_text(json.dumps(rows))
    data = dataclasses.replace(TASK_DATA, task="arc_easy", data_dir=str(tmp_path))
    only = dataclasses.replace(EVAL, generate=False, loss=False, limit=4)
    run = RunConfig(model="tiny", data=data, eval=only)
    given = [TrainedOn(dataclasses.replace(data, task="arc_easy_cloze"))]
    where = {"trained_on": given, "console": False}
    (result,) = evaluate_tasks(run, model, ["arc_easy"], tmp_path / "o", "tiny", **where)["tasks"]
    assert result["clean_rows"] == result["rows"] == 4


def test_rows_of_another_folder_do_not_replace_an_evaluation(model, tmp_path):
    runs = []
    for name in ("a", "b"):
        write_questions(tmp_path / name / "test.jsonl", [f"{name} {i}?" for i in range(3)])
        data = dataclasses.replace(TASK_DATA, task="rows", data_dir=str(tmp_path / name))
        only = dataclasses.replace(EVAL, generate=False, likelihood=False)
        runs.append(RunConfig(model="tiny", data=data, eval=only))
    out = tmp_path / "out"
    evaluate_tasks(runs[0], model, ["rows"], out, "tiny", console=False)
    evaluate_tasks(runs[0], model, ["rows"], out, "tiny", console=False)
    with pytest.raises(ConfigError, match=r"other settings \(data.data_dir\); give another --out"):
        evaluate_tasks(runs[1], model, ["rows"], out, "tiny", console=False)
    assert '"prompt": "a 0?' in (out / "rows-test-tiny.jsonl").read_text()
