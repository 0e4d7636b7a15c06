"""What must hold for every method (docs/method.md and CONTRIBUTING.md, "Tolerances"), adapters
perturbed first so that each test can fail.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import BY_METHOD, CASES, case_id, dead_slices, every_method, few_cases, is_few
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always, in_turn
from support.models import perturb, tiny_model
from support.quantized import how

from zflora_jax import Llama, Model, forward, fuse, init_cache, quantize_model, swap, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import base_config, fused_config
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.adapters.widths import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes

WIDENED = [a for a in CASES if METHODS[a.method].widens]


def name_of(value: object) -> str:
    return case_id(value) if isinstance(value, AdapterConfig) else str(value)


every_case = pytest.mark.parametrize("adapter", CASES, ids=case_id)


@few_cases
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


@pytest.mark.parametrize(
    ("adapter", "scan"), in_turn(CASES, [True, False], few=is_few), ids=name_of
)
def test_fused_and_packed_equal_adapted(adapter, scan, tokens):
    model = tiny_model(scan_layers=scan, tie_word_embeddings=not scan)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    adapted, fused = forward(model, tokens, adapter, adapters), fuse(model, adapter, adapters)
    change = np.abs(np.asarray(adapted) - np.asarray(forward(model, tokens)))
    assert change.max() > 0.05 * np.abs(np.asarray(adapted)).max()
    shapes = {n: x.shape for n, x in trees.flatten(fused.params).items()}
    assert shapes == param_shapes(fused.config)
    assert_logits_close(forward(fused, tokens), adapted)
    assert_logits_close(forward(pack_for_decode(fused, "tpu" if scan else "cpu"), tokens), adapted)


@pytest.mark.parametrize(
    ("adapter", "scan"), in_turn(WIDENED, [False, True], few=is_few), ids=name_of
)
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
    in_turn(WIDENED, [False, True], ["float32", "bfloat16"], few=is_few),
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
    """Base blocks are the base's bits, and a merge is float32 addition with one rounding."""
    model = tiny_model(tie_word_embeddings=False)
    model.params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter), std=1e-3)
    fused = fuse(model, adapter, adapters)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(fused.params))
    if METHODS[adapter.method].widens:
        assert_trees_equal(unfuse(fused)[0].params, model.params)
    elif adapter.method == "lora":
        blocks, base, got = (
            {n: np.asarray(x, np.float64) for n, x in tree["layers"]["attn"]["o"].items()}
            for tree in (adapters, model.params, fused.params)
        )
        product = 1.5 * blocks["lora_a"] @ blocks["lora_b"]
        exact = base["kernel"].reshape(product.shape) + product
        gap = np.abs(got["kernel"].reshape(product.shape) - exact)
        half_ulp = {"float32": 2**-24, "bfloat16": 2**-8}[dtype]
        assert np.all(gap <= 1.01 * half_ulp * np.abs(exact) + 1e-8)


@pytest.mark.parametrize(
    ("adapter", "side"),
    in_turn(BY_METHOD, ["left", "right"], few=lambda a: "zflora" in a.method or a.method == "lora"),
    ids=name_of,
)
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


@every_case
def test_bad_adapters_refuse_to_fuse(adapter):
    model = tiny_model()
    flat = trees.flatten(init_adapters(jax.random.key(1), model, adapter))
    name, leaf = next(iter(flat.items()))
    for given, message in [
        (flat | {name: leaf.at[(0,) * leaf.ndim].set(jnp.nan)}, f"{name}.*NaN"),
        (flat | {name: leaf[..., :-1]}, f"{name}.*shape"),
        ({k: v for k, v in flat.items() if k != name}, f"missing +{name}"),
        (flat | {"layers/attn/q/foward": leaf}, "unexpected layers/attn/q/foward"),
    ]:
        with pytest.raises(ValueError, match=message):
            fuse(model, adapter, trees.unflatten(given))
    with pytest.raises(ValueError, match="adapter is a dict, no AdapterConfig"):
        fuse(model, trees.unflatten(flat), adapter)


@pytest.mark.parametrize(
    ("method", "kind"),
    always(
        [("lora", None), ("full", None), ("zflora-minimal", None), ("zflora-minimal", "q4_1")],
        lambda case: case != ("full", None),
    ),
)
def test_adapters_beyond_the_range_of_the_base_refuse(method, kind):
    """Finite floats of theirs are no numbers there; a swap refuses before it takes the model."""
    model, adapter = tiny_model(head_dim=32), AdapterConfig(method, rank=6, alpha=9.0)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    large = trees.map_with_names(lambda _, x: 1e6 * np.asarray(x), adapters)
    if kind is not None:
        model = quantize_model(model, how(kind))
    else:
        model = Model(model.config, jax.tree.map(lambda x: x.astype(jnp.float16), model.params))
    with pytest.raises(ValueError, match=r"kernel.*: NaN or infinite as .*float16"):
        fuse(model, adapter, large)
    for pack in (lambda x: x, lambda x: pack_for_decode(x, "gpu")) * METHODS[method].widens:
        fused = pack(fuse(model, adapter, adapters))
        before = jax.device_get(fused.params)
        with pytest.raises(ValueError, match=r"attn/o/forward.*: NaN or infinite as .*float16"):
            swap(fused, large)
        assert_trees_equal(trees.arrays(fused.params), trees.arrays(before))


@every_case
def test_counts_and_configs_are_two_way(adapter):
    model = tiny_model()
    config, adapters = model.config, init_adapters(jax.random.key(0), model, adapter)
    dead = sum(leaf.size for leaf in dead_slices(config, adapter, adapters))
    assert trees.size(adapters) - dead == count_params(config, adapter)
    assert base_config(fused_config(config, adapter), adapter) == config


@pytest.mark.parametrize("method", ["zflora-uniform", "lora"])
def test_scale_is_on_backward_alone(method, tokens):
    """Halving alpha and doubling backward (or LoRA's B) changes nothing."""
    model, adapter = tiny_model(tie_word_embeddings=False), AdapterConfig(method, rank=6, alpha=9.0)
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    doubled = trees.map_with_names(
        lambda n, x: 2 * np.asarray(x) if n.endswith(("backward", "lora_b")) else x, adapters
    )
    found = forward(model, tokens, adapter.replace(alpha=4.5), doubled)
    assert_logits_close(found, forward(model, tokens, adapter, adapters))
