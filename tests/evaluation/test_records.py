"""Records of answers and likelihoods; evaluations that are stopped and go on."""

import dataclasses

import jax
import numpy as np
import pytest
from support.models import tiny_model
from support.runs import EVAL, TASK_DATA

from zflora_jax import ConfigError, RunConfig, evaluate, forward
from zflora_jax.data.tasks import Example, load_examples
from zflora_jax.evaluation import records as records_module
from zflora_jax.evaluation.records import generation_records, likelihood_records, rouge
from zflora_jax.evaluation.scores import scores_of
from zflora_jax.inference.text import stop_ids


@pytest.fixture
def reply(monkeypatch):
    """reply(text, ...): sets the model's answers, by turns."""

    def set_answers(*texts):
        def answers(model, prompts, **_):
            encoded = [t if isinstance(t, list) else model.tokenizer(t)["input_ids"] for t in texts]
            return [encoded[i % len(texts)] for i in range(len(prompts))]

        monkeypatch.setattr(records_module, "generate_tokens", answers)

    return set_answers


# --- records --------------------------------------------------------------------------------------


@pytest.mark.soak  # test_likelihood has it of likelihoods
def test_records_do_not_depend_on_batch_size_or_order(model, arc):
    examples = list(load_examples("arc_easy", "test", arc))
    results = []
    shuffled = [7, 3, 11, 0, 5, 1, 2, 9, 10, 4, 6, 8]
    for batch_size, order in ((1, range(12)), (5, range(12)), (16, shuffled)):
        evaluation = dataclasses.replace(EVAL, batch_size=batch_size)
        some = [examples[i] for i in order]
        answers = generation_records(model, "arc_easy", some, arc, evaluation)
        likelihoods = likelihood_records(model, some, arc, evaluation)
        both = {i: a | b for i, a, b in zip(order, answers, likelihoods, strict=True)}
        results.append([both[i] for i in range(12)])
    for rows in results[1:]:
        for row, first in zip(rows, results[0], strict=True):
            np.testing.assert_allclose(row["log_likelihoods"], first["log_likelihoods"], rtol=1e-4)
            assert row | {"log_likelihoods": None} == first | {"log_likelihoods": None}
    assert len({row["output"] for row in results[0]}) > 3


def test_likelihoods_are_those_of_the_whole_text(model, arc):
    """By the plain definition, on the tokens of training; and the choices made from them."""
    example = load_examples("arc_easy", "test", arc)[4]
    (record,) = likelihood_records(model, [example], arc, EVAL)
    (prompt,) = records_module.encode_prompts([example], model.tokenizer, "chat")
    wanted = []
    for option in example.options:
        ids = model.tokenizer(option, add_special_tokens=False)["input_ids"]
        tokens = np.asarray([[*prompt, *ids]], np.int32)
        logp = jax.nn.log_softmax(forward(model, tokens)[0], axis=-1)
        wanted.append(sum(float(logp[len(prompt) - 1 + n, token]) for n, token in enumerate(ids)))
    np.testing.assert_allclose(record["log_likelihoods"], wanted, rtol=1e-5)
    right = int(np.argmax(wanted)) == example.options.index(example.target)
    assert (record["correct_sum"], record["options"]) == (right, list(example.options))


def test_correct_norm_divides_by_characters(model):
    example = Example("Q", "yes indeed", "yes", options=("no", "yes indeed"))
    found = records_module._chosen([-4.0, -10.0], example)  # a character: -2 against -1
    assert (found["correct_sum"], found["correct_norm"]) == (False, True)
    with pytest.raises(ConfigError, match="options"):
        likelihood_records(model, [Example("Q", "t", "a")], TASK_DATA, EVAL)


def test_alpaca_answers_end_where_the_next_response_begins(model, reply):
    text = "The answer is 4.\n\n### Response:\nThe answer is 5."
    reply(text)
    example = [Example("2 + 2?", "The answer is 4.", "4")]
    for style, correct in (("alpaca-eval", True), ("chat", False)):
        (record,) = generation_records(
            model, "gsm8k", example, TASK_DATA, dataclasses.replace(EVAL, prompt_style=style)
        )
        assert (record["output"], record["correct"]) == (text, correct)


def test_rouge_is_rouge_score_s_and_takes_the_best_reference(model, reply):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    text = "The cats were running.\nIt rained."
    references = ("A cat runs in the rain.", "The cat ran.\nIt was raining hard.")
    ours = rouge(text, references)
    for name, value in ours.items():
        scores = [scorer.score(reference, text)[name].fmeasure for reference in references]
        assert value == max(scores)
    assert ours["rouge1"] > 0
    reply(text)
    example = Example(
        "Sum up.", references[0], "", input="long", references=references, document=True
    )
    (record,) = generation_records(model, "dialogsum", [example], TASK_DATA, EVAL)
    assert {name: record[name] for name in records_module.ROUGE} == ours and "correct" not in record


def test_rows_without_an_answer_do_not_count(model):
    examples = [Example("Say hello.", "hello", ""), Example("1 + 1?", "The answer is 2.", "2")]
    records = generation_records(model, "rows", examples, TASK_DATA, EVAL)
    assert "correct" not in records[0] and scores_of(records)["accuracy"].mean == float(
        records[1]["correct"]
    )


def test_a_model_without_a_tokenizer_is_refused_before_anything_runs(arc):
    with pytest.raises(ConfigError, match="without a tokenizer"):
        evaluate(RunConfig(model="tiny", data=arc, eval=EVAL), tiny_model(), console=False)


def test_an_answer_that_did_not_stop_by_itself_is_cut(model, reply):
    reply([65, stop_ids(model, "chat")[0]], [65, 66], [])
    examples = [Example(f"{i}?", "x", "1") for i in range(3)]
    records = generation_records(model, "rows", examples, TASK_DATA, EVAL)
    assert [record["cut"] for record in records] == [False, True, True]


# --- stopping and going on ------------------------------------------------------------------------


def test_processes_go_on_from_what_process_0_has_read(model, tmp_path, monkeypatch):
    there = [[i, {"output": i}] for i in range(2)]
    distributed = records_module.distributed
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_process_0", lambda own: there if own is None else own)
    monkeypatch.setattr(records_module, "_read_partial", lambda *_: pytest.fail("process 0 reads"))
    path = tmp_path / "x.partial.jsonl"
    found = records_module._in_batches(pytest.fail, model, [[1], [2]], "", 1, path, lambda _: None)
    assert found == [{"output": 0}, {"output": 1}] and not path.exists()


def test_prompts_that_do_not_fit_are_said_before_the_first_answer(model, monkeypatch):
    """Batches of the longest prompts come last, so all answers would be lost."""
    monkeypatch.setattr(records_module, "generate_tokens", None)  # nothing is generated
    context = model.config.max_position_embeddings
    texts = {"f, row 1": "a", "f, row 2": "a" * context}
    rows = [Example(text, "b", "b", where=where) for where, text in texts.items()]
    with pytest.raises(ConfigError, match=r"^f, row 2 has \d+ tokens; with eval.max_new_tokens=6 "):
        generation_records(model, "rows", rows, TASK_DATA, EVAL)
    long = dataclasses.replace(EVAL, max_new_tokens=context)
    with pytest.raises(ConfigError, match=r"^eval.max_new_tokens=\d+ leaves no room for a prompt"):
        generation_records(model, "rows", rows[:1], TASK_DATA, long)
    # Options are scored without new tokens: a prompt may fill the context but for them.
    full = dataclasses.replace(rows[0], prompt="a" * (context - 60), options=("b", "c"))
    (record,) = likelihood_records(model, [full], TASK_DATA, long)
    assert len(record["log_likelihoods"]) == 2
