"""Log-likelihoods of options equal their definition, a full forward over prompt and option; wrong
input is refused.
"""

from typing import Any

import jax
import numpy as np
import pytest
from support.models import narrow_and_wide, tiny_model

from zflora_jax import ConfigError, Model, forward
from zflora_jax.inference import likelihood
from zflora_jax.inference.likelihood import feed_pieces, option_log_likelihoods

Rows = tuple[list[list[int]], list[list[list[int]]]]
WIDTH = 48  # every sequence here fits: one shape, one compilation of the reference


def ids(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, n).tolist()


def definition(model: Model, prompts: Any, options: Any) -> list[np.ndarray]:
    """float64 log_softmax of a forward over prompt + option, summed at the option's tokens."""
    pairs = [(p, option) for p, row in zip(prompts, options, strict=True) for option in row]
    tokens = np.zeros((-(-len(pairs) // 8) * 8, WIDTH), np.int32)
    for line, (prompt, option) in zip(tokens, pairs, strict=False):
        # Padding on the right: causal attention never sees it.
        line[: len(prompt) + len(option)] = [*prompt, *option]
    parts = [jax.nn.log_softmax(forward(model, part)) for part in tokens.reshape(-1, 8, WIDTH)]
    log_p = np.concatenate(parts)
    sums = iter(
        sum(float(row[len(prompt) + n - 1, token]) for n, token in enumerate(option))
        for row, (prompt, option) in zip(log_p, pairs, strict=False)
    )
    return [np.asarray([next(sums) for _ in row]) for row in options]


def assert_same(got: list[np.ndarray], want: list[np.ndarray], tolerance: float = 1e-4) -> None:
    assert [g.shape for g in got] == [w.shape for w in want] and all(
        g.dtype == np.float32 for g in got
    )
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), rtol=0, atol=tolerance)


def one_token_ends() -> Rows:
    """As "the correct answer is answer" + "1".."4": one call per batch."""
    return [ids(n, n) for n in (9, 3, 20)], [
        [ids(5, 90) + [t] for t in (49, 50, 51, 52)[:n]] for n in (4, 4, 3)
    ]


def mixed() -> Rows:
    """Every way in which options can differ, in one list: none of them in common, one a prefix of
    another, equal ones, single ones, short, long.
    """
    start = ids(4, 91)
    options = [
        [ids(3, 1), ids(6, 2), ids(1, 3)],
        [start, start + [7], start + [7, 8, 9], start + [5]],
        [start + [7, 8], start + [7, 8]],
        [ids(19, 4)],
        [[5]],
        [[5], [6], [5, 6]],
        [start + ids(n, seed) for n, seed in ((11, 5), (2, 6), (5, 7), (1, 8), (9, 9))],
    ]
    return [ids(n, 10 + n) for n in (7, 12, 1, 25, 16, 17, 2)], options


def model_of(**changes: Any) -> Model:
    return tiny_model(seed=1, tie_word_embeddings=False, **changes)


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scan", "tied"), [(True, False), (False, True)], ids=["scanned", "unrolled and tied"]
)
def test_equals_the_definition(scan: bool, tied: bool) -> None:
    model = tiny_model(seed=1, scan_layers=scan, tie_word_embeddings=tied)
    for prompts, options in (one_token_ends(), mixed()):
        want = definition(model, prompts, options)
        assert np.ptp(np.concatenate(want)) > 5, "options hardly differ: a weak comparison"
        assert_same(option_log_likelihoods(model, prompts, options), want)


def test_a_bfloat16_model_gives_what_its_float32_numbers_do() -> None:
    """By the definition, but for rounding: rows of a bfloat16 cache are gathered and written by
    their bits.
    """
    narrow, wide = narrow_and_wide(tie_word_embeddings=False)
    prompts, options = mixed()
    got, want = (
        np.concatenate(of)
        for of in (
            option_log_likelihoods(narrow, prompts, options),
            definition(wide, prompts, options),
        )
    )
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_a_prompt_is_run_once_for_all_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompts, options), fed = model_of(), mixed(), []

    def counted(*args: Any) -> Any:
        fed.append(int(args[5].sum()))
        return feed_pieces(*args)

    monkeypatch.setattr(likelihood, "feed_pieces", counted)
    option_log_likelihoods(model, prompts, options)
    once = sum(map(len, prompts)) + sum(len(o) for row in options for o in row)
    assert sum(map(len, prompts)) < sum(fed) < once


def test_batch_size_and_order_do_not_matter() -> None:
    model, (prompts, options) = model_of(), mixed()
    want = definition(model, prompts, options)
    for size in (1, 3, 16):
        assert_same(option_log_likelihoods(model, prompts, options, batch_size=size), want)
    shuffled = np.random.default_rng(0).permutation(len(prompts))
    got = option_log_likelihoods(
        model, [prompts[i] for i in shuffled], [options[i][::-1] for i in shuffled], batch_size=3
    )
    assert_same(got, [want[i][::-1] for i in shuffled])


def test_bounds_of_memory_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options in calls of a batch's size; the head over one position at a time."""
    # A config that no other test compiles with the other bounds.
    model, (prompts, options) = model_of(max_position_embeddings=500), mixed()
    want, sizes = definition(model, prompts, options), []

    def counted(*args: Any) -> Any:
        sizes.append(len(args[3]))
        return feed_pieces(*args)

    monkeypatch.setattr(likelihood, "HEAD_POSITIONS", 1)
    monkeypatch.setattr(likelihood, "feed_pieces", counted)
    assert_same(option_log_likelihoods(model, prompts, options, batch_size=4), want)
    assert len(sizes) > 2 and max(sizes) == 4


def test_a_full_context_iterators_numpy_ids_and_no_prompts_are_fine() -> None:
    model = model_of(max_position_embeddings=20)
    arrays = [np.asarray(ids(16, 1))], [[np.asarray(ids(4, 2)), np.asarray(ids(3, 3))]]
    assert_same(option_log_likelihoods(model, *map(iter, arrays)), definition(model, *arrays))
    assert option_log_likelihoods(model, [], []) == []


def test_all_lengths_take_few_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and options of up to 120 tokens: four lengths of prompts, five of options."""
    model, shapes = model_of(), set()

    def counted(config: Any, params: Any, past: Any, parents: Any, tokens: Any, *_: Any) -> Any:
        slots = None if past is None else past.shape[1]
        shapes.add((slots, *tokens.shape))
        return np.zeros((*tokens.shape, 1)), np.zeros((1, tokens.shape[1] + (slots or 0)))

    monkeypatch.setattr(likelihood, "feed_pieces", counted)
    monkeypatch.setattr(likelihood, "token_log_p", lambda *args: np.zeros(args[3].shape))
    monkeypatch.setattr(likelihood, "gathered", np.asarray)
    for seed in range(8):
        lengths = np.random.default_rng(seed).integers(2, 121, (40, 4))
        prompts = [ids(n, i) for i, n in enumerate(lengths[:, 0])]
        options = [[ids(n, n) for n in row] for row in lengths[:, 1:]]
        option_log_likelihoods(model, prompts, options, batch_size=8)
    prompted = {shape[2] for shape in shapes if shape[0] is None}
    assert prompted == {32, 64, 96, 128}
    continued = {(slots, length) for slots, _, length in shapes if slots}
    assert continued <= {(slots, n) for slots in prompted for n in (16, *prompted)}
    assert {rows for _, rows, _ in shapes} == {8}


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], [[[1]], [[1]]], r"prompt 1 is empty: .*at least one token"),
        ([[1], [2]], [[[1]], []], r"prompt 1 has no options"),
        ([[1]], [[[1], []]], r"option 1 of prompt 0 is empty"),
        ([[1]], [], r"1 prompts and 0 lists of options: expected one list for each prompt"),
        ([[259]], [[[1]]], r"prompt 0 holds token ids outside 0\.\.258: is this the model's own"),
        ([[1]], [[[1], [-1, 2]]], r"option 1 of prompt 0 holds token ids outside 0\.\.258"),
        ([[1] * 510], [[[1], [1, 2, 3]]], r"its option 1 have 513 tokens, 510 \+ 3; .* holds 512"),
        (["What?"], [[[1]]], r"prompt 0 is 'What\?': expected a list of token ids"),
        ([[1]], [[1, 2]], r"option 0 of prompt 0 is 1: expected a list of token ids"),
    ],
    ids=["prompt", "none", "option", "counts", "large", "negative", "long", "text", "no list"],
)
def test_wrong_input_is_refused(prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        option_log_likelihoods(tiny_model(), prompts, options)
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        option_log_likelihoods(tiny_model(), [[1]], [[[1]]], batch_size=0)
