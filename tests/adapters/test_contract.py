"""What must hold for every method (docs/method.md and CONTRIBUTING.md, "Tolerances"), adapters
perturbed first so that each test can fail.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import BY_METHOD, CASES, case_id, dead_slices, every_method, few_cases
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always, pairwise
from support.models import perturb, tiny_model

from zflora_jax.adapters.counts import count_params
from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import base_config, fused_config, resolve_adapter
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.adapters.swapping import swap
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.nn.kv_cache import init_cache
from zflora_jax.nn.llama import Llama, forward

WIDENED = [a for a in CASES if METHODS[a.method].widens]


def name_of(value: object) -> str:
    return case_id(value) if isinstance(value, AdapterConfig) else str(value)


every_case = pytest.mark.parametrize("adapter", CASES, ids=case_id)


@every_case
def test_unchanged_at_step_0(adapter, tokens):
    model = tiny_model(tie_word_embeddings=False)
    adapters = init_adapters(jax.random.key(1), model, adapter)
    adapted, base = forward(model, tokens, adapter, adapters), forward(model, tokens)
    # The products of attention have more columns, and may add up in another order; DoRA divides
    # norms that are computed in two ways.
    if METHODS[adapter.method].heads or adapter.use_dora:
        assert_logits_close(adapted, base)
    else:
        np.testing.assert_array_equal(adapted, base)


@few_cases
def test_every_block_matters(adapter, tokens):
    """No leaf is dead: changing any one of them changes the logits. A leaf that did not would be
    counted, trained and exported for nothing.
    """
    model = tiny_model(tie_word_embeddings=False)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    before = forward(model, tokens, adapter, adapters)
    for name, leaf in trees.flatten(adapters).items():
        changed = trees.map_with_names(
            lambda n, x, name=name, leaf=leaf: (
                np.asarray(leaf) * np.float32(1.7) if n == name else x
            ),
            adapters,
        )
        assert (
            np.abs(np.asarray(forward(model, tokens, adapter, changed)) - np.asarray(before)).max()
            > 1e-4
        ), name


@pytest.mark.parametrize(
    ("adapter", "scan"),
    [(a, True) for a in CASES] + [(a, False) for a in BY_METHOD],
    ids=name_of,
)
def test_fused_and_packed_equal_adapted(adapter, scan, tokens):
    model = tiny_model(scan_layers=scan, tie_word_embeddings=not scan)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    adapted, fused = forward(model, tokens, adapter, adapters), fuse(model, adapter, adapters)
    assert (
        np.abs(np.asarray(adapted) - np.asarray(forward(model, tokens))).max()
        > 0.05 * np.abs(np.asarray(adapted)).max()
    )
    assert {n: x.shape for n, x in trees.flatten(fused.params).items()} == param_shapes(
        fused.config
    )
    assert_logits_close(forward(fused, tokens), adapted)
    assert_logits_close(forward(pack_for_decode(fused, "tpu" if scan else "cpu"), tokens), adapted)


@pytest.mark.parametrize(("adapter", "scan"), pairwise(WIDENED, [True, False]), ids=name_of)
def test_unfuse_returns_the_base_bit_for_bit(adapter, scan):
    model = tiny_model(scan_layers=scan, tie_word_embeddings=False)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    base, back = unfuse(fuse(model, adapter, adapters))
    assert base.config == model.config
    assert_trees_equal(base.params, model.params)
    for name, leaf in trees.flatten(adapters).items():
        # S = 1.5: one rounding each way.
        np.testing.assert_allclose(trees.flatten(back)[name], leaf, rtol=3e-7, err_msg=name)


@pytest.mark.parametrize(
    "adapter", [a for a in BY_METHOD if not METHODS[a.method].widens], ids=case_id
)
def test_merged_methods_refuse_unfuse_and_swap(adapter):
    model = tiny_model()
    fused = fuse(model, adapter, init_adapters(jax.random.key(1), model, adapter))
    with pytest.raises(ValueError, match=r"cannot unfuse.*merged"):
        unfuse(fused)
    with pytest.raises(ValueError, match=r"cannot swap.*merged"):
        swap(fused, {})


@pytest.mark.parametrize(
    ("adapter", "packed", "dtype"),
    pairwise(WIDENED, [False, True], ["float32", "bfloat16"]),
    ids=name_of,
)
def test_swap_equals_fusing_anew(adapter, packed, dtype):
    model = tiny_model(tie_word_embeddings=False)
    model.params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    first, second = (
        perturb(init_adapters(jax.random.key(1), model, adapter), seed) for seed in (1, 2)
    )
    want = fuse(model, adapter, second)
    fused = fuse(model, adapter, first)
    got = swap(pack_for_decode(fused, "gpu") if packed else fused, second)
    assert_trees_equal(got.params, (pack_for_decode(want, "gpu") if packed else want).params)


@every_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fuse_copies_the_base_and_casts_once(adapter, dtype):
    """In bfloat16 too, base blocks are the base's bits, and a merge is float32 addition with one
    rounding.
    """
    model = tiny_model(tie_word_embeddings=False)
    model.params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter), std=1e-3)
    fused = fuse(model, adapter, adapters)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(fused.params))
    if METHODS[adapter.method].widens:
        assert_trees_equal(unfuse(fused)[0].params, model.params)
    elif adapter.method == "lora":
        a, b, w = (
            t["layers"]["attn"]["o"][n]
            for t, n in ((adapters, "lora_a"), (adapters, "lora_b"), (model.params, "kernel"))
        )
        exact = np.asarray(w, np.float64).reshape(a.shape[0], a.shape[1], -1) + 1.5 * np.asarray(
            a, np.float64
        ) @ np.asarray(b, np.float64)
        got = np.asarray(fused.params["layers"]["attn"]["o"]["kernel"], np.float64).reshape(
            exact.shape
        )
        half_ulp = {"float32": 2**-24, "bfloat16": 2**-8}[dtype]
        assert np.all(np.abs(got - exact) <= 1.01 * half_ulp * np.abs(exact) + 1e-8)


@pytest.mark.parametrize(("adapter", "side"), pairwise(BY_METHOD, ["left", "right"]), ids=name_of)
def test_prefill_and_decode_equal_full_forward(adapter, side):
    """Any batch and padding: each row alone without padding, the padded batch, and prefill + one
    token at a time agree.
    """
    model = tiny_model()
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    apply = jax.jit(Llama(model.config, adapter).apply)
    variables = {"params": model.params, "adapters": adapters}
    rng, length = np.random.default_rng(0), 12
    rows = [rng.integers(0, 256, n).astype(np.int32) for n in (12, 5, 1)]
    tokens, valid = np.zeros((3, length), np.int32), np.zeros((3, length), bool)
    for i, row in enumerate(rows):
        span = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, span], valid[i, span] = row, True
    batch = np.asarray(forward(model, tokens, adapter, adapters, valid))
    for i, row in enumerate(rows):
        assert_logits_close(batch[i][valid[i]], forward(model, row[None], adapter, adapters)[0])
    if side == "left":
        cache = init_cache(model.config, 3, length + 4, adapter)
        # Inside the second row, so that positions must go on from its real tokens and not from its
        # padding
        split = 9
        pieces = []
        for start, stop in [(0, split), *((t, t + 1) for t in range(split, length))]:
            logits, cache = apply(variables, tokens[:, start:stop], valid[:, start:stop], cache)
            pieces.append(logits)
        assert_logits_close(np.concatenate(pieces, axis=1)[valid], batch[valid])


@pytest.mark.parametrize(
    "adapter",
    always(BY_METHOD, lambda a: a.method in ("lora", "ffba", "zflora-uniform")),
    ids=case_id,
)
def test_greedy_tokens_are_the_same_for_any_batch_size_and_for_adapted_full_forwards(adapter):
    # With tied embeddings a random model repeats its last token.
    model = tiny_model(seed=1, tie_word_embeddings=False)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    fused = fuse(model, adapter, adapters)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 256, n).tolist() for n in (3, 8, 8, 1, 15)]
    answers = [
        generate_tokens(fused, prompts, max_new_tokens=10, batch_size=size, stop_token_ids=())
        for size in (1, 2, 5)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert len({t for answer in answers[0] for t in answer}) > 15, (
        "the model repeats itself; the comparison says little"
    )
    for prompt, answer in zip(prompts[1:3], answers[0][1:3], strict=True):
        # causal: each token's own prefix decides it.
        logits = forward(model, np.asarray([prompt + answer], np.int32), adapter, adapters)[0]
        assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == answer


@every_case
def test_bad_adapters_refuse_to_fuse(adapter):
    model = tiny_model()
    adapters = init_adapters(jax.random.key(1), model, adapter)
    flat = trees.flatten(adapters)
    name = sorted(flat)[0]
    for value, message in [
        (flat[name].at[(0,) * flat[name].ndim].set(jnp.nan), "NaN"),
        (flat[name][..., :-1], "shape"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            fuse(model, adapter, trees.unflatten(flat | {name: value}))
    with pytest.raises(ValueError, match=f"missing +{name}"):
        fuse(model, adapter, trees.unflatten({k: v for k, v in flat.items() if k != name}))
    with pytest.raises(ValueError, match="unexpected layers/attn/q/foward"):
        fuse(model, adapter, trees.unflatten(flat | {"layers/attn/q/foward": flat[name]}))


@every_case
def test_counts_and_configs_are_two_way(adapter):
    model = tiny_model()
    config = model.config
    adapters = init_adapters(jax.random.key(0), model, adapter)
    dead = sum(leaf.size for leaf in dead_slices(config, adapter, adapters))
    trained = trees.size(adapters) - dead
    assert trained == count_params(config, adapter)
    assert base_config(fused_config(config, adapter), adapter) == config
    p = resolve_adapter(config, adapter)
    assert (p.residual, p.heads, p.mlp) == tuple(
        getattr(fused_config(config, adapter), n) - getattr(config, n)
        for n in ("hidden_size", "head_dim", "intermediate_size")
    )


def test_scale_is_on_backward_alone(tokens):
    """s multiplies backward (and LoRA's B) and nothing else: halving alpha and doubling backward
    changes nothing.
    """
    model = tiny_model(tie_word_embeddings=False)
    for method in ("zflora-uniform", "lora"):
        adapter = AdapterConfig(method, rank=6, alpha=9.0)
        adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
        doubled = trees.map_with_names(
            lambda n, x: 2 * np.asarray(x) if n.endswith(("backward", "lora_b")) else x, adapters
        )
        halved = dataclasses.replace(adapter, alpha=4.5)
        assert_logits_close(
            forward(model, tokens, halved, doubled), forward(model, tokens, adapter, adapters)
        )
