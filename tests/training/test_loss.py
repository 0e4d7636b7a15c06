"""The chunked loss is the plain one, in values and gradients, and never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import equations
from support.models import perturb, tiny_model

from zflora_jax import AdapterConfig, init_adapters
from zflora_jax.training.loss import masked_cross_entropy
from zflora_jax.training.objective import CrossEntropy

B, T, D, V = 3, 14, 8, 21
POSITIONS = B * (T - 1)
CHUNKS = (1, 7, 16, 1000)  # 7 and 16 do not divide the 39 positions, 1000 holds them all
COMPLETIONS = np.arange(T)[None] >= np.asarray([4, 9, 13])[:, None]
MASKS = {
    "none": np.zeros((B, T), bool),
    "one": np.arange(B * T).reshape(B, T) == T + 5,
    "last": np.arange(T) == T - 1 | np.zeros((B, T), int),
    "first": np.arange(T) == 0 | np.zeros((B, T), int),  # nothing predicts it: it never counts
    "completions": COMPLETIONS,
    "all": np.ones((B, T), bool),
    "any": np.random.default_rng(1).random((B, T)) < 0.4,
}


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [B, T, d], head [d, V], tokens [B, T]."""
    rng = np.random.default_rng(0)
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
) -> tuple[jax.Array, jax.Array]:
    return masked_cross_entropy(lambda x: head_logits(head, x), hidden, tokens, mask, chunk)


PLAIN = jax.jit(jax.value_and_grad(plain_loss, argnums=(0, 1)))
CHUNKED = jax.jit(jax.value_and_grad(chunked_loss, argnums=(0, 1), has_aux=True), static_argnums=4)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_the_plain_loss_in_values_and_gradients(mask, chunk):
    hidden, head, tokens = inputs()
    want, want_grads = PLAIN(hidden, head, tokens, mask)
    (got, count), got_grads = CHUNKED(hidden, head, tokens, mask, chunk)
    assert got.dtype == count.dtype == jnp.float32 and float(count) == mask[:, 1:].sum()
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(got_grad, want_grad, rtol=1e-5, atol=2e-6)


def test_positions_that_do_not_count_get_no_gradient_and_may_hold_anything():
    """Padding's hidden states may be large, or give a NaN logit; neither may leak."""
    hidden, head, tokens = inputs()
    whole, (grad, _) = CHUNKED(hidden, head, tokens, COMPLETIONS, 7)
    reached = np.abs(np.asarray(grad)).max(axis=-1) > 0
    np.testing.assert_array_equal(reached[:, :-1], COMPLETIONS[:, 1:])  # hidden t-1 predicts t
    assert not reached[:, -1].any()
    spoiled = hidden.at[0, 0].set(jnp.nan)
    found = CHUNKED(spoiled, head, tokens, COMPLETIONS, 1)[0][0]
    np.testing.assert_allclose(found, whole[0], rtol=1e-6)
    assert np.isfinite(CHUNKED(1e4 * hidden, head, tokens, COMPLETIONS, 7)[0][0])  # large logits


def test_a_chunk_is_at_most_a_quarter_of_the_positions_or_256():
    given = []

    def logits_fn(x: jax.Array) -> jax.Array:
        given.append(x.shape[1])
        return x

    for positions in (60, 800, 2047):
        row = jnp.ones((1, positions + 1))
        masked_cross_entropy(logits_fn, row[..., None], row.astype(int), row > 0, 1000)
    assert list(dict.fromkeys(given)) == [60, 256, 512]


# --- the logits of a batch never exist at one time ------------------------------------------------


def sizes(function: object, *args: object) -> set[int]:
    """Number of elements of every value in a function's jaxpr, inner ones included."""
    values = (v for e in equations(jax.make_jaxpr(function)(*args).jaxpr) for v in e.outvars)
    return {int(np.prod(v.aval.shape)) for v in values if hasattr(v.aval, "shape")}


@pytest.mark.parametrize("method", ["zflora-minimal", "full"])
def test_a_training_gradient_never_holds_all_logits(method):
    """Model, adapters and loss together, forward and backward: no value with the vocabulary in its
    shape is larger than the tied head itself, frozen or trained. The textbook form's is.
    """
    hidden, head, known = inputs()
    plain = jax.grad(plain_loss, argnums=(0, 1))
    assert max(sizes(plain, hidden, head, known, MASKS["all"])) >= POSITIONS * V
    # A prime: only sizes that hold the vocabulary are its multiples.
    batch, length, chunk, vocab = (2, 160, 16, 4099)
    model = tiny_model(num_layers=1, vocab_size=vocab)
    adapter = AdapterConfig(method, rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    tokens = jnp.ones((batch, length), jnp.int32)
    data = {"tokens": tokens, "segments": tokens, "loss_mask": tokens > 0}

    def loss(adapters):
        variables = {"params": model.params, "adapters": adapters}
        return CrossEntropy(chunk)(model.config, adapter, variables, data).loss

    found = sizes(jax.grad(loss), adapters)
    with_vocabulary = {n // vocab for n in found if n % vocab == 0 and n}
    assert chunk in with_vocabulary
    assert max(with_vocabulary) <= model.config.hidden_size < batch * length, with_vocabulary
