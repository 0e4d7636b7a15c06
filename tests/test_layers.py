"""Attention in bfloat16, over long sequences and for cuDNN; what a backward pass keeps; RoPE
tables; tied logits. That attention equals the plain formula: test_ops.py.
"""

import warnings

import jax
import jax.export
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import compiled
from support.models import attention_inputs, tiny_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import fused_config
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import preset
from zflora_jax.nn.llama import Llama, forward
from zflora_jax.ops import attention as attention_ops
from zflora_jax.ops.attention import attention, query_blocks
from zflora_jax.ops.head import head_logits
from zflora_jax.ops.remat import REMAT_POLICY
from zflora_jax.parallel.devices import widest_cudnn_head, widest_head


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    q, keys, values, mask = attention_inputs()
    weights = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def gradients(dtype):
        arrays = [jnp.asarray(x, dtype) for x in (q, keys, values)]
        return jax.grad(
            lambda *a: jnp.sum(attention(*a, mask, 0.3).astype(jnp.float32) * weights), (0, 1, 2)
        )(*arrays)

    for a, b in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


def test_long_sequences_never_hold_all_scores():
    assert [query_blocks(n) for n in (1, 1024, 1536, 2048, 8192)] == [1, 1, 3, 4, 16]
    assert query_blocks(1031) == 1  # a prime
    shapes = ((1, 8192, 4, 8), (1, 2, 8, 8192), (1, 2, 8192, 8))
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    mask = jax.ShapeDtypeStruct((1, 1, 8192, 8192), bool)
    step = jax.jit(
        jax.grad(lambda q, k, v, mask: jnp.sum(attention(q, k, v, mask, 0.3)), (0, 1, 2))
    )
    memory = compiled(step.lower(q, k, v, mask)).memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 8192 * 8192 * 4 / 2  # half of one copy of the scores


def test_blocks_do_not_change_a_model(monkeypatch, tokens):
    model = tiny_model()
    whole = forward(model, tokens[:, :8])
    monkeypatch.setattr(attention_ops, "query_blocks", lambda _: 4)
    jax.clear_caches()
    np.testing.assert_allclose(forward(model, tokens[:, :8]), whole, atol=1e-5)
    jax.clear_caches()


@pytest.mark.parametrize("method", ["lora", "zflora-minimal", "zflora-uniform"])
def test_the_backward_pass_of_a_layer_keeps_its_streams_alone(method):
    """Per position: the residual before attention and before the MLP, queries, keys, values, what
    attention gives, gate and up, of LoRA the seven products with A; norms, softmax and gates are
    computed again.
    """
    model, adapter = (
        tiny_model(num_layers=3),
        AdapterConfig(method, rank=4, extra_head_dim=None if method != "zflora-uniform" else 16),
    )
    adapters, batch, length = init_adapters(jax.random.key(0), model, adapter), 2, 13
    tokens = jnp.ones((batch, length), jnp.int32)

    def hidden(adapters):
        return Llama(model.config, adapter).apply(
            {"params": model.params, "adapters": adapters}, tokens, method="hidden"
        )[0]

    c = fused_config(model.config, adapter)
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    want = (
        2 * c.hidden_size
        + heads
        + 2 * c.intermediate_size
        + (7 * adapter.rank if method == "lora" else 0)
    )
    kept = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(hidden, a)[1], adapters))
    sizes = [
        leaf.size
        for leaf in kept
        if leaf.shape[:1] == (3,)
        and leaf.size % (3 * batch * length) == 0
        and leaf.dtype == jnp.float32
    ]
    assert sum(sizes) == 3 * batch * length * want


def test_what_cudnn_is_given_is_the_same_attention():
    """By the same function's plain implementation, since cuDNN needs a GPU; a query that attends to
    nothing is nobody's business there.
    """
    q, keys, values, mask = attention_inputs(T=12, S=16)

    def loss(f):
        return lambda *a: jnp.sum(jnp.sin(f(*a, mask, 0.3)))

    def theirs(*a):
        return attention_ops.fused_attention(*a, implementation="xla")

    np.testing.assert_allclose(
        theirs(q, keys, values, mask, 0.3), attention(q, keys, values, mask, 0.3), atol=2e-6
    )
    got, want = (jax.grad(loss(f), (0, 1, 2))(q, keys, values) for f in (theirs, attention))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "slots", "dtype", "takes"),
    [
        ((2, 64, 6, 64), 64, "bfloat16", True),
        ((2, 64, 6, 80), 96, "float16", True),
        ((2, 64, 6, 64), 64, "float32", False),
        ((2, 1, 6, 64), 64, "bfloat16", False),  # a token of the decode loop
        ((2, 63, 6, 64), 64, "bfloat16", False),
        ((2, 64, 6, 64), 63, "bfloat16", False),
        ((2, 64, 6, 68), 64, "bfloat16", False),
        ((2, 64, 6, 160), 64, "bfloat16", True),  # Hopper's alone
        ((2, 64, 6, 264), 64, "bfloat16", False),
    ],
)
def test_cudnn_is_called_for_by_name_where_it_applies(shape, slots, dtype, takes, monkeypatch):
    """Lowered for CUDA here; it takes a pretence that the GPU and its library are there."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    class Device:
        compute_capability = "9.0"

    class Backend:
        platform_version = "cuda 13000"

        @staticmethod
        def local_devices():
            return [Device]

    monkeypatch.setattr(jax.extend.backend, "get_backend", Backend)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    B, T, _, k = shape
    arrays = [
        jax.ShapeDtypeStruct(s, jnp.dtype(dtype))
        for s in (shape, (B, 2, k, slots), (B, 2, slots, k))
    ]
    mask = jax.ShapeDtypeStruct((B, 1, T, slots), jnp.bool_)

    def loss(q, keys, values, mask):
        return jnp.sum(attention(q, keys, values, mask, 0.3).astype(jnp.float32))

    names = ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward")
    called = [f"@{name}(" in lowered(loss, names, (*arrays, mask)) for name in names]
    assert called == [takes, takes]
    # As a block is: the forward kernel does not run again.
    program = lowered(jax.checkpoint(loss, policy=REMAT_POLICY), names, (*arrays, mask))
    assert [program.count(f"@{name}(") for name in names] == [takes, takes]
    for Device.compute_capability, widest in (
        ("7.5", 0),
        ("8.6", 128),
        ("10.0", 128),
        ("10.3", 0),
    ):  # Turing, Ampere, Blackwell
        called = [f"@{name}(" in lowered(loss, names, (*arrays, mask)) for name in names]
        assert called == [takes and k <= widest] * 2


@pytest.mark.parametrize(
    ("capability", "cudnn", "widest"),
    [
        ((7, 5), 91800, 0),
        ((8, 0), 91800, 128),
        ((8, 9), 91800, 128),
        ((9, 0), 90400, 128),
        ((9, 0), 90500, 256),
        ((9, 0), 91800, 256),
        ((9, 0), 0, 128),  # a version that is not known
        ((10, 0), 91000, 128),
        ((10, 3), 91000, 0),
        ((10, 3), 91100, 128),
        ((12, 0), 91800, 128),
    ],
    ids=str,
)
def test_the_widest_head_of_a_gpu(capability, cudnn, widest, monkeypatch):
    """Never wider than what jax itself lets through."""
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    assert widest_cudnn_head(capability, cudnn) == widest

    def at_least(wanted: str) -> bool:
        return capability >= tuple(map(int, wanted.split(".")))

    monkeypatch.setattr(theirs, "check_compute_capability", at_least)
    monkeypatch.setattr(
        theirs,
        "is_cuda_compute_capability_equal",
        lambda c: capability == tuple(map(int, c.split("."))),
    )
    for width in range(8, widest + 1, 8):
        q = jax.ShapeDtypeStruct((1, 4, 2, width), jnp.bfloat16)
        for training in (True, False):
            theirs.check_is_flash_attention(
                q, q, q, theirs.AttentionLayout.BTNH.value, cudnn, True, training
            )


def test_this_machine_has_no_such_kernel():
    assert widest_head() == 0


@pytest.mark.parametrize(
    ("limit", "dtype", "warns"),
    [
        (128, "bfloat16", True),
        (256, "bfloat16", False),
        (0, "bfloat16", False),
        (128, "float32", False),
    ],
)
def test_widening_heads_beyond_the_kernel_is_warned_of(limit, dtype, warns, monkeypatch):
    """As heads of 128 + 32 are, on every GPU but Hopper's; where the kernel is there for neither,
    nothing is lost.
    """
    monkeypatch.setattr("zflora_jax.adapters.init.widest_head", lambda: limit)
    model = tiny_model(num_layers=1, head_dim=128, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init_adapters(jax.random.key(0), model, AdapterConfig("zflora-minimal", rank=2))
        assert not caught
        init_adapters(jax.random.key(0), model, AdapterConfig("ffba", rank=2))
    said = [str(w.message) for w in caught]
    assert len(said) == warns and all(
        "head_dim 128 + 32 = 160: cuDNN's attention takes heads up to 128 on this GPU" in s
        and "'zflora-minimal' leaves the heads as they are; so does extra_head_dim=0" in s
        for s in said
    )


def lowered(loss, names, arrays):
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    return jax.export.export(
        jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["cuda"], disabled_checks=checks
    )(*arrays).mlir_module()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_a_row_gets_the_logits_of_many(dtype: str) -> None:
    x, table = (
        jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
        for i, shape in enumerate([(3, 2, 8), (50, 8)])
    )
    for tied, kernel in ((True, table), (False, table.T)):
        many = head_logits(x, kernel, tied)
        ones = jnp.concatenate(
            [head_logits(x[:, i : i + 1], kernel, tied) for i in range(2)], axis=1
        )
        assert many.shape == ones.shape == (3, 2, 50) and ones.dtype == jnp.float32
        np.testing.assert_allclose(ones, many, atol=1e-5)
        np.testing.assert_allclose(head_logits(x[:1, :1], kernel, tied), many[:1, :1], atol=1e-5)


@pytest.mark.parametrize("length", [1, 2048], ids=["one token a row", "sequences"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bfloat16_heads_round_no_logit_to_bfloat16(tied: bool, length: int) -> None:
    """Against float64: logits are float32's, and the likeliest token is the same wherever float32
    can tell it from the next. Rounded to bfloat16, several tokens of a row would often share the
    first place.
    """
    config = preset("tiny").replace(tie_word_embeddings=tied, dtype="bfloat16", vocab_size=2000)
    draw = np.random.default_rng(0)
    x, table = (
        jnp.asarray(draw.standard_normal(s), jnp.bfloat16)
        for s in ((2048, config.hidden_size), (2000, config.hidden_size))
    )
    head = {"embed": {"embedding": table}} | ({} if tied else {"lm_head": {"kernel": table.T}})
    got = Llama(config).apply(
        {"params": head}, x.reshape(-1, length, config.hidden_size), method="logits"
    )
    assert got.dtype == jnp.float32
    got, want = (
        np.asarray(got, np.float64).reshape(2048, -1),
        np.asarray(x, np.float64) @ np.asarray(table, np.float64).T,
    )
    rounding = 1e-6 * np.abs(want).max()
    assert np.abs(got - want).max() <= rounding
    second, first = np.sort(want, axis=1)[:, -2:].T
    told = first - second > 2 * rounding
    assert told.mean() > 0.99 and (got.argmax(1) == want.argmax(1))[told].all()
    assert ((got == got.max(1, keepdims=True)).sum(1) == 1)[told].all()
    narrow = np.asarray(want, jnp.bfloat16)
    assert (
        (narrow == narrow.max(1, keepdims=True)).sum(1) > 1
    ).mean() > 0.01  # so this test can fail
