"""Preference tuning: pairs, loss and gradients are those of TRL's DPOTrainer with PEFT; runs of
pairs start at ln 2, learn, resume, and are evaluated without a wrong loss.
"""

import contextlib
import json
import math
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from support.byte_tokenizer import byte_tokenizer
from support.chat import CHATML, LONG, SHORT, WITH_SYSTEM, turn
from support.exports import perturbed_adapters
from support.huggingface import hf_model
from support.models import tiny_model
from support.runs import quiet_train
from support.tasks import load, write

from zflora_jax import (
    AdapterConfig,
    ConfigError,
    Llama,
    OptimConfig,
    fuse,
    init_adapters,
    load_model,
    override,
    quantize_model,
    save_peft,
)
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.encoding import _pair, tokenize_examples
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.task import evaluate
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.objective import DirectPreference
from zflora_jax.training.trainer import TrainStep, eval_step, init_state

DPO = DirectPreference(beta=0.3, chunk=50)  # chunks do not divide what is learned
GOOD, BAD = [turn("assistant", "It is 4.")], [turn("assistant", "It is 22, I think.")]
TURNS = [
    {"prompt": LONG[:1], "chosen": GOOD, "rejected": BAD},
    {"prompt": WITH_SYSTEM[:4], "chosen": BAD, "rejected": GOOD},
    {"prompt": SHORT[:1], "chosen": SHORT[1:], "rejected": BAD},
]
TEXTS = [
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " eleven"},
    {"prompt": "The sky is", "chosen": " blue, mostly.", "rejected": " black."},
]
SHARED = [{"chosen": LONG[:1] + GOOD, "rejected": LONG[:1] + BAD}]
IMPLICIT = [
    {"chosen": "Q: 1 + 1\n\nA: 2", "rejected": "Q: 1 + 1\n\nA: I do not know"},
    {"chosen": "Two.", "rejected": "I do not know."},  # no prompt: nothing predicts a first token
    {"chosen": "Q: 2, A: 4", "rejected": "Q: 2, A: 4, or so"},  # one is the beginning of the other
]


def encoded(folder, *rows, template=CHATML, **data):
    write(folder / "test.jsonl", *rows)
    settings = DataConfig(task="rows", data_dir=str(folder), **{"bucket_lengths": (512,), **data})
    examples = load("rows", "test", folder)
    return tokenize_examples(examples, byte_tokenizer(chat_template=template), settings, pairs=True)


def batch_of(rows):
    (batch,) = eval_batches(rows, len(rows), (512,))
    return DPO.take(batch)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(The base's folder, the model, its adapter's config, perturbed adapters)."""
    path = tmp_path_factory.mktemp("base")
    hf_model(max_position_embeddings=512).save_pretrained(path)
    model, adapter = load_model(path), AdapterConfig("lora", rank=4, alpha=6.0)
    return path, model, adapter, perturbed_adapters(model, adapter)


def trl_trainer(path, rows, folder):
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        import datasets
        import trl

        datasets.disable_progress_bars()
        lora = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        off = {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False}
        return trl.DPOTrainer(
            hf_model(max_position_embeddings=512),
            args=trl.DPOConfig(output_dir=str(folder), beta=DPO.beta, **off),
            train_dataset=datasets.Dataset.from_list(json.loads(json.dumps(rows))),
            processing_class=byte_tokenizer(chat_template=CHATML),
            peft_config=lora,
        )


def named(folder, model, adapter, tree):
    """Adapters, or what is linear in them, by PEFT's names."""
    save_peft(folder, model, adapter, tree)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "rows", [TURNS, TEXTS, SHARED, IMPLICIT], ids=["turns", "texts", "shared turns", "shared text"]
)
def test_trl_learns_the_same(rows, lora, tmp_path):
    path, model, adapter, adapters = lora
    trainer = trl_trainer(path, rows, tmp_path / "trl")
    inputs = trainer.data_collator(list(trainer.train_dataset))
    batch = batch_of(encoded(tmp_path, *rows))
    for i in range(len(rows)):
        for segment, at in ((1, i), (2, len(rows) + i)):
            mine, real = batch["segments"][i] == segment, inputs["attention_mask"][at].bool()
            assert batch["tokens"][i][mine].tolist() == inputs["input_ids"][at][real].tolist()
            mask = inputs["completion_mask"][at][real].bool().tolist()
            assert batch["loss_mask"][i][mine].tolist()[1:] == mask[1:]

    weights = named(tmp_path / "adapters", model, adapter, adapters)
    found = {name: torch.tensor(x) for name, x in weights.items()}
    result = peft.set_peft_model_state_dict(trainer.model, found)
    assert not result.unexpected_keys
    loss = trainer.compute_loss(trainer.model.eval(), inputs)
    loss.backward()
    loss = loss.item()

    def mean(adapters):
        variables = {"params": model.params, "adapters": adapters}
        sums = DPO(model.config, adapter, variables, batch)
        return sums.loss / sums.divisor, sums

    (ours, sums), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(adapters)
    assert abs(loss - math.log(2)) > 1e-3  # the adapters do something
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    (metrics,) = (x for key, x in trainer._metrics.items() if x)
    for name, theirs in (("reward_margin", "margins"), ("reward_accuracy", "accuracies")):
        value = float(sums.metrics[name] / sums.divisor)
        np.testing.assert_allclose(value, metrics[f"rewards/{theirs}"][0], rtol=1e-5, atol=1e-5)
    theirs = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    grads = named(tmp_path / "grads", model, adapter, grads)
    assert theirs.keys() == grads.keys()
    scale = max(np.abs(x).max() for x in theirs.values())
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, theirs[name], rtol=1e-5, atol=1e-5 * scale)


def test_the_sums_are_those_of_plain_log_probabilities(lora, tmp_path):
    """By a log-softmax of all logits of each sequence alone, with the divergence."""
    _, model, adapter, adapters = lora
    batch = batch_of(encoded(tmp_path, *TURNS))
    variables = {"params": model.params, "adapters": adapters}
    gains, kl = np.zeros((len(TURNS), 2)), np.zeros((len(TURNS), 2))
    learned = np.zeros(len(TURNS))
    for i, (tokens, mask, segments) in enumerate(
        zip(batch["tokens"], batch["loss_mask"], batch["segments"], strict=True)
    ):
        for side in (0, 1):
            alone, of = tokens[None, segments == side + 1], mask[segments == side + 1][1:]
            ours, base = (
                np.asarray(jax.nn.log_softmax(Llama(model.config, a).apply(v, alone)[0, :-1]))
                for a, v in ((adapter, variables), (None, {"params": model.params}))
            )
            at = np.flatnonzero(of), alone[0, 1:][of]
            gains[i, side] = np.sum(ours[at] - base[at])
            kl[i, side] = np.sum((np.exp(ours) * (ours - base))[of])
            learned[i] += of.sum()
    sums = eval_step(model.config, adapter, variables, batch, DPO)
    margins = DPO.beta * (gains[:, 0] - gains[:, 1])
    assert np.abs(margins).max() > 1e-1 and kl.min() > 1e-3
    want = np.sum(np.logaddexp(0, -margins))
    np.testing.assert_allclose(sums.loss, want, rtol=1e-5)
    np.testing.assert_allclose(sums.metrics["reward_margin"], margins.sum(), rtol=1e-4)
    np.testing.assert_allclose(sums.metrics["kl"], (kl.sum(1) / learned).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "kernels"),
    [("zflora-minimal", "int8"), ("zflora-uniform", "none"), ("ffa", "none"), ("full", "none")],
)
def test_the_base_is_the_reference(method, kernels, tmp_path):
    """Any method starts at ln 2 and gets a gradient there, also on a quantised base."""
    model = tiny_model(vocab_size=512, max_position_embeddings=256)
    adapter = AdapterConfig(method, **({} if method == "full" else {"rank": 4}))
    if kernels != "none":
        model = quantize_model(model, QuantizeConfig(kernels=kernels))
    batch = batch_of(encoded(tmp_path, *TEXTS))
    adapters = init_adapters(jax.random.key(0), model, adapter)

    def loss(adapters):
        variables = {"params": model.params, "adapters": adapters}
        sums = DPO(model.config, adapter, variables, batch)
        return sums.loss / sums.divisor, sums.metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    # Of sums of 200 nats in float32, which XLA may add up in another order in each pass.
    np.testing.assert_allclose(value, math.log(2), atol=1e-5, rtol=0)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-5)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(grads)) > 1e-4


@pytest.mark.parametrize("method", ["lora", "zflora-uniform"])
def test_a_step_in_bfloat16_begins_at_ln_2(method, tmp_path):
    """XLA rounds both forward passes alike, though it joins other operations in each."""
    model = tiny_model(vocab_size=512, num_layers=3, dtype="bfloat16")
    adapter = AdapterConfig(method, rank=4)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OptimConfig(), 20)
    step = TrainStep(model.config, adapter, OptimConfig(), 20, DPO).jitted()
    _, metrics = step(model.params, state, batch_of(encoded(tmp_path, *TEXTS)))
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-6)
    assert metrics["reward_accuracy"] == metrics["reward_margin"] == 0


@pytest.fixture
def pairs_run(run, tmp_path):
    rows = [
        {"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " I do not know."}
        for i in range(11)  # the last batch is filled up
    ]
    for name in ("train", "test"):
        write(tmp_path / "rows" / f"{name}.jsonl", *rows)
    data = {
        "data.task": "rows",
        "data.data_dir": str(tmp_path / "rows"),
        "data.train_limit": None,
        "eval.limit": None,
    }
    train = {"train.loss": "dpo", "train.steps": 6, "train.save_every": 3, "train.log_every": 1}
    return override(run, data | train | {"optim.learning_rate": 3e-2})


def test_a_run_of_pairs(pairs_run, tmp_path):
    found = quiet_train(pairs_run, tmp_path / "a")
    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    first = next(record for record in records if record["step"] == 1)
    np.testing.assert_allclose(first["loss"], math.log(2), rtol=1e-6)
    assert first["pairs"] == pairs_run.data.batch_size and first["reward_accuracy"] == 0
    report = found.report
    assert report["test_loss"] < 0.6 and report["test_reward_accuracy"] == 1
    assert report["test_kl"] > 0 and report["test_rows"] == 11

    # Fused or merged there is no reference: no loss instead of ln 2.
    fused = fuse(found.model, pairs_run.adapter, found.adapters)
    result = evaluate(pairs_run, fused, console=False)
    assert "loss" not in result and result["rows"] == 11
    assert result["likelihood_sum"] == 1 and result["chance"] == 0.5  # the likelier answer
    rows = encoded(tmp_path / "rows", *TEXTS)
    with pytest.raises(ConfigError, match="ln 2"):
        held_out_loss(pairs_run, fused, rows)


def test_answers_are_learned_from_where_one_differs_from_the_prompt():
    """A tokenizer may join the end of the prompt with the beginning of one answer, as TRL does."""
    mask = np.arange(6)
    row = _pair((mask, mask >= 4), (mask + 10, mask >= 3), 64)
    assert row.tokens.tolist() == [*range(6), *range(10, 16)]
    assert row.loss_mask.tolist() == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert row.segments.tolist() == [1] * 6 + [2] * 6


def test_long_pairs_are_cut_and_counted(tmp_path, caplog):
    long = {"prompt": "12345", "chosen": "a" * 90, "rejected": "b" * 20}
    both = {"prompt": "12345", "chosen": "a" * 90, "rejected": "b" * 80}
    prompt = {"prompt": "1" * 70, "chosen": "a", "rejected": "b"}
    alike = {"prompt": "1", "chosen": "a" * 60 + "b", "rejected": "a" * 60 + "c"}
    found = encoded(tmp_path, long, both, prompt, alike, TEXTS[0], bucket_lengths=(100,))
    sizes = [np.bincount(row.segments, minlength=3)[1:].tolist() for row in found.rows]
    assert sizes[:2] == [[100 - 26, 26], [50, 50]]  # the shorter answer and its end stay whole
    assert found.dropped == 2 and found.truncated == 2 and len(found) == 3
    assert "cut 2 of 5 pairs to 100 tokens in all" in caplog.text
    assert "dropped 2 of 5" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "the text to learn is empty"),
        ({"prompt": "a", "chosen": GOOD, "rejected": "b"}, "'chosen' must be a string, got list"),
        ({"prompt": "Why?", **SHARED[0]}, "'prompt' differs from the turns"),
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": "a", "completion": "b"}, "has no 'rejected' answer"),
        ({"chosen": LONG[:1] + GOOD, "rejected": SHORT}, "have different prompts"),
        ({"prompt": LONG[:1], "chosen": LONG[:1] + GOOD, "rejected": BAD}, "different prompts"),
    ],
)
def test_what_is_no_pair_is_refused(row, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        encoded(tmp_path, row)


def test_a_prompt_may_stand_beside_whole_conversations(tmp_path):
    """As UltraFeedback has them; and pairs are no rows for cross-entropy."""
    row = {"prompt": LONG[0]["content"], **SHARED[0], "messages": SHARED[0]["chosen"]}
    with_prompt, without = encoded(tmp_path, row), encoded(tmp_path, *SHARED)
    np.testing.assert_array_equal(with_prompt.rows[0].tokens, without.rows[0].tokens)
    examples = load("rows", "test", tmp_path)
    with pytest.raises(ConfigError, match=r"train\.loss=dpo learns from"):
        tokenize_examples(examples, byte_tokenizer(), DataConfig(bucket_lengths=(256,)))
