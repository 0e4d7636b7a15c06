"""Attention equals the plain formula, values and gradients, by every kernel and for every mask: by
blocks, by splash attention in Pallas' interpreter, and by what cuDNN is given. Which kernel is
chosen where: test_attention_kernels.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import compiled
from support.grids import always, in_turn
from support.models import attention_inputs, tiny_model

from zflora_jax import Llama, init_cache, make_mesh
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.ops import attention as attention_ops
from zflora_jax.ops.attention import (
    attention,
    one_query_as_eight,
    plain_attention,
    query_blocks,
    spans,
)
from zflora_jax.ops.attention_flash import cudnn_attention, splash_attention
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.parallel.devices import named_device

PADDED = ["causal", "left", "right", "filler"]
KINDS = [*PADDED, "packed"]
WIDTHS = [(64, 136), (80, 200), (128, 256), (160, 130)]  # head dim, T


def value_and_gradients(function: Any, arrays: Any, dtype: Any) -> list[np.ndarray]:
    """Of q, k, v in `dtype`, with a weight on each value; as float64."""
    q, k, v = (jnp.asarray(x, dtype) for x in arrays)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), dtype)

    @jax.jit
    def both(q, k, v, weights):
        out, back = jax.vjp(function, q, k, v)
        return out, *back(weights)

    found = both(q, k, v, weights)
    assert all(x.dtype == dtype for x in found)
    return [np.asarray(x, np.float64) for x in found]


def reference(arrays: Any, mask: AttentionMask, scale: float) -> list[np.ndarray]:
    with jax.enable_x64(True):
        return value_and_gradients(lambda *a: plain_attention(*a, mask, scale), arrays, jnp.float64)


def distances(got: list[np.ndarray], want: list[np.ndarray]) -> list[float]:
    """Of values and gradients, against the largest number of each."""
    assert all(np.isfinite(x).all() for x in got)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True)]


def as_near_as_plain(function: Any, arrays: Any, mask: AttentionMask, want: Any) -> None:
    """In bfloat16: at most 2.5 times as far from float64 as the plain formula is."""
    plain = value_and_gradients(lambda *a: plain_attention(*a, mask, 0.125), arrays, jnp.bfloat16)
    found = distances(value_and_gradients(function, arrays, jnp.bfloat16), want)
    for ours, theirs in zip(found, distances(plain, want), strict=True):
        assert ours <= 2.5 * theirs


@pytest.mark.parametrize(
    ("kind", "window", "length", "blocks"),
    always(
        [(kind, None, 12, n) for kind in [*KINDS, "cache"] for n in (1, 3)]
        # Spans of queries that need no key behind their end.
        + [("causal", None, 256, 1), ("left", 130, 384, 2), ("packed", None, 512, 4)],
        lambda case: case[2:] != (12, 1),
    ),
)
def test_blocks_equal_the_plain_formula(kind, window, length, blocks, monkeypatch):
    monkeypatch.setattr(attention_ops, "query_blocks", lambda _: blocks)
    *arrays, mask = attention_inputs(kind, length, 18 if kind == "cache" else length)
    mask = mask.within(window, length)
    got = value_and_gradients(lambda *a: attention(*a, mask, 0.125), arrays, jnp.float32)
    want = reference(arrays, mask, 0.125)
    assert max(distances(got, want)) < 2e-6
    if length > 12:
        assert len(spans(length, mask)) == length // 128
        as_near_as_plain(lambda *a: attention(*a, mask, 0.125), arrays, mask, want)


def test_spans_multiply_less():
    """10 of the 16 squares of four spans, forward and backward; one span where queries follow a
    cache, none of 128 queries divides them, or all spans' scores would be many.
    """
    shapes = ((1, 512, 2, 64), (1, 1, 64, 512), (1, 1, 512, 64))
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    products = jax.jit(jax.grad(lambda *a: jnp.sum(attention(*a, AttentionMask(), 1.0)), (0, 1, 2)))
    flops = compiled(products.lower(q, k, v)).cost_analysis()["flops"]
    # Two products forward and four backward, as both passes share the scores in one program.
    assert 0.625 < flops / (6 * 2 * 2 * 512 * 512 * 64) < 0.65
    after_cache = AttentionMask(first=jnp.zeros((), jnp.int32))
    assert spans(512, after_cache) == [(0, 512)]
    for length in (500, 640, 2048):
        assert spans(length, AttentionMask()) == [(0, length)]


def test_the_one_query_of_a_head_as_eight():
    """The form for TPUs: values and gradients of a token where each head has keys of its own."""
    *arrays, mask = attention_inputs("cache", T=1, S=12, H=2, K=2)

    def as_eight(q, k, v):
        attend = partial(attention_ops._attention, mask=mask, scale=0.3)
        grouped = q.transpose(0, 2, 1, 3)[:, :, None]
        out = one_query_as_eight(grouped, k, v, mask, lambda q, k, v, _: attend(q, k, v))
        return out[:, :, 0].transpose(0, 2, 1, 3)

    got = value_and_gradients(as_eight, arrays, jnp.float32)
    assert max(distances(got, reference(arrays, mask, 0.3))) < 2e-6


def splash_of(mask: AttentionMask) -> Any:
    """By its steps as plain operations, since the kernel itself needs a TPU."""
    return lambda *a: splash_attention(*a, mask.queries, 0.125, mask.window, interpret=True)


def cudnn_of(mask: AttentionMask) -> Any:
    """By the same function's plain implementation, since cuDNN needs a GPU."""
    return lambda *a: cudnn_attention(*a, mask.queries, 0.125, mask.window, implementation="xla")


def at_real(attend: Any, kind: str, mask: AttentionMask, length: int) -> Any:
    """`attend`, and zero at padding, where any finite number may be."""
    real = jnp.ones((2, length), bool) if kind in ("causal", "packed") else mask.queries
    return lambda *a: jnp.where(real[..., None, None], attend(*a), 0)


@pytest.mark.parametrize(("kind", "width"), in_turn(KINDS, WIDTHS))
def test_splash_equals_the_plain_formula(kind, width):
    """Grouped heads, lengths that are no multiple of its blocks; in bfloat16 as near as plain."""
    k, length = width
    *arrays, mask = attention_inputs(kind, length, length, H=4, K=2, k=k)
    got = value_and_gradients(splash_of(mask), arrays, jnp.float32)
    want = reference(arrays, mask, 0.125)
    assert max(distances(got, want)) < 4e-6
    if kind == "packed":
        as_near_as_plain(splash_of(mask), arrays, mask, want)


@pytest.mark.parametrize(("kind", "width"), in_turn(PADDED, WIDTHS))
def test_what_cudnn_is_given_is_the_same_attention(kind, width):
    """In float64, whose softmax is float32's there."""
    k, length = width
    *arrays, mask = attention_inputs(kind, length, length, H=4, K=2, k=k)
    cudnn = at_real(cudnn_of(mask), kind, mask, length)
    plain = at_real(lambda *a: plain_attention(*a, mask, 0.125), kind, mask, length)
    with jax.numpy_dtype_promotion("standard"):
        with jax.enable_x64(True):
            want, got = (value_and_gradients(f, arrays, jnp.float64) for f in (plain, cudnn))
        assert max(distances(got, want)) < 2e-6
        # Of all arrays together: XLA's implementation rounds where cuDNN's does not.
        near, theirs = (value_and_gradients(f, arrays, jnp.bfloat16) for f in (cudnn, plain))
    assert max(distances(near, want)) <= 2.5 * max(distances(theirs, want))


WINDOWS = [("left", 2), ("packed", 7), ("causal", 130)]


@pytest.mark.parametrize(
    ("kernel", "kind", "window"),
    always(
        [(kernel, *case) for kernel in ("blocks", "splash") for case in WINDOWS]
        + [("cudnn", "left", 2), ("cudnn", "causal", 130)],
        lambda case: case[2] == {"blocks": 7, "splash": 130, "cudnn": 2}[case[0]],
    ),
)
def test_a_window_in_every_kernel(kernel, kind, window, monkeypatch):
    """Values and gradients of the plain formula; beyond the window nothing is seen."""
    monkeypatch.setattr(attention_ops, "query_blocks", lambda _: 2)
    *arrays, whole = attention_inputs(kind, 200, 200, H=4, K=2, k=64)
    mask = whole.within(window, 200)
    assert whole.within(200, 200).window is None, "it has room for all"
    attend = {
        "blocks": lambda *a: attention(*a, mask, 0.125),
        "splash": splash_of(mask),
        "cudnn": cudnn_of(mask),
    }[kernel]

    def exact(seen):
        with jax.enable_x64(True):
            plain = at_real(lambda *a: plain_attention(*a, seen, 0.125), kind, mask, 200)
            return value_and_gradients(plain, arrays, jnp.float64)

    with jax.numpy_dtype_promotion("standard"):
        got = value_and_gradients(at_real(attend, kind, mask, 200), arrays, jnp.float32)
    assert max(distances(got, exact(mask))) < 4e-6 < max(distances(got, exact(whole)))


def test_long_sequences_never_hold_all_scores_nor_their_mask():
    assert [query_blocks(n) for n in (1, 1024, 1536, 2048, 8192)] == [1, 1, 3, 4, 16]
    assert query_blocks(1031) == 1  # a prime
    shapes = ((1, 8192, 2, 8), (1, 1, 8, 8192), (1, 1, 8192, 8))
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attention(q, k, v, AttentionMask(ids, ids), 0.3))

    memory = compiled(jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, ids)).memory_analysis()
    scores = 2 * 8192 * 8192 * 4
    assert memory.temp_size_in_bytes < scores / 2


@pytest.fixture
def splash_here(monkeypatch):
    """As if this were a TPU whose kernel runs in the interpreter. Counts the calls."""
    calls = []

    def splash(*given: Any) -> Any:
        calls.append(given[0].shape)
        return splash_attention(*given, interpret=True)

    monkeypatch.setitem(attention_ops.FLASH, "splash", splash)
    monkeypatch.setattr(attention_ops, "device_in_use", partial(named_device, "tpu", "TPU v5e"))
    return calls


@pytest.mark.parametrize(("rows", "kind"), [(4, "packed"), (2, "causal")])
def test_every_device_runs_the_kernel_on_its_rows_and_heads(rows, kind, splash_here):
    """Of a mesh data=2 x fsdp=2 x tensor=2; two rows are divided over data alone."""
    *arrays, mask = attention_inputs(kind, 128, 128, H=4, K=2, k=8)
    arrays = [np.concatenate([x] * (rows // 2)) for x in arrays]
    mask = jax.tree.map(lambda x: jnp.concatenate([x] * (rows // 2)), mask)
    want = reference(arrays, mask, 0.125)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        got = value_and_gradients(lambda *a: attention(*a, mask, 0.125), arrays, jnp.float32)
    assert set(splash_here) == {(1, 128, 2, 8)}
    assert max(distances(got, want)) < 4e-6


def test_a_model_with_the_kernel_is_the_model_with_blocks(splash_here, monkeypatch):
    """Training on packed rows, and a prefill of left-padded prompts into an empty cache. A token
    after it takes the plain products.
    """
    model = tiny_model(num_layers=1)
    llama, params = Llama(model.config), {"params": model.params}
    tokens = jax.random.randint(jax.random.key(0), (2, 130), 0, model.config.vocab_size)
    *_, packed = attention_inputs("packed", 130, 130)
    *_, left = attention_inputs("left", 130, 130)

    def loss(params):
        logits = llama.apply(params, tokens, segment_ids=packed.queries)
        return jnp.sum(jnp.where(packed.queries[..., None] > 0, jnp.sin(logits), 0.0))

    def served():
        cache = init_cache(model.config, 2, 136)
        logits, cache = llama.apply(params, tokens, left.queries, cache)
        more, _ = llama.apply(params, tokens[:, :1], None, cache)
        return logits, more

    trained = jax.jit(jax.grad(loss))(params)
    assert {shape[:2] for shape in splash_here} == {(2, 130)}
    splash_here.clear()
    first, second = jax.jit(served)()
    assert {shape[:2] for shape in splash_here} == {(2, 130)}
    monkeypatch.undo()
    jax.clear_caches()
    plain_trained, (plain_first, plain_second) = jax.jit(jax.grad(loss))(params), jax.jit(served)()
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(plain_trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    for a, b in ((first, plain_first), (second[:, None], plain_second[:, None])):
        real = left.queries if a.shape[1] == 130 else slice(None)
        np.testing.assert_allclose(a[real], b[real], atol=1e-5 * float(jnp.abs(b).max()))
