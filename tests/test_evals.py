"""Records of answers and likelihoods, their scores and tables; evaluations that are stopped and go
on.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import EVAL, TASK_DATA, choice, tiny_model

from zflora_jax.core import trees
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data import answers
from zflora_jax.data.mixture import TrainedOn
from zflora_jax.data.tasks import Example, load_examples
from zflora_jax.evaluation import evals, scorecard
from zflora_jax.evaluation.evals import (
    generation_records,
    group_scores,
    likelihood_records,
    rouge,
    scores_of,
)
from zflora_jax.evaluation.scorecard import evaluate, evaluate_tasks
from zflora_jax.inference.text import stop_ids
from zflora_jax.nn.llama import forward


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path_factory.getbasetemp() / "tfds"))


# --- records --------------------------------------------------------------------------------------


def test_records_do_not_depend_on_batch_size_or_order(model, arc):
    examples = list(load_examples("arc_easy", "test", arc))
    results = []
    for batch_size, order in (
        (1, list(range(12))),
        (5, list(range(12))),
        (16, [7, 3, 11, 0, 5, 1, 2, 9, 10, 4, 6, 8]),
    ):
        evaluation, some = (
            dataclasses.replace(EVAL, batch_size=batch_size),
            [examples[i] for i in order],
        )
        answers, likelihoods = (
            generation_records(model, "arc_easy", some, arc, evaluation),
            likelihood_records(model, some, arc, evaluation),
        )
        results.append([answers[order.index(i)] | likelihoods[order.index(i)] for i in range(12)])
    for rows in results[1:]:
        for row, first in zip(rows, results[0], strict=True):
            np.testing.assert_allclose(row["log_likelihoods"], first["log_likelihoods"], rtol=1e-4)
            assert row | {"log_likelihoods": None} == first | {"log_likelihoods": None}
    assert len({row["output"] for row in results[0]}) > 3


def test_likelihoods_are_those_of_the_whole_text(model, arc):
    """By the plain definition, on the tokens of training; and the choices made from them."""
    example = load_examples("arc_easy", "test", arc)[4]
    (record,) = likelihood_records(model, [example], arc, EVAL)
    (prompt,) = evals.encode_prompts([example], model.tokenizer, "chat")
    wanted = []
    for option in example.options:
        ids = model.tokenizer(option, add_special_tokens=False)["input_ids"]
        tokens = np.asarray([[*prompt, *ids]], np.int32)
        logp = jax.nn.log_softmax(forward(model, tokens)[0], axis=-1)
        wanted.append(sum(float(logp[len(prompt) - 1 + n, token]) for n, token in enumerate(ids)))
    np.testing.assert_allclose(record["log_likelihoods"], wanted, rtol=1e-5)
    assert record["correct_sum"] == (
        int(np.argmax(wanted)) == example.options.index(example.target)
    )
    assert record["options"] == list(example.options)


def test_correct_norm_divides_by_characters(model, monkeypatch):
    example = Example("Q", "yes indeed", "yes", options=("no", "yes indeed"))
    monkeypatch.setattr(
        evals, "option_log_likelihoods", lambda *_, **__: [np.asarray([-4.0, -10.0], np.float32)]
    )
    (record,) = likelihood_records(model, [example], TASK_DATA, EVAL)
    # -2 a character against -1.
    assert (record["correct_sum"], record["correct_norm"]) == (
        False,
        True,
    )
    with pytest.raises(ConfigError, match="options"):
        likelihood_records(model, [Example("Q", "t", "a")], TASK_DATA, EVAL)


def test_the_legend_says_where_the_two_likelihood_scores_differ():
    """By the labels themselves: options that are equally long are ordered alike by both scores."""
    words = (answers.TRUE_FALSE, answers.ANSWERS, answers.SOLUTIONS, answers.ENDINGS)
    unequal = [w for w in (*words, answers.OPTIONS) if len(set(map(len, w))) > 1]
    assert unequal == [answers.TRUE_FALSE]
    legend = scorecard.SCORE_LEGEND
    assert "two scores equal, but for boolq's true and false" in legend
    assert "Neither is lm-evaluation-harness' acc or acc_norm" in legend


def test_alpaca_answers_end_where_the_next_response_begins(model, monkeypatch):
    text = "The answer is 4.\n\n### Response:\nThe answer is 5."
    monkeypatch.setattr(
        evals,
        "generate_tokens",
        lambda m, prompts, **_: [m.tokenizer(text)["input_ids"] for _ in prompts],
    )
    example = [Example("2 + 2?", "The answer is 4.", "4")]
    for style, correct in (("alpaca-eval", True), ("chat", False)):
        (record,) = generation_records(
            model, "gsm8k", example, TASK_DATA, dataclasses.replace(EVAL, prompt_style=style)
        )
        assert (record["output"], record["correct"], record["correct_legacy"]) == (
            text,
            correct,
            correct,
        )


def test_rouge_is_rouge_score_s_and_takes_the_best_reference(model, monkeypatch):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    text, references = (
        "The cats were running.\nIt rained.",
        (
            "A cat runs in the rain.",
            "The cat ran.\nIt was raining hard.",
        ),
    )
    ours = rouge(text, references)
    for name, value in ours.items():
        assert value == max(
            scorer.score(reference, text)[name].fmeasure for reference in references
        )
    assert ours["rouge1"] > 0
    monkeypatch.setattr(
        evals,
        "generate_tokens",
        lambda m, prompts, **_: [m.tokenizer(text)["input_ids"] for _ in prompts],
    )
    example = Example(
        "Sum up.", references[0], "", input="long", references=references, document=True
    )
    (record,) = generation_records(model, "dialogsum", [example], TASK_DATA, EVAL)
    assert {name: record[name] for name in evals.ROUGE} == ours and "correct" not in record


# --- stopping and going on ------------------------------------------------------------------------


def test_a_stopped_evaluation_goes_on_where_it_was(model, arc, tmp_path, monkeypatch):
    examples = load_examples("arc_easy", "test", arc)
    evaluation, path = EVAL, tmp_path / "a" / "x.partial.jsonl"
    whole = generation_records(model, "arc_easy", examples, arc, evaluation)
    calls, kill = [], [True]
    real = evals.generate_tokens

    def failing(model, prompts, **settings):
        calls.append(len(prompts))
        if kill and len(calls) == 3:
            kill.clear()
            raise KeyboardInterrupt
        return real(model, prompts, **settings)

    monkeypatch.setattr(evals, "generate_tokens", failing)
    with pytest.raises(KeyboardInterrupt):
        generation_records(model, "arc_easy", examples, arc, evaluation, partial=path)
    with path.open("a") as file:
        file.write('{"index": 11, "output": "to')  # torn by a kill
    assert generation_records(model, "arc_easy", examples, arc, evaluation, partial=path) == whole
    assert calls == [4, 4, 4, 4]  # the third batch again, nothing else
    calls.clear()
    assert (
        generation_records(model, "arc_easy", examples, arc, evaluation, partial=path) == whole
        and calls == []
    )
    other = dataclasses.replace(evaluation, max_new_tokens=5)
    generation_records(model, "arc_easy", examples, arc, other, partial=path)
    assert len(calls) == 3  # other settings: nothing of it counts


# --- scores ---------------------------------------------------------------------------------------


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
        assert scores[name]["mean"] == pytest.approx(values.mean())
        assert scores[name]["low"] == pytest.approx(values.mean() - error, abs=0.006)
        assert scores[name]["high"] == pytest.approx(values.mean() + error, abs=0.006)
    assert scores_of([]) == {}


def test_all_right_or_all_wrong_is_not_certainty():
    assert scores_of([{"correct": False}] * 100)["accuracy"] == pytest.approx(
        {"mean": 0.0, "low": 0.0, "high": 0.036995}, abs=1e-5
    )
    six = group_scores([[{"correct": True}]] * 6)["accuracy"]
    assert six["low"] < 0.7 and six["high"] == 1.0
    assert scores_of([{"correct": True}] * 3)["accuracy"] == pytest.approx(
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
    original = evals.generate_tokens

    def generate(model, prompts, **settings):
        asked.append(len(prompts))
        if sum(asked) > 14:
            raise KeyboardInterrupt
        return original(model, prompts, **settings)

    monkeypatch.setattr(evals, "generate_tokens", generate)
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
    )


def test_a_group_s_mean_counts_tasks_alike_and_only_scores_all_have():
    tables = [
        [{"correct": True, "correct_sum": False}] * 10,
        [{"correct": i < 50} for i in range(100)],
    ]
    scores = group_scores(tables)
    assert scores.keys() == {"accuracy"} and scores["accuracy"]["mean"] == pytest.approx(0.75)
    assert 0.69 < scores["accuracy"]["low"] < 0.72 and 0.78 < scores["accuracy"]["high"] < 0.81
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
        ("accuracy_legacy", "correct_legacy"),
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
    own = dataclasses.replace(TASK_DATA, task="json", data_dir=str(tmp_path))
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

    assert (clean("json", own, True), clean("json", own, False)) == (4, 0)
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy" / "test.json").write_text(
        json.dumps([row | {"instruction": row["instruction"].upper()} for row in rows[:4]])
    )
    # Of another task, every row of the file counts.
    assert clean("json", dataclasses.replace(own, task="arc_easy"), True) == 0
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


def test_rows_without_an_answer_do_not_count(model):
    examples = [Example("Say hello.", "hello", ""), Example("1 + 1?", "The answer is 2.", "2")]
    records = generation_records(model, "json", examples, TASK_DATA, EVAL)
    assert "correct" not in records[0] and scores_of(records)["accuracy"]["mean"] == float(
        records[1]["correct"]
    )


def test_a_model_without_a_tokenizer_is_refused_before_anything_runs(arc):
    with pytest.raises(ConfigError, match="without a tokenizer"):
        evaluate(RunConfig(model="tiny", data=arc, eval=EVAL), tiny_model(), console=False)


def test_an_answer_that_did_not_stop_by_itself_is_cut(model, monkeypatch):
    stop, outputs = stop_ids(model, "chat"), {}
    monkeypatch.setattr(
        evals,
        "generate_tokens",
        lambda _, prompts, **__: [outputs[len(prompts)][i] for i in range(len(prompts))],
    )
    outputs[3] = [[65, stop[0]], [65, 66], []]
    examples = [Example(f"{i}?", "x", "1") for i in range(3)]
    assert [
        record["cut"] for record in generation_records(model, "json", examples, TASK_DATA, EVAL)
    ] == [False, True, True]


def test_a_model_is_fingerprinted_once_for_all_tasks(model, tmp_path, monkeypatch):
    taken, real = [], trees.fingerprint
    monkeypatch.setattr(trees, "fingerprint", lambda tree: taken.append(tree) or real(tree))
    one = dataclasses.replace(model)
    for name in ("likelihood", "generation", "another task"):
        evals._in_batches(
            lambda rows: [{} for _ in rows],
            one,
            [[1], [2]],
            name,
            2,
            tmp_path / name,
            lambda _: None,
        )
    assert len(taken) == 1
    one.params = jax.tree.map(lambda leaf: leaf + 1, one.params)
    evals._in_batches(
        lambda rows: [{} for _ in rows], one, [[1], [2]], "a", 2, tmp_path / "a", lambda _: None
    )
    assert len(taken) == 2
