"""Packed rows, mixtures of tasks and documents that are cut to fit."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import PAD, byte_tokenizer
from support.models import perturb, tiny_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.encoding import encode_prompts, fit_documents
from zflora_jax.data.mixture import load_mixture, parse_mixture
from zflora_jax.data.packing import pack_sequences
from zflora_jax.data.pipeline import eval_batches, pad, train_batches
from zflora_jax.data.tasks import Example
from zflora_jax.data.tokenization import Encoded, TokenizedExample, tokenize_examples
from zflora_jax.nn.llama import forward
from zflora_jax.nn.positions import segment_positions
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import eval_step


def random_rows(count, longest, seed=0, vocab=200):
    """Rows of 2 to `longest` tokens whose loss is on a random part of them."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest + 1, count)
    return tuple(
        TokenizedExample(
            draw.integers(1, vocab, n).astype(np.int32), draw.random(n) < 0.7, np.ones(n, np.int32)
        )
        for n in lengths
    )


# --- packing --------------------------------------------------------------------------------------


def test_segment_positions_start_anew():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]], jnp.int32)
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 0, 1, 2]]


def test_packing_keeps_every_row_whole_and_fills_well():
    rows = random_rows(300, 40)
    packed = pack_sequences(Encoded(rows, tuple(range(300)), 0, PAD, parts=(200, 100)), 64)
    assert (
        all(len(row.tokens) <= 64 for row in packed.rows) and sum(packed.parts) == len(packed) < 130
    )
    for (start, stop), (first, last) in zip(
        ((0, 200), (200, 300)), ((0, packed.parts[0]), (packed.parts[0], len(packed))), strict=True
    ):
        pieces = [
            row.tokens[row.segments == s].tobytes()
            for row in packed.rows[first:last]
            for s in range(1, row.segments.max() + 1)
        ]
        # Each task in rows of its own.
        assert sorted(pieces) == sorted(row.tokens.tobytes() for row in rows[start:stop])
    tokens = sum(len(row.tokens) for row in rows)
    assert len(packed) <= 1.1 * tokens / 64
    assert (
        pack_sequences(Encoded(rows, (), 0, PAD, parts=(200, 100)), 64).fingerprint()
        == packed.fingerprint()
    )


@pytest.mark.parametrize(
    "adapter",
    [
        None,
        AdapterConfig("lora", rank=6, alpha=9.0),
        AdapterConfig("zflora-uniform", rank=6, alpha=9.0),
    ],
    ids=str,
)
def test_the_packed_loss_is_the_loss_of_the_rows_apart(adapter):
    """Also where the loss is on the first token of a row: nothing predicts it, packed or not."""
    model = tiny_model()
    variables = {"params": model.params}
    if adapter is not None:
        variables["adapters"] = perturb(init_adapters(jax.random.key(0), model, adapter), 1)
    rows = tuple(
        row._replace(loss_mask=np.ones_like(row.loss_mask)) if i % 2 else row
        for i, row in enumerate(random_rows(7, 20))
    )
    encoded = Encoded(rows, tuple(range(7)), 0, PAD, parts=(7,))
    packed = pack_sequences(encoded, 48)
    assert len(packed) < 4
    apart = [
        eval_step(model.config, adapter, variables, batch, CrossEntropy(16))[:2]
        for batch in eval_batches(encoded, 7, (48,))
    ]
    joined = [
        eval_step(model.config, adapter, variables, batch, CrossEntropy(16))[:2]
        for batch in eval_batches(packed, len(packed), (48,))
    ]
    (loss, count), (packed_loss, packed_count) = (
        tuple(float(sum(x)) for x in zip(*sums, strict=True)) for sums in (apart, joined)
    )
    assert packed_count == count
    assert packed_loss == pytest.approx(loss, rel=1e-5)


def test_packed_logits_do_not_see_other_segments():
    model = tiny_model()
    rows = random_rows(3, 12, seed=4)
    packed = pack_sequences(Encoded(rows, (0, 1, 2), 0, PAD, parts=(3,)), 40).rows[0]
    batch = pad([packed], (40,), PAD)
    logits = np.asarray(forward(model, batch["tokens"], segment_ids=batch["segments"]))[0]
    for segment in (1, 2, 3):
        own = packed.tokens[packed.segments == segment]
        found = logits[: len(packed.tokens)][packed.segments == segment]
        np.testing.assert_allclose(found, np.asarray(forward(model, own[None]))[0], atol=2e-5)


# --- mixtures -------------------------------------------------------------------------------------


@pytest.fixture
def two_tasks(tmp_path):
    """Train files of 40 and 200 rows that both gsm8k and json can read, plus their directory."""
    rows = [
        {"question": f"How many in box {i}?", "answer": f"There are {i}.\n#### {i}"}
        for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(data_dir=str(tmp_path), bucket_lengths=(256,))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("gsm8k", (("gsm8k",), None)),
        ("gsm8k + rows", (("gsm8k", "rows"), None)),
        ("gsm8k*1+json*2.5", (("gsm8k", "rows"), (1.0, 2.5))),
    ],
)
def test_mixtures_parse(text, parsed):
    assert parse_mixture(text) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm8q+json", "did you mean 'gsm8k'"),
        ("gsm8k+", "expected a task, or a mixture"),
        ("", "expected a task, or a mixture"),
        ("gsm8k+gsm8k", "names a task twice"),
        ("gsm8k*2+json", "weights for some tasks only"),
        ("gsm8k*0+json*1", "weight '0' is not a positive number"),
        ("gsm8k*x+json*1", "weight 'x' is not a positive number"),
        ("gsm8k*inf+json*1", "weight 'inf' is not a positive number"),
    ],
)
def test_wrong_mixtures(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mixture(text)


def test_a_mixture_is_its_tasks_one_after_the_other(two_tasks):
    from dataclasses import replace

    data = replace(two_tasks, task="gsm8k+json")
    mixture = load_mixture(data, "train")
    single = load_mixture(replace(data, task="gsm8k"), "train")
    assert len(mixture) == 2 * len(single) and [e.prompt for e in mixture] == 2 * [
        e.prompt for e in single
    ]
    assert mixture[-1].prompt == single[len(single) - 1].prompt and [
        e.prompt for e in mixture[3:5]
    ] == [e.prompt for e in single[3:5]]
    with pytest.raises(IndexError):
        mixture[len(mixture)]
    assert [len(part) for part in load_mixture(data, "train", limit=5).parts] == [2, 3] or [
        len(part) for part in load_mixture(data, "train", limit=5).parts
    ] == [3, 2]
    assert len(load_mixture(data, "train", limit=1)) == 1


def test_weights_set_how_often_a_task_is_drawn():
    """Two tasks of 10 and 1000 rows at 1 to 3; resuming goes on as if uninterrupted."""
    rows = tuple(
        TokenizedExample(np.full(2, int(i >= 10), np.int32), np.ones(2, bool), np.ones(2, np.int32))
        for i in range(1010)
    )
    encoded = Encoded(rows, tuple(range(1010)), 0, PAD, parts=(10, 1000), weights=(1.0, 3.0))
    data = DataConfig(batch_size=4, bucket_lengths=(2,), seed=1)
    batches = [
        batch["tokens"][:, 0] for batch in itertools.islice(train_batches(encoded, data), 50)
    ]
    assert np.mean(np.concatenate(batches)) == pytest.approx(0.75, abs=0.01)
    resumed = [
        batch["tokens"][:, 0] for batch in itertools.islice(train_batches(encoded, data, 20), 30)
    ]
    np.testing.assert_array_equal(np.stack(resumed), np.stack(batches[20:]))


def test_parts_count_the_rows_that_are_left(two_tasks):
    from dataclasses import replace

    data = replace(two_tasks, task="gsm8k*1+json*1")
    longest = max(
        len(row.tokens)
        for row in tokenize_examples(load_mixture(data, "train"), byte_tokenizer(), data).rows
    )
    encoded = tokenize_examples(
        load_mixture(data, "train"), byte_tokenizer(), replace(data, bucket_lengths=(longest - 1,))
    )
    assert (
        0 < encoded.dropped < 64
        and sum(encoded.parts) == len(encoded)
        and encoded.parts[0] == encoded.parts[1]
    )
    assert encoded.weights == (1.0, 1.0)


# --- documents ------------------------------------------------------------------------------------


def test_documents_are_cut_and_targets_never(caplog):
    tokenizer = byte_tokenizer()
    text = "".join(f"Line {i}: é. " for i in range(30))
    examples = [
        Example("Sum up.", "A summary.", "", input=text, document=True),
        Example("Short?", "Yes.", "", input="x", document=True),
    ]
    data = DataConfig(bucket_lengths=(64, 128))
    encoded = tokenize_examples(examples, tokenizer, data)
    assert (encoded.truncated, encoded.dropped, encoded.kept) == (1, 0, (0, 1))
    assert "cut 1 of 2 documents" in caplog.text
    tokens, mask, _ = encoded.rows[0]
    assert 120 < len(tokens) <= 128
    assert bytes(tokens[mask][:-1].tolist()) == b"A summary."
    prompt = bytes(
        t for t in tokens[~mask].tolist() if t < 256
    ).decode()  # valid UTF-8: no half of a character is left
    assert "Sum up.\n\nLine 0: é. Line 1" in prompt and "[assistant]" in prompt

    cut, same = fit_documents(examples, tokenizer, "chat", 100)
    (short,) = encode_prompts([cut], tokenizer, "chat")
    assert 90 < len(short) <= 100 and same is examples[1]


def test_an_example_whose_target_alone_is_too_long_is_dropped():
    examples = [
        Example("Sum up.", "t" * 200, "", input="text " * 20, document=True),
        Example("Q", "t", ""),
    ]
    encoded = tokenize_examples(examples, byte_tokenizer(), DataConfig(bucket_lengths=(128,)))
    assert (encoded.truncated, encoded.dropped, encoded.kept) == (0, 1, (1,))
