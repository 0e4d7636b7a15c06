"""How a token is chosen: greedy, temperature, top_k and top_p against plain references and
transformers; what depends on the seed; wrong settings.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from support.models import untied

from zflora_jax import Sampler, generate_tokens
from zflora_jax.ops.sampling import NON_FINITE, greedy


def test_greedy_takes_the_first_of_the_largest() -> None:
    draw = np.random.default_rng(0)
    logits = draw.integers(-3, 4, (40, 50)).astype(np.float32)  # many ties
    logits[3], logits[4, :30] = -np.inf, -np.inf
    np.testing.assert_array_equal(greedy(jnp.asarray(logits)), logits.argmax(axis=-1))


@pytest.mark.parametrize(
    "sampler",
    [Sampler(), Sampler(0.8), Sampler(0.8, 5), Sampler(0.8, None, 0.9), Sampler(0.8, 5, 0.9)],
    ids=str,
)
def test_a_row_whose_logits_are_not_numbers_is_told_apart(sampler: Sampler) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    logits[1], logits[3, 20], logits[4, 20], logits[5, 20] = np.nan, np.nan, -np.nan, np.inf
    tokens = np.asarray(sampler(jnp.asarray(logits), jax.random.split(jax.random.key(0), 6)))
    assert tokens.dtype == np.int32 and (tokens[[1, 3, 4, 5]] == NON_FINITE).all()
    assert (tokens[[0, 2]] >= 0).all()


def test_a_vocabulary_is_cut_as_in_float64() -> None:
    """At the size that the bisection is for: the kept probability reaches top_p, and without its
    least member it does not.
    """
    logits = np.random.default_rng(1).normal(0, 3, (3, 49152)).astype(np.float32)
    for share in (0.1, 0.9, 0.99):
        values = np.asarray(Sampler(1.0, top_p=share).cut(jnp.asarray(logits))[0])
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(axis=-1, keepdims=True)
        for row, cut in zip(p, values, strict=True):
            held = row[np.isfinite(cut)]
            assert held.sum() > share - 1e-5 and held.sum() - held.min() < share + 1e-5
            assert held.min() > row[~np.isfinite(cut)].max()


def kept(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """[V] bool: the tokens that the sampler could draw."""
    values, tokens = sampler.cut(jnp.asarray(logits, jnp.float32)[None])
    found = np.zeros(len(logits), bool)
    found[np.arange(len(logits)) if tokens is None else np.asarray(tokens[0])] = np.isfinite(
        values[0]
    )
    return found


def reference(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[np.ndarray, float]:
    """Probabilities [V] after temperature, then top_k, then top_p; and how close (in probability)
    top_p came to keeping one token more or less.
    """
    x, margin = logits.astype(np.float64) / temperature, 1.0
    order = np.argsort(-x, kind="stable")
    if top_k is not None:
        x[order[top_k:]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p is not None and top_p < 1:
        before = np.cumsum(p[order]) - p[order]  # probability of the tokens likelier than this one
        margin = np.abs(before - top_p).min()
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p, margin


WIDTH = 12
logits_of = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(0, 3, WIDTH).astype(np.float32)
)
cuts = {
    "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    "top_k": st.sampled_from([None, 1, 2, 5, 11, 12, 50]),
    "top_p": st.none() | st.floats(0.01, 1),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(logits=logits_of, **cuts)
def test_the_kept_tokens_are_the_reference_s_and_transformers(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """The same order of cuts: temperature, top_k, top_p."""
    import torch
    from transformers.generation import logits_process as process

    p, margin = reference(logits, temperature, top_k, top_p)
    assume(margin > 1e-5)  # else float32 and float64 may disagree about the last token
    found = kept(Sampler(temperature, top_k, top_p), logits)
    np.testing.assert_array_equal(found, p > 0)
    scores = process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
    if top_k is not None:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None and top_p < 1:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    np.testing.assert_array_equal(found, torch.isfinite(scores[0]).numpy())


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(1.0),
        Sampler(0.6, top_k=4),
        Sampler(1.7, top_p=0.8),
        Sampler(1.3, top_k=6, top_p=0.7),
    ],
)
def test_frequencies_of_draws(sampler: Sampler) -> None:
    draws, logits = 40_000, np.random.default_rng(5).normal(0, 1.5, WIDTH).astype(np.float32)
    p, _ = reference(logits, sampler.temperature, sampler.top_k, sampler.top_p)
    keys = jax.random.split(jax.random.key(11), draws)
    tokens = np.asarray(sampler(jnp.broadcast_to(jnp.asarray(logits), (draws, WIDTH)), keys))
    assert tokens.dtype == np.int32
    frequency = np.bincount(tokens, minlength=WIDTH) / draws
    assert (frequency[p == 0] == 0).all()
    assert (np.abs(frequency - p) <= 4.5 * np.sqrt(p * (1 - p) / draws)).all()


def test_draws_depend_on_the_seed_and_the_prompt_s_place_alone() -> None:
    model, sampler = untied(), Sampler(3.0, top_k=40, top_p=0.95)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 256, n).tolist() for n in (3, 14, 8, 1, 11)]
    prompts[3] = prompts[0]

    def run(prompts: list[list[int]], seed: int = 0, size: int = 16) -> list[list[int]]:
        settings = {"max_new_tokens": 16, "stop_token_ids": (), "sampler": sampler}
        return generate_tokens(model, prompts, seed=seed, batch_size=size, **settings)

    answers = run(prompts)
    assert answers == run(prompts) == run(prompts, size=1) == run(prompts, size=2)
    assert answers[0] != answers[3], "the same prompt twice is drawn twice"
    others = [prompts[0], [7], rng.integers(0, 256, 16).tolist(), [9, 9], prompts[4]]
    changed = run(others)
    assert (changed[0], changed[4]) == (answers[0], answers[4]) and changed[1] != answers[1]
    assert all(a != b for a, b in zip(answers, run(prompts, seed=1), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-39}, "temperature=1e-39: must be at least 0"),  # logits over it
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0: must be within \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5: must be within \(0, 1\]"),
        ({"top_k": 5}, "need a temperature above 0"),
        ({"top_p": 0.9}, "need a temperature above 0"),
    ],
    ids=str,
)
def test_sampler_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)
