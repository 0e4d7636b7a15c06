"""The chunked loss is the plain one, in values and gradients, and never holds all logits; the
optimizer does what its settings say.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from support.models import perturb, tiny_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.run_config import OptimConfig
from zflora_jax.training.loss import masked_cross_entropy
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.optim import learning_rate_schedule, make_optimizer

B, T, D, V = 3, 14, 8, 21
POSITIONS = B * (T - 1)
CHUNKS = (1, 7, 16, 1000)  # 7 and 16 do not divide the 39 positions, 1000 holds them all


def inputs(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [B, T, d], head [d, V], tokens [B, T]."""
    rng = np.random.default_rng(seed)
    head = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def head_logits(head: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("BTd,dV->BTV", x, head)


def plain_loss(hidden: jax.Array, head: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The textbook form: all logits, log-softmax, pick, mask, sum."""
    log_p = jax.nn.log_softmax(head_logits(head, hidden[:, :-1]), axis=-1)
    picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(picked * mask[:, 1:].astype(jnp.float32))


def chunked_loss(
    hidden: jax.Array, head: jax.Array, tokens: jax.Array, mask: jax.Array, chunk: int
) -> jax.Array:
    return masked_cross_entropy(lambda x: head_logits(head, x), hidden, tokens, mask, chunk)[0]


PLAIN = jax.jit(jax.value_and_grad(plain_loss, argnums=(0, 1)))
CHUNKED = jax.jit(jax.value_and_grad(chunked_loss, argnums=(0, 1)), static_argnums=4)


def masks() -> dict[str, np.ndarray]:
    none, one, last = (np.zeros((B, T), bool) for _ in range(3))
    one[1, 5] = True
    last[:, -1] = True
    first = np.zeros((B, T), bool)
    first[:, 0] = True  # nothing predicts the first token, so it never counts
    completions = np.arange(T)[None] >= np.asarray([4, 9, 13])[:, None]
    return {
        "none": none,
        "one": one,
        "last": last,
        "first": first,
        "completions": completions,
        "all": np.ones((B, T), bool),
    }


def assert_same(mask: np.ndarray, chunk: int, seed: int = 0) -> None:
    hidden, head, tokens = inputs(seed)
    (want, want_grads), (got, got_grads) = (
        PLAIN(hidden, head, tokens, mask),
        CHUNKED(hidden, head, tokens, mask, chunk),
    )
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(got_grad, want_grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", masks())
def test_equals_the_plain_loss_in_values_and_gradients(name, chunk):
    assert_same(masks()[name], chunk)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.booleans(), min_size=B * T, max_size=B * T),
    st.sampled_from(CHUNKS),
    st.integers(0, 3),
)
def test_any_mask(bits, chunk, seed):
    assert_same(np.asarray(bits).reshape(B, T), chunk, seed)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_counts_the_tokens_that_are_predicted(chunk):
    hidden, head, tokens = inputs()
    for name, mask in masks().items():
        total, count = masked_cross_entropy(
            lambda x: head_logits(head, x), hidden, tokens, jnp.asarray(mask), chunk
        )
        assert total.dtype == count.dtype == jnp.float32 and float(count) == mask[:, 1:].sum(), name
        assert (float(total) == 0) == (mask[:, 1:].sum() == 0), name


def test_positions_that_do_not_count_get_no_gradient():
    hidden, head, tokens = inputs()
    mask = masks()["completions"]
    _, (grad, _) = CHUNKED(hidden, head, tokens, mask, 7)
    reached = np.abs(np.asarray(grad)).max(axis=-1) > 0
    np.testing.assert_array_equal(reached[:, :-1], mask[:, 1:])  # hidden t-1 predicts token t
    assert not reached[:, -1].any()


def test_a_position_that_does_not_count_may_hold_anything():
    """Padding's hidden states are not zero and may be large; they must not leak, and neither may a
    NaN logit through a zero weight.
    """
    hidden, head, tokens = inputs()
    mask = masks()["completions"]
    spoiled = hidden.at[0, 0].set(jnp.nan)
    np.testing.assert_array_equal(
        CHUNKED(spoiled, head, tokens, mask, 1)[0], CHUNKED(hidden, head, tokens, mask, 1)[0]
    )


def test_large_logits_do_not_overflow():
    hidden, head, tokens = inputs()
    assert np.isfinite(chunked_loss(1e4 * hidden, head, tokens, jnp.asarray(masks()["all"]), 7))


# --- the logits of a batch never exist at one time ------------------------------------------------


def sizes(jaxpr: object) -> set[int]:
    """Number of elements of every value in a jaxpr, inner ones included."""
    found: set[int] = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found.update(
                int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")
            )
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    if hasattr(inner, "eqns"):
                        walk(inner)
                    elif hasattr(inner, "jaxpr"):
                        walk(inner.jaxpr)

    walk(jaxpr)
    return found


def test_the_walk_sees_all_logits_of_the_plain_loss():
    """The checks below can fail: the textbook form does hold B * (T-1) * V elements."""
    hidden, head, tokens = inputs()
    jaxpr = jax.make_jaxpr(jax.grad(plain_loss, argnums=(0, 1)))(
        hidden, head, tokens, masks()["all"]
    )
    assert max(sizes(jaxpr.jaxpr)) >= POSITIONS * V


@pytest.mark.parametrize("chunk", [1, 4])
def test_no_value_is_as_large_as_the_logits(chunk):
    """Forward and backward, also with respect to the head; nor is the head itself kept once per
    chunk.
    """
    hidden, head, tokens = inputs()
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda h, w: chunked_loss(h, w, tokens, jnp.asarray(masks()["all"]), chunk),
            argnums=(0, 1),
        )
    )(hidden, head)
    found = sizes(jaxpr.jaxpr)
    assert chunk * V in found and max(found) <= max(B * T * D, D * V), sorted(found)[-3:]


def test_a_whole_training_gradient_never_holds_all_logits():
    """Model, adapters and loss together, forward and backward: no value with the vocabulary in its
    shape is larger than the tied head itself.
    """
    # A prime: only sizes that hold the vocabulary are its multiples.
    batch, length, chunk, vocab = (
        2,
        160,
        16,
        4099,
    )
    model, adapter = (
        tiny_model(num_layers=1, vocab_size=vocab),
        AdapterConfig("zflora-minimal", rank=4),
    )
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    data = {"loss_mask": jnp.ones((batch, length), bool)} | {
        n: jnp.ones((batch, length), jnp.int32) for n in ("tokens", "segments")
    }
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda a: (
                CrossEntropy(chunk)(
                    model.config, adapter, {"params": model.params, "adapters": a}, data
                ).loss
            )
        )
    )(adapters)
    with_vocabulary = {n // vocab for n in sizes(jaxpr.jaxpr) if n % vocab == 0 and n}
    assert chunk in with_vocabulary
    assert max(with_vocabulary) <= model.config.hidden_size < batch * length, with_vocabulary


# --- optimizer ------------------------------------------------------------------------------------


def rates(steps: int, **changes: object) -> list[float]:
    schedule = learning_rate_schedule(OptimConfig(**changes), steps)  # type: ignore[arg-type]
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(step)) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_a_part_to_the_peak(schedule):
    values = rates(30, schedule=schedule, learning_rate=0.8, warmup_steps=8)
    np.testing.assert_allclose(values[0], 0.1, rtol=1e-6)
    np.testing.assert_allclose(np.diff(values[:9]), (0.8 - 0.1) / 8, rtol=1e-5)
    np.testing.assert_allclose(values[8], 0.8, rtol=1e-6)
    assert max(values) <= 0.8 * (1 + 1e-6)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_decay_ends_at_the_final_fraction(schedule, middle, end, warmup):
    values = rates(
        warmup + 20,
        schedule=schedule,
        learning_rate=2.0,
        warmup_steps=warmup,
        final_lr_fraction=0.1,
    )
    np.testing.assert_allclose(
        [values[warmup], values[warmup + 10], values[-1]], [2.0, 2.0 * middle, 2.0 * end], rtol=1e-5
    )
    assert all(a >= b - 1e-6 for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))


def test_cosine_is_a_cosine():
    values = rates(40, schedule="cosine", learning_rate=1.0, warmup_steps=0)
    np.testing.assert_allclose(values, (1 + np.cos(np.pi * np.arange(41) / 40)) / 2, atol=1e-6)


def one_update(optim: OptimConfig, params: trees.Tree, grads: trees.Tree) -> trees.Tree:
    with jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(optim, 10)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return updates


def test_weight_decay_skips_norm_gains_and_biases():
    params = {
        "final_norm": {"scale": jnp.ones(4)},
        "layers": {
            "attn_norm": {"scale": jnp.ones((2, 4))},
            "attn": {
                "q": {
                    "kernel": jnp.ones((2, 4, 3)),
                    "forward": jnp.ones((2, 4, 3)),
                    "bias": jnp.ones((2, 3)),
                }
            },
        },
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    optim = OptimConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5)
    for name, update in trees.flatten(one_update(optim, params, zero)).items():
        np.testing.assert_allclose(
            update, 0.0 if name.endswith(("scale", "bias")) else -0.05, rtol=1e-6, err_msg=name
        )


def test_adam_first_step_is_the_learning_rate_in_sign():
    params = {"a": jnp.zeros(3)}
    updates = one_update(
        OptimConfig(learning_rate=0.1, warmup_steps=0, clip_norm=None),
        params,
        {"a": jnp.asarray([3.0, -0.2, 0.0])},
    )
    np.testing.assert_allclose(updates["a"], [-0.1, 0.1, 0.0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("clip", [1.0, None])
def test_lora_plus_ratio_is_of_the_blocks_that_write_to_the_base(clip):
    names = ("lora_a", "lora_b", "forward", "backward", "cross")
    params = {"layers": {"attn": {"q": {name: jnp.zeros(2) for name in names}}}}
    grads = jax.tree.map(jnp.ones_like, params)
    optim = OptimConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=clip)
    plain, plus = (
        trees.flatten(one_update(replace(optim, loraplus_ratio=ratio), params, grads))
        for ratio in (1.0, 4.0)
    )
    for name, update in plain.items():
        np.testing.assert_allclose(
            plus[name],
            update * (4 if name.endswith(("lora_b", "backward")) else 1),
            rtol=1e-6,
            err_msg=name,
        )


@pytest.mark.parametrize("clip", [0.5, 2.0, None])
def test_gradients_are_clipped_by_their_global_norm(clip):
    """Seen through Adam's first moment, which is (1 - b1) * clipped gradient after one step."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.asarray([0.6, 0.0]), "b": jnp.asarray([0.8])}  # norm 1
    with jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(OptimConfig(clip_norm=clip, b1=0.5), 10_000)
        _, state = optimizer.update(grads, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    factor = min(1.0, clip or 1.0)
    np.testing.assert_allclose(
        np.concatenate([moment["a"], moment["b"]]),
        0.5 * factor * np.asarray([0.6, 0.0, 0.8]),
        rtol=1e-6,
    )


def test_a_chunk_is_no_longer_than_what_there_is():
    """A larger loss_chunk costs neither products nor memory."""
    hidden, head, tokens = inputs()
    given = []

    def logits_fn(x: jax.Array) -> jax.Array:
        given.append(x.shape[1])
        return head_logits(head, x)

    masked_cross_entropy(logits_fn, hidden, tokens, jnp.ones((B, T), bool), 1000)
    assert set(given) == {POSITIONS}
    one_token = hidden[:, :1], tokens[:, :1], jnp.ones((B, 1), bool)
    assert [float(x) for x in masked_cross_entropy(logits_fn, *one_token, 1000)] == [0.0, 0.0]
