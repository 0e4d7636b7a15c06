"""What a backward pass keeps; RoPE tables; tied logits; DoRA. Attention: test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import tiny_model

from zflora_jax import AdapterConfig, Llama, init_adapters, preset
from zflora_jax.adapters.kernel_adapter import DoRA
from zflora_jax.adapters.methods import fused_config
from zflora_jax.nn.layers import Dense


@pytest.mark.parametrize("method", ["lora", "zflora-minimal", "zflora-uniform"])
def test_the_backward_pass_of_a_layer_keeps_its_streams_alone(method):
    """Per position: the residual before attention and before the MLP, queries, keys, values, what
    attention gives, gate and up, of LoRA the seven products with A; norms, softmax and gates are
    computed again.
    """
    head = 16 if method == "zflora-uniform" else None
    model, adapter = tiny_model(num_layers=3), AdapterConfig(method, rank=4, extra_head_dim=head)
    adapters, positions = init_adapters(jax.random.key(0), model, adapter), 2 * 13
    tokens = jnp.ones((2, 13), jnp.int32)

    def hidden(adapters):
        variables = {"params": model.params, "adapters": adapters}
        return Llama(model.config, adapter).apply(variables, tokens, method="hidden")[0]

    c = fused_config(model.config, adapter)
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    low_rank = 7 * adapter.rank if method == "lora" else 0
    want = 2 * c.hidden_size + heads + 2 * c.intermediate_size + low_rank
    kept = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(hidden, a)[1], adapters))
    floats = [leaf for leaf in kept if leaf.shape[:1] == (3,) and leaf.dtype == jnp.float32]
    sizes = [leaf.size for leaf in floats if leaf.size % (3 * positions) == 0]
    assert sum(sizes) == 3 * positions * want


@pytest.mark.parametrize("length", [1, 2048], ids=["one token a row", "sequences"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bfloat16_heads_round_no_logit_to_bfloat16(tied: bool, length: int) -> None:
    """Against float64: logits are float32's, and the likeliest token is the same wherever float32
    can tell it from the next. Rounded to bfloat16, several would often share the first place.
    """
    config = preset("tiny").replace(tie_word_embeddings=tied, dtype="bfloat16", vocab_size=2000)
    draw, width = np.random.default_rng(0), config.hidden_size
    x, table = (jnp.asarray(draw.standard_normal((n, width)), jnp.bfloat16) for n in (2048, 2000))
    head = {"embed": {"embedding": table}} | ({} if tied else {"lm_head": {"kernel": table.T}})
    got = Llama(config).apply({"params": head}, x.reshape(-1, length, width), method="logits")
    assert got.dtype == jnp.float32
    got = np.asarray(got, np.float64).reshape(2048, -1)
    want = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    rounding = 1e-6 * np.abs(want).max()
    assert np.abs(got - want).max() <= rounding
    second, first = np.sort(want, axis=1)[:, -2:].T
    told = first - second > 2 * rounding
    assert told.mean() > 0.99 and (got.argmax(1) == want.argmax(1))[told].all()
    assert ((got == got.max(1, keepdims=True)).sum(1) == 1)[told].all()
    narrow = np.asarray(want, jnp.bfloat16)
    shared = (narrow == narrow.max(1, keepdims=True)).sum(1) > 1
    assert shared.mean() > 0.01  # so this test can fail


def test_gradient_of_magnitudes_in_bfloat16() -> None:
    """A sum over all tokens: added up in bfloat16 it is 2% off."""
    dense = Dense((64,), (64,), DoRA((64,), (64,), 1.5, 6))
    keys = jax.random.split(jax.random.key(0), 5)
    kernel, a, b = (
        0.1 * jax.random.normal(k, s)
        for k, s in zip(keys[:3], ((64, 64), (64, 6), (6, 64)), strict=True)
    )
    x, towards = (jax.random.normal(key, (8, 512, 64)) for key in keys[3:])

    def gradient(dtype: str) -> jax.Array:
        def loss(magnitude: jax.Array) -> jax.Array:
            given = {"lora_a": a, "lora_b": b, "magnitude": magnitude}
            variables = {"params": {"kernel": kernel.astype(dtype)}, "adapters": given}
            y, _ = dense.apply(variables, x.astype(dtype))
            return jnp.sum((y * (towards + 0.3).astype(dtype)).astype(jnp.float32))

        return jax.jit(jax.grad(loss))(1.003 * jnp.linalg.norm(kernel, axis=0))

    exact = gradient("float32")
    assert jnp.linalg.norm(gradient("bfloat16") - exact) < 0.006 * jnp.linalg.norm(exact)
