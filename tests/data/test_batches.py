"""Batches hold every row of an epoch once, in an order that the seed decides, padded to the
smallest length that fits.
"""

import itertools

import numpy as np
import pytest
from support.byte_tokenizer import PAD

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.pipeline import eval_batches, train_batches
from zflora_jax.data.tasks import Example
from zflora_jax.data.tokenization import (
    Encoded,
    Share,
    TokenizedExample,
    tokenize_examples,
)


def encoded_rows(count, pad_id=PAD):
    """Rows whose only token values are their own index, of lengths 2 to 6."""
    rows = tuple(
        TokenizedExample(
            np.full(2 + i % 5, i, np.int32), np.ones(2 + i % 5, bool), np.ones(2 + i % 5, np.int32)
        )
        for i in range(count)
    )
    return Encoded(rows, tuple(range(count)), 0, pad_id, parts=(count,))


def row_ids(batch):
    return batch["tokens"][:, 0].tolist()


def assert_same_batches(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "loss_mask", "segments"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_long_rows_are_dropped_counted_and_reported(tokenizer, caplog):
    examples = [Example("q", "t" * n, "1") for n in (1, 200, 2, 300)]
    encoded = tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(64, 128)))
    assert (len(encoded), encoded.kept, encoded.dropped, encoded.pad_id) == (2, (0, 2), 2, PAD)
    assert "dropped 2 of 4 examples longer than 128 tokens" in caplog.text
    with pytest.raises(
        ConfigError,
        match=(
            r"all 2 examples are longer.*data.bucket_lengths=\[8\].*data.bucket_lengths=\[8, 64\]"
        ),
    ):
        tokenize_examples(examples[::2], tokenizer, DataConfig(bucket_lengths=(8,)))


def test_processes_have_their_rows_of_one_shape():
    """That of the longest row of all, or their programs differ."""
    encoded, data = encoded_rows(10), DataConfig(batch_size=2, bucket_lengths=(2, 3, 4, 5, 6))
    for whole, *parts in itertools.islice(
        zip(*(train_batches(encoded, data, own=own) for own in (None, [0], [1])), strict=True), 10
    ):
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])


class Watched(list[Example]):
    """Examples that note which of them were read."""

    def __init__(self, examples):
        super().__init__(examples)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_processes_share_the_work_and_get_all_rows(tokenizer):
    """Each reads and tokenises a part; the rows, their order and the counts are those of one."""
    examples = [Example("q", "t" * (7 * n % 60), str(n)) for n in range(9)]
    examples[3] = Example("q", "t" * 300, "1")  # dropped
    examples[7] = Example("q", "t", "1", "words " * 40, document=True)  # cut
    data = DataConfig(bucket_lengths=(128,))
    want, parts = tokenize_examples(examples, tokenizer, data), {}

    class Sent(Exception):
        pass

    def first_time(own):
        parts[len(parts)] = own
        raise Sent

    for index in range(4):
        watched = Watched(examples)
        with pytest.raises(Sent):
            tokenize_examples(watched, tokenizer, data, share=Share(index, 4, first_time))
        assert watched.read == list(Share(index, 4).of(9)), index
    for index in range(4):
        share = Share(index, 4, lambda own, index=index: [*parts.values()])
        found = tokenize_examples(examples, tokenizer, data, share=share)
        assert found.fingerprint() == want.fingerprint() and found.kept == want.kept
        assert (found.dropped, found.truncated, found.parts) == (1, 1, want.parts)
        assert {row.tokens.dtype for row in found.rows} == {np.dtype(np.int32)}


def test_a_row_of_exactly_the_longest_length_stays(tokenizer):
    whole = len(tokenize_examples([Example("q", "t", "1")], tokenizer, DataConfig()).rows[0][0])
    encoded = tokenize_examples(
        [Example("q", "t", "1")], tokenizer, DataConfig(bucket_lengths=(whole,))
    )
    assert next(train_batches(encoded, DataConfig(bucket_lengths=(whole,), batch_size=1)))[
        "segments"
    ].all()


def test_empty_datasets_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="dataset is empty"):
        tokenize_examples([], tokenizer, DataConfig())
    for batches in (lambda e: train_batches(e, DataConfig()), lambda e: eval_batches(e, 4, (8,))):
        with pytest.raises(ConfigError, match="dataset is empty"):
            batches(encoded_rows(0))


@pytest.mark.parametrize("start", [1, 3, 20])
def test_resuming_at_a_step_goes_on_as_if_uninterrupted(start):
    data, encoded = DataConfig(batch_size=4, bucket_lengths=(4, 6), seed=3), encoded_rows(10)
    whole = list(itertools.islice(train_batches(encoded, data), start + 8))
    resumed = list(itertools.islice(train_batches(encoded, data, start_step=start), 8))
    assert_same_batches(whole[start:], resumed)


def test_resuming_late_costs_nothing():
    data, encoded = DataConfig(batch_size=8, bucket_lengths=(8,)), encoded_rows(1000)
    assert next(train_batches(encoded, data, start_step=10**9))["tokens"].shape == (8, 8)


def test_every_epoch_is_another_permutation_of_all_rows():
    data, encoded = DataConfig(batch_size=4, bucket_lengths=(8,)), encoded_rows(10)
    order = [
        i for batch in itertools.islice(train_batches(encoded, data), 10) for i in row_ids(batch)
    ]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed():
    orders = [
        [
            i
            for batch in itertools.islice(
                train_batches(
                    encoded_rows(50), DataConfig(batch_size=5, bucket_lengths=(8,), seed=seed)
                ),
                20,
            )
            for i in row_ids(batch)
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][50:] != orders[2][:50]  # a seed's second epoch is not the next seed's first
    with pytest.raises(ConfigError, match=r"data\.seed=-1"):
        train_batches(encoded_rows(2), DataConfig(seed=-1))


def test_a_dataset_smaller_than_a_batch_repeats():
    batch = next(train_batches(encoded_rows(3), DataConfig(batch_size=8, bucket_lengths=(8,))))
    assert np.bincount(row_ids(batch)).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_batches_are_padded_right_to_the_smallest_length_that_fits():
    encoded = encoded_rows(5)  # lengths 2, 3, 4, 5, 6
    shapes = [batch["tokens"].shape for batch in eval_batches(encoded, 1, (3, 5, 8))]
    assert shapes == [(1, 3), (1, 3), (1, 5), (1, 5), (1, 8)]
    (batch,) = eval_batches(encoded, 5, (3, 5, 8))
    assert (
        batch["tokens"].dtype == batch["segments"].dtype == np.int32
        and batch["loss_mask"].dtype == np.bool_
    )
    assert batch["segments"].sum(1).tolist() == [2, 3, 4, 5, 6]
    for i in range(5):
        assert batch["tokens"][i].tolist() == [i] * (2 + i) + [PAD] * (6 - i)
    assert not batch["loss_mask"][batch["segments"] == 0].any()
    with pytest.raises(ConfigError, match="6 tokens"):
        list(eval_batches(encoded, 5, (3, 5)))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_evaluation_counts_every_row_once_whatever_the_batch_size(batch_size):
    batches = list(eval_batches(encoded_rows(7), batch_size, (8,)))
    assert all(batch["tokens"].shape == (batch_size, 8) for batch in batches)
    counted = [
        i
        for batch in batches
        for i, counts in zip(row_ids(batch), batch["loss_mask"].any(1), strict=True)
        if counts
    ]
    assert counted == list(range(7))
    # Also the filling rows have something to attend to.
    assert all(batch["segments"].any(1).all() for batch in batches)
