"""Examples to batches: sequences that are dropped, cut or packed, mixtures of tasks, and batches in
an order that the seed decides, padded to the smallest length that fits.
"""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from support.byte_tokenizer import PAD, byte_tokenizer
from support.models import perturb, tiny_model
from support.tasks import write

from zflora_jax import AdapterConfig, ConfigError, DataConfig, init_adapters
from zflora_jax.data.encoding import (
    Encoded,
    TokenizedSequence,
    encode_prompts,
    fit_documents,
    tokenize_examples,
)
from zflora_jax.data.mixture import load_mixture, parse_mixture
from zflora_jax.data.pipeline import eval_batches, pack_sequences, train_batches
from zflora_jax.data.tasks import Example
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import eval_step


def sequence(tokens, mask=None):
    ones = np.ones(len(tokens), np.int32)
    mask = ones.astype(bool) if mask is None else mask
    return TokenizedSequence(np.asarray(tokens, np.int32), mask, ones)


def encoded_rows(count):
    """Rows whose only token values are their own index, of lengths 2 to 6."""
    rows = tuple(sequence([i] * (2 + i % 5)) for i in range(count))
    return Encoded(rows, 0, PAD, parts=(count,))


def random_rows(count, longest, seed=0):
    """Rows of 2 to `longest` tokens whose loss is on a random part of them."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest + 1, count)
    return tuple(sequence(draw.integers(1, 200, n), draw.random(n) < 0.7) for n in lengths)


def first(batches, count):
    return list(itertools.islice(batches, count))


def row_ids(batches):
    return [i for batch in batches for i in batch["tokens"][:, 0].tolist()]


def assert_same_batches(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "loss_mask", "segments"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# --- sequences ------------------------------------------------------------------------------------


def test_long_rows_are_dropped_counted_and_reported(tokenizer, caplog):
    examples = [Example("q", "t" * n, "1") for n in (1, 200, 2, 300)]
    encoded = tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(64, 128)))
    assert (len(encoded), encoded.dropped, encoded.pad_id) == (2, 2, PAD)
    assert [int(row.loss_mask.sum()) for row in encoded.rows] == [2, 3]
    assert "dropped 2 of 4 examples longer than 128 tokens" in caplog.text
    whole = len(encoded.rows[0].tokens)  # a row of exactly the longest length stays
    assert len(tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(whole,)))) == 1
    message = r"all 2 examples are longer.*data.bucket_lengths=\[8\].*data.bucket_lengths=\[8, 64\]"
    with pytest.raises(ConfigError, match=message):
        tokenize_examples(examples[::2], tokenizer, DataConfig(bucket_lengths=(8,)))
    for empty in (
        lambda: tokenize_examples([], tokenizer, DataConfig()),
        lambda: train_batches(encoded_rows(0), DataConfig()),
        lambda: eval_batches(encoded_rows(0), 4, (8,)),
    ):
        with pytest.raises(ConfigError, match="dataset is empty"):
            empty()


def test_documents_are_cut_and_targets_never(caplog):
    tokenizer, data = byte_tokenizer(), DataConfig(bucket_lengths=(64, 128))
    text = "".join(f"Line {i}: é. " for i in range(30))
    examples = [
        Example("Sum up.", "A summary.", input=text, document=True),
        Example("Short?", "Yes.", input="x", document=True),
        Example("Sum up.", "t" * 200, input="text " * 20, document=True),  # the target alone
    ]
    encoded = tokenize_examples(examples, tokenizer, data)
    assert (encoded.truncated, encoded.dropped, len(encoded)) == (1, 1, 2)
    assert "cut 1 of 3 documents" in caplog.text
    tokens, mask, _ = encoded.rows[0]
    assert 120 < len(tokens) <= 128 and bytes(tokens[mask][:-1].tolist()) == b"A summary."
    # Valid UTF-8: no half of a character is left.
    prompt = bytes(t for t in tokens[~mask].tolist() if t < 256).decode()
    assert "Sum up.\n\nLine 0: é. Line 1" in prompt and "[assistant]" in prompt
    cut, same, _ = fit_documents(examples, tokenizer, "chat", 100)
    (short,) = encode_prompts([cut], tokenizer, "chat")
    assert 90 < len(short) <= 100 and same is examples[1]


# --- batches --------------------------------------------------------------------------------------


def test_processes_have_their_rows_of_one_shape():
    """That of the longest row of all, or their programs differ."""
    encoded, data = encoded_rows(10), DataConfig(batch_size=2, bucket_lengths=(2, 3, 4, 5, 6))
    whole, *parts = (first(train_batches(encoded, data, own=x), 10) for x in (None, [0], [1]))
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)
    ]
    assert_same_batches(whole, joined)


def test_resuming_at_a_step_goes_on_as_if_uninterrupted():
    data, encoded = DataConfig(batch_size=4, bucket_lengths=(4, 6), seed=3), encoded_rows(10)
    whole = first(train_batches(encoded, data), 28)
    for start in (1, 3, 20):
        again = first(train_batches(encoded, data, start_step=start), 8)
        assert_same_batches(whole[start : start + 8], again)
    late = next(train_batches(encoded, data, start_step=10**9))  # at no cost
    assert len(late["tokens"]) == 4


def test_every_epoch_of_a_seed_is_another_permutation_of_all_rows():
    data = DataConfig(batch_size=4, bucket_lengths=(8,))

    def order(count, **changes):
        return row_ids(first(train_batches(encoded_rows(count), replace(data, **changes)), 10))

    epochs = [order(10)[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order(20, seed=0) == order(20) != order(20, seed=1)
    assert order(20)[20:] != order(20, seed=1)[:20]  # the next seed does not go on where one ends
    few = order(3, batch_size=8)[:8]  # a dataset smaller than a batch repeats
    assert sorted(np.bincount(few)) == [2, 3, 3]


def test_batches_are_padded_right_to_the_smallest_length_that_fits():
    encoded = encoded_rows(5)  # lengths 2, 3, 4, 5, 6
    shapes = [batch["tokens"].shape for batch in eval_batches(encoded, 1, (3, 5, 8))]
    assert shapes == [(1, 3), (1, 3), (1, 5), (1, 5), (1, 8)]
    (batch,) = eval_batches(encoded, 5, (3, 5, 8))
    types = {name: x.dtype for name, x in batch.items()}
    assert types == {"tokens": np.int32, "loss_mask": np.bool_, "segments": np.int32}
    assert batch["segments"].sum(1).tolist() == [2, 3, 4, 5, 6]
    assert batch["tokens"].tolist() == [[i] * (2 + i) + [PAD] * (6 - i) for i in range(5)]
    assert not batch["loss_mask"][batch["segments"] == 0].any()
    with pytest.raises(ConfigError, match="6 tokens"):
        list(eval_batches(encoded, 5, (3, 5)))


def test_evaluation_counts_every_row_once_whatever_the_batch_size():
    for batch_size in (1, 3, 7, 16):
        batches = list(eval_batches(encoded_rows(7), batch_size, (8,)))
        assert all(batch["tokens"].shape == (batch_size, 8) for batch in batches)
        counts = [counts for batch in batches for counts in batch["loss_mask"].any(1)]
        assert [i for i, c in zip(row_ids(batches), counts, strict=True) if c] == list(range(7))
        # Also the filling rows have something to attend to.
        assert all(batch["segments"].any(1).all() for batch in batches)


# --- packing --------------------------------------------------------------------------------------


def test_packing_keeps_every_row_whole_and_fills_well():
    rows = random_rows(300, 40)
    encoded = Encoded(rows, 0, PAD, parts=(200, 100))
    packed = pack_sequences(encoded, 64)
    assert all(len(row.tokens) <= 64 for row in packed.rows)
    assert sum(packed.parts) == len(packed) <= 1.1 * sum(len(row.tokens) for row in rows) / 64
    at = packed.parts[0]
    for ours, theirs in ((packed.rows[:at], rows[:200]), (packed.rows[at:], rows[200:])):
        pieces = [
            row.tokens[row.segments == s].tobytes()
            for row in ours
            for s in range(1, row.segments.max() + 1)
        ]
        # Each task in rows of its own.
        assert sorted(pieces) == sorted(row.tokens.tobytes() for row in theirs)
    assert pack_sequences(encoded, 64).fingerprint() == packed.fingerprint()


@pytest.mark.parametrize("method", [None, "zflora-uniform"])
def test_the_packed_loss_is_the_loss_of_the_separate_rows(method):
    """Also where the loss is on the first token of a row: nothing predicts it, packed or not."""
    model = tiny_model()
    adapter = method and AdapterConfig(method, rank=6, alpha=9.0)
    variables = {"params": model.params}
    if adapter:
        variables["adapters"] = perturb(init_adapters(jax.random.key(0), model, adapter), 1)
    rows = random_rows(7, 20)
    rows = tuple(sequence(row.tokens) if i % 2 else row for i, row in enumerate(rows))
    encoded = Encoded(rows, 0, PAD, parts=(7,))
    packed = pack_sequences(encoded, 48)
    assert len(packed) < 4
    (loss, count), (packed_loss, packed_count) = (
        eval_step(model.config, adapter, variables, batch, CrossEntropy(16))[:2]
        for found in (encoded, packed)
        for batch in eval_batches(found, len(found), (48,))
    )
    assert packed_count == count
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-5)


# --- mixtures -------------------------------------------------------------------------------------


@pytest.fixture
def two_tasks(tmp_path):
    """Settings of a mixture of 40 rows of gsm8k with the same rows as one's own."""
    rows = [{"question": f"In box {i}?", "answer": f"There are {i}.\n#### {i}"} for i in range(40)]
    for folder in (tmp_path, tmp_path / "gsm8k"):
        write(folder / "train.jsonl", *rows)
    return DataConfig("gsm8k+rows", data_dir=str(tmp_path), bucket_lengths=(256,))


def test_mixtures_parse():
    assert parse_mixture("gsm8k") == (("gsm8k",), None)
    assert parse_mixture("gsm8k + rows") == (("gsm8k", "rows"), None)
    assert parse_mixture("gsm8k*1+rows * 2.5") == (("gsm8k", "rows"), (1.0, 2.5))
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        parse_mixture("gsm8q+rows")
    same, some, none = "gsm8k+gsm8k", "gsm8k*2+rows", "gsm8k*0+rows*1"
    for text in ("", "gsm8k+", same, some, none, "gsm8k*x+rows*1", "gsm8k*inf+rows*1"):
        with pytest.raises(ConfigError, match="expected a task, or a mixture of different tasks"):
            parse_mixture(text)


def test_a_mixture_is_its_tasks_one_after_the_other(two_tasks):
    mixture = load_mixture(two_tasks, "train")
    single = [e.prompt for e in load_mixture(replace(two_tasks, task="gsm8k"), "train")]
    assert [e.prompt for e in mixture] == 2 * single and len(single) == 32
    assert mixture[-1].prompt == single[-1] and mixture[32].prompt == single[0]
    assert [e.prompt for e in mixture[30:34]] == single[30:] + single[:2]
    with pytest.raises(IndexError):
        mixture[len(mixture)]
    limited = load_mixture(two_tasks, "train", limit=5)
    assert sorted(map(len, limited.parts)) == [2, 3]
    assert len(load_mixture(two_tasks, "train", limit=1)) == 1
    few = load_mixture(replace(two_tasks, train_limit=2), "train", limit=70)
    assert [*map(len, few.parts)] == [2, 2]


def test_weights_set_how_often_a_task_is_drawn(two_tasks):
    """Two tasks of 10 and 1000 rows at 1 to 3; resuming goes on as if uninterrupted."""
    rows = tuple(sequence([int(i >= 10)] * 2) for i in range(1010))
    encoded = Encoded(rows, 0, PAD, parts=(10, 1000), weights=(1.0, 3.0))
    data = DataConfig(batch_size=4, bucket_lengths=(2,), seed=1)
    batches = first(train_batches(encoded, data), 50)
    assert np.mean(row_ids(batches)) == pytest.approx(0.75, abs=0.01)
    assert_same_batches(first(train_batches(encoded, data, 20), 30), batches[20:])
    # Parts count the rows that are left.
    mixture = load_mixture(replace(two_tasks, task="gsm8k*1+rows*1"), "train")
    tokenizer = byte_tokenizer()
    whole = tokenize_examples(mixture, tokenizer, two_tasks)
    longest = max(len(row.tokens) for row in whole.rows)
    some = tokenize_examples(mixture, tokenizer, replace(two_tasks, bucket_lengths=(longest - 1,)))
    assert 0 < some.dropped < 64 and sum(some.parts) == len(some)
    assert some.parts[0] == some.parts[1] and some.weights == (1.0, 1.0)
