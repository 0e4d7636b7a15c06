"""Records of answers and likelihoods, their scores and tables; evaluations that are stopped and go on; sweeps that score tasks."""

import dataclasses
import json
from contextlib import ExitStack, contextmanager

import jax
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model

from zflora_jax import evals, sweeps
from zflora_jax.checkpoint import BusyError, locked
from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig
from zflora_jax.data.tasks import Example, load_examples
from zflora_jax.evals import generation_records, group_scores, likelihood_records, rouge, scores_of
from zflora_jax.fields import ConfigError
from zflora_jax.hf.save import save_hf
from zflora_jax.llama import forward
from zflora_jax.scorecard import evaluate, evaluate_tasks
from zflora_jax.sweeps import Sweep, sweep

DATA = DataConfig(lengths=(256, 512))
EVAL = EvalConfig(limit=None, batch_size=4, max_new_tokens=6)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path_factory.getbasetemp() / "tfds"))


@pytest.fixture(scope="module")
def model():
    model = tiny_model(max_position_embeddings=768, tie_word_embeddings=False)  # tied, it would repeat one token
    model.tokenizer = byte_tokenizer()
    return model


def choice(i, answer="answer2"):
    words = f"Question {i}{'?' * (i % 5 + 1)}\n\nAnswer1: {i} Answer2: {i + 1} Answer3: no\n\nAnswer format: answer1/answer2/answer3"
    return {"instruction": words, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.fixture
def arc(tmp_path):
    """A data directory with 30 train and 12 test rows of ARC-Easy; 3 of the test rows are train rows written otherwise."""
    folder = tmp_path / "ARC-Easy"
    folder.mkdir()
    train = [choice(i, "answer1") for i in range(100, 130)]  # one answer: the rows found again score otherwise than the clean ones
    again = [row | {"instruction": row["instruction"].replace("Question", "QUESTION --")} for row in train[:3]]
    test = [choice(i, f"answer{i % 3 + 1}") for i in range(9)] + again
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return dataclasses.replace(DATA, task="arc_easy", data_dir=str(tmp_path))


# --- records ------------------------------------------------------------------------------------------------------


def test_records_do_not_depend_on_batch_size_or_order(model, arc):
    examples = list(load_examples("arc_easy", "test", arc))
    results = []
    for batch_size, order in ((1, list(range(12))), (5, list(range(12))), (16, [7, 3, 11, 0, 5, 1, 2, 9, 10, 4, 6, 8])):
        evaluation, some = dataclasses.replace(EVAL, batch_size=batch_size), [examples[i] for i in order]
        answers, likelihoods = generation_records(model, "arc_easy", some, arc, evaluation), likelihood_records(model, some, arc, evaluation)
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
    assert record["correct_sum"] == (int(np.argmax(wanted)) == example.options.index(example.target))
    assert record["options"] == list(example.options)


def test_correct_norm_divides_by_characters(model, monkeypatch):
    example = Example("Q", "yes indeed", "yes", options=("no", "yes indeed"))
    monkeypatch.setattr(evals, "option_log_likelihoods", lambda *_, **__: [np.asarray([-4.0, -10.0], np.float32)])
    (record,) = likelihood_records(model, [example], DATA, EVAL)
    assert (record["correct_sum"], record["correct_norm"]) == (False, True)  # -2 a character against -1
    with pytest.raises(ConfigError, match="options"):
        likelihood_records(model, [Example("Q", "t", "a")], DATA, EVAL)


def test_alpaca_answers_end_where_the_next_response_begins(model, monkeypatch):
    text = "The answer is 4.\n\n### Response:\nThe answer is 5."
    monkeypatch.setattr(evals, "generate_tokens", lambda m, prompts, **_: [m.tokenizer(text)["input_ids"] for _ in prompts])
    example = [Example("2 + 2?", "The answer is 4.", "4")]
    for style, correct in (("alpaca-eval", True), ("chat", False)):
        (record,) = generation_records(model, "gsm8k", example, DATA, dataclasses.replace(EVAL, prompt_style=style))
        assert (record["output"], record["correct"], record["correct_legacy"]) == (text, correct, correct)


def test_rouge_is_rouge_score_s_and_takes_the_best_reference(model, monkeypatch):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    text, references = "The cats were running.\nIt rained.", ("A cat runs in the rain.", "The cat ran.\nIt was raining hard.")
    ours = rouge(text, references)
    for name, value in ours.items():
        assert value == max(scorer.score(reference, text)[name].fmeasure for reference in references)
    assert ours["rouge1"] > 0
    monkeypatch.setattr(evals, "generate_tokens", lambda m, prompts, **_: [m.tokenizer(text)["input_ids"] for _ in prompts])
    example = Example("Sum up.", references[0], "", input="long", references=references, document=True)
    (record,) = generation_records(model, "dialogsum", [example], DATA, EVAL)
    assert {name: record[name] for name in evals.ROUGE} == ours and "correct" not in record


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_a_stopped_evaluation_goes_on_where_it_was(model, arc, tmp_path, monkeypatch):
    examples = load_examples("arc_easy", "test", arc)
    evaluation, path = dataclasses.replace(EVAL, batch_size=1), tmp_path / "a" / "x.partial.jsonl"
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
    assert generation_records(model, "arc_easy", examples, arc, evaluation, partial=path) == whole and calls == []
    other = dataclasses.replace(evaluation, max_new_tokens=5)
    generation_records(model, "arc_easy", examples, arc, other, partial=path)
    assert len(calls) == 3  # other settings: nothing of it counts


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_have_bootstrap_intervals():
    draw = np.random.default_rng(0)
    records = [{"correct": bool(x), "rouge1": float(y)} for x, y in zip(draw.random(400) < 0.3, draw.random(400), strict=True)]
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
    assert scores_of([{"correct": False}] * 100)["accuracy"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.036995}, abs=1e-5)
    assert scores_of([{"correct": True}] * 3)["accuracy"] == pytest.approx({"mean": 1.0, "low": 0.438494, "high": 1.0}, abs=1e-5)


def test_a_stopped_evaluation_of_several_tasks_goes_on_in_the_task_it_was_in(model, arc, tmp_path, monkeypatch):
    (tmp_path / "ARC-Challenge").mkdir()
    (tmp_path / "ARC-Challenge" / "test.json").write_text(json.dumps([choice(i) for i in range(5)]))
    run = RunConfig(model="tiny", data=arc, eval=dataclasses.replace(EVAL, likelihood=False, loss=False, batch_size=1))
    asked: list[int] = []
    original = evals.generate_tokens

    def generate(model, prompts, **settings):
        asked.append(len(prompts))
        if sum(asked) > 14:
            raise KeyboardInterrupt
        return original(model, prompts, **settings)

    monkeypatch.setattr(evals, "generate_tokens", generate)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(run, model, ["arc_easy", "arc_challenge"], tmp_path / "out", "tiny", console=False)
    asked[:] = [0]
    summary = evaluate_tasks(run, model, ["arc_easy", "arc_challenge"], tmp_path / "out", "tiny", console=False)
    assert sum(asked) == 5 and [task["rows"] for task in summary["tasks"]] == [12, 5]
    assert not list((tmp_path / "out").glob("*.partial.jsonl"))
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert "contamination was not checked" in page and "Answers that reached the limit of new tokens: arc_easy" in page and "Chance: arc_easy" in page


def test_a_group_s_mean_counts_tasks_alike_and_only_scores_all_have():
    tables = [[{"correct": True, "correct_sum": False}] * 10, [{"correct": i < 50} for i in range(100)]]
    scores = group_scores(tables)
    assert scores.keys() == {"accuracy"} and scores["accuracy"]["mean"] == pytest.approx(0.75)
    assert 0.69 < scores["accuracy"]["low"] < 0.72 and 0.78 < scores["accuracy"]["high"] < 0.81
    assert group_scores([]) == {}


def test_clean_rows_are_scored_apart(model, arc, tmp_path):
    run = RunConfig(model="tiny", data=arc, eval=EVAL)
    result = evaluate(run, model, out=tmp_path / "r", trained_on=load_examples("arc_easy", "train", arc), console=False)
    assert (result["rows"], result["clean_rows"]) == (12, 9)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows if row["contaminated"]] == [9, 10, 11]
    for name, key in (("accuracy", "correct"), ("likelihood_sum", "correct_sum"), ("accuracy_legacy", "correct_legacy")):
        assert result[name] == pytest.approx(np.mean([row[key] for row in rows]))
        assert result[f"{name}_clean"] == pytest.approx(np.mean([row[key] for row in rows[:9]]))
    assert result["likelihood_sum_clean"] != result["likelihood_sum"]
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert json.loads((tmp_path / "r.json").read_text())["config"]["eval"]["max_new_tokens"] == 6


def test_a_summary_of_tasks(model, arc, tmp_path):
    (tmp_path / "ARC-Challenge").mkdir()
    (tmp_path / "ARC-Challenge" / "test.json").write_text(json.dumps([choice(i) for i in range(5)]))
    run = RunConfig(model="tiny", data=arc, eval=dataclasses.replace(EVAL, generate=False, loss=False))
    summary = evaluate_tasks(run, model, ["arc_easy", "arc_challenge"], tmp_path / "out", "tiny", console=False)
    assert [task["rows"] for task in summary["tasks"]] == [12, 5]
    mean = np.mean([task["likelihood_sum"] for task in summary["tasks"]])
    assert summary["groups"]["commonsense"]["all"]["likelihood_sum"]["mean"] == pytest.approx(mean)
    page = (tmp_path / "out" / "summary-test-tiny.md").read_text()
    assert "| arc_easy | all | 12 |" in page and "mean of 2 commonsense" in page
    other = dataclasses.replace(run, eval=dataclasses.replace(run.eval, limit=3, prompt_style="alpaca"))
    evaluate_tasks(other, model, ["arc_easy"], tmp_path / "o", "tiny", console=False)
    with pytest.raises(ConfigError, match=r"summary-test-tiny.json holds scores of other settings \(eval.prompt_style\); give another --out"):
        evaluate_tasks(run, model, ["arc_easy"], tmp_path / "o", "tiny", console=False)
    with pytest.raises(ConfigError, match=r"piqa.*test\.json"):
        evaluate_tasks(run, model, ["arc_easy", "piqa"], tmp_path / "none", "tiny", console=False)
    assert not (tmp_path / "none").exists()  # said before the first task has run


# --- sweeps -------------------------------------------------------------------------------------------------------


def test_a_sweep_scores_tasks_and_is_not_run_again(model, arc, tmp_path, monkeypatch):
    save_hf(tmp_path / "model", model)
    base = RunConfig(
        model=str(tmp_path / "model"),
        data=dataclasses.replace(arc, batch_size=2, packing=True),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=4, save_every=None, loss_chunk=128),
        eval=EvalConfig(limit=2),
    )
    plan = Sweep(
        "small",
        base,
        {"minimal": AdapterConfig("zflora-minimal", rank=2)},
        (1e-3, 1e-2),
        (0, 1),
        pick_steps=2,
        tasks=("arc_easy",),
        scoring=dataclasses.replace(EVAL, generate=False, loss=False),
    )
    result = sweep(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert [row["method"] for row in result["rows"]] == ["base", "minimal"] and result["missing"] == []
    assert len(result["runs"]) == 4 and {run["steps"] for run in result["runs"]} == {2, 4}
    row = result["rows"][1]
    picked = {run["validation_loss"]: run["learning_rate"] for run in result["runs"] if run["steps"] == 2}
    assert len(picked) == 2 and row["learning rate"] == picked[min(picked)]
    assert row["scores"].keys() == {"arc_easy"} and row["rows"] == {"arc_easy": 9}
    scored = [run for run in result["runs"] if run["steps"] == 4]
    assert row["mean"] == pytest.approx(50 * sum(run["scores"]["arc_easy"]["scores"]["clean"]["likelihood_sum"]["mean"] for run in scored))
    assert (tmp_path / "out" / "small.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "small.md").read_text()
    assert "## likelihood_sum, percent" in page and "arc_easy (9)" in page

    monkeypatch.setattr("zflora_jax.sweeps.train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("zflora_jax.sweeps.evaluate_tasks", lambda *_, **__: pytest.fail("scored again"))
    again = sweep(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert again["rows"] == json.loads(json.dumps(result["rows"]))
    record = tmp_path / "out" / "small" / "minimal-lr0.01-steps2-seed0.json"
    saved = json.loads(record.read_text())
    assert saved["result"]["device"] and saved["result"]["date"]
    del saved["config"]["data"]["packing"], saved["config"]["eval"]["num_beams"]  # a record that is older than a setting; packing's default differs
    record.write_text(json.dumps(saved))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        sweep(plan, tmp_path / "runs", tmp_path / "out", console=False)


def test_a_sweep_takes_its_rates_from_another(model, arc, tmp_path, monkeypatch):
    save_hf(tmp_path / "model", model)
    base = RunConfig(
        model=str(tmp_path / "model"),
        data=dataclasses.replace(arc, batch_size=2),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=3, save_every=None, loss_chunk=128),
        eval=EvalConfig(limit=2),
    )
    methods = {"lora": AdapterConfig("lora", rank=2)}
    first = Sweep("first", base, methods, (1e-3, 1e-2), (0,), pick_steps=2)
    longer = dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=1))
    second = Sweep("second", longer, methods, (5e-1,), (1,), pick_steps=2, rates_from=first)
    result = sweep(second, tmp_path / "runs" / "second", tmp_path / "out", console=False)
    (row,) = result["rows"]
    found = [json.loads(path.read_text()) for path in (tmp_path / "out" / "first").iterdir()]
    lowest = min(found, key=lambda record: record["result"]["validation_loss"])
    assert row["learning rate"] == lowest["config"]["optim"]["learning_rate"] and [run["seed"] for run in result["runs"]] == [1]
    assert "(as in first)" in (tmp_path / "out" / "second.md").read_text()

    picks = {path.name for path in (tmp_path / "out" / "first").iterdir()}
    assert picks == {"lora-lr0.001-steps2-seed0.json", "lora-lr0.01-steps2-seed0.json"}
    trained: list[int] = []
    original = sweeps.train
    monkeypatch.setattr(sweeps, "train", lambda run, *a, **k: (trained.append(run.train.steps), original(run, *a, **k))[1])
    assert sweep(first, tmp_path / "runs" / "first", tmp_path / "out", console=False)["rows"][0]["learning rate"] == row["learning rate"]
    assert trained == [3]  # the choosing runs were there

    with pytest.raises(ConfigError, match="rates_from='first': it must be another sweep, over the same methods"):
        dataclasses.replace(second, methods={"lora": AdapterConfig("lora", rank=3)})


def test_a_sweep_waits_for_a_run_that_another_process_trains(model, arc, tmp_path, monkeypatch):
    save_hf(tmp_path / "model", model)
    data = dataclasses.replace(arc, batch_size=2)
    train_config = TrainConfig(steps=2, save_every=None, loss_chunk=128)
    base = RunConfig(str(tmp_path / "model"), data=data, optim=OptimConfig(warmup_steps=1), train=train_config, eval=EvalConfig(limit=2))
    plan = Sweep("busy", base, {"lora": AdapterConfig("lora", rank=2)}, (1e-3,), (0,))
    folder = tmp_path / "runs" / "lora-lr0.001-seed0"
    folder.mkdir(parents=True)
    original, refused = sweeps.locked, []
    with ExitStack() as stack:
        stack.enter_context(locked(folder))

        @contextmanager
        def held(workdir):
            try:
                with original(workdir):
                    yield
            except BusyError as error:
                refused.append(str(error))
                stack.close()  # the other process ends
                raise

        monkeypatch.setattr(sweeps, "locked", held)
        monkeypatch.setattr(sweeps, "_POLL", 0.01)
        assert sweep(plan, tmp_path / "runs", tmp_path / "out", console=False)["rows"][0]["learning rate"] == 1e-3
    assert len(refused) == 1 and "is being trained by another process" in refused[0]


def test_only_clean_rows_are_scored_where_asked(model, arc, tmp_path):
    only = dataclasses.replace(EVAL, clean_only=True, limit=None)
    seen = load_examples("arc_easy", "train", arc)
    result = evaluate(RunConfig(model="tiny", data=arc, eval=only), model, out=tmp_path / "r", trained_on=seen, console=False)
    assert (result["rows"], result["clean_rows"]) == (9, 9)
    assert [json.loads(line)["index"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == list(range(9))
    few = dataclasses.replace(only, limit=3)
    seen_first = load_examples("arc_easy", "test", arc)[:2]
    evaluate(RunConfig(model="tiny", data=arc, eval=few), model, out=tmp_path / "few", trained_on=seen_first, console=False)
    assert [json.loads(line)["index"] for line in (tmp_path / "few.jsonl").read_text().splitlines()] == [2, 3, 4]  # dropped, then limited
    written = json.loads((tmp_path / "few.json").read_text())
    assert (written["questions"], written["contaminated"]) == (12, 2) and written["scores"].keys() == {"clean"}
    all_rows = evaluate(RunConfig(model="tiny", data=arc, eval=EVAL), model, trained_on=seen, console=False)
    assert result["likelihood_sum"] == all_rows["likelihood_sum_clean"]
    with pytest.raises(ConfigError, match="clean_only=True needs the training data"):
        evaluate(RunConfig(model="tiny", data=arc, eval=only), model, console=False)
    with pytest.raises(ConfigError, match="leaves none"):
        evaluate(RunConfig(model="tiny", data=arc, eval=only), model, trained_on=load_examples("arc_easy", "test", arc), console=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "sweep.methods is empty"),
        ({"methods": {"base": AdapterConfig("lora")}}, "the untrained model's row"),
        ({"tasks": ("arc_easy",)}, "go together"),
        ({"pick_steps": 1000}, "pick_steps=1000: must be above optim.warmup_steps=10 and at most train.steps=100"),
    ],
)
def test_wrong_sweeps(changes, message):
    with pytest.raises(ConfigError, match=message):
        Sweep(**({"name": "x", "base": RunConfig(), "methods": {"lora": AdapterConfig("lora")}, "learning_rates": (1e-3,), "seeds": (0,)} | changes))


def test_rows_without_an_answer_do_not_count(model):
    examples = [Example("Say hello.", "hello", ""), Example("1 + 1?", "The answer is 2.", "2")]
    records = generation_records(model, "json", examples, DATA, EVAL)
    assert "correct" not in records[0] and scores_of(records)["accuracy"]["mean"] == float(records[1]["correct"])


def test_a_sweep_whose_grid_runs_are_whole_is_finished_too(model, arc, tmp_path, monkeypatch):
    """The chosen run is one of the grid's: trained once, its record with scores serves both."""
    save_hf(tmp_path / "model", model)
    base = RunConfig(
        model=str(tmp_path / "model"),
        data=dataclasses.replace(arc, batch_size=2),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, save_every=None, loss_chunk=128),
        eval=EvalConfig(limit=2),
    )
    scoring = dataclasses.replace(EVAL, generate=False, loss=False, limit=4)
    plan = Sweep("whole", base, {"lora": AdapterConfig("lora", rank=2)}, (1e-3,), (0,), tasks=("arc_easy",), scoring=scoring)
    result = sweep(plan, tmp_path / "runs", tmp_path / "out", console=False)
    monkeypatch.setattr("zflora_jax.sweeps.train", lambda *_, **__: pytest.fail("trained again"))
    assert sweep(plan, tmp_path / "runs", tmp_path / "out", console=False)["rows"] == json.loads(json.dumps(result["rows"]))


def test_a_model_without_a_tokenizer_is_refused_before_anything_runs(arc):
    with pytest.raises(ConfigError, match="without a tokenizer"):
        evaluate(RunConfig(model="tiny", data=arc, eval=EVAL), tiny_model(), console=False)
