"""What must hold of a quantised base, for every kind of kernel and every method that widens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import DORA
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always, in_turn
from support.models import perturb, tiny_model
from support.quantized import WIDENED, how, moved, quantized_tiny

from zflora_jax import ConfigError, forward, fuse, generate_tokens, pack_for_decode, swap, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.config import METHODS, AdapterConfig, QuantizeConfig, RunConfig
from zflora_jax.core import trees
from zflora_jax.core.model import Model, fingerprint
from zflora_jax.nn.quantize_model import dequantize_model, quantize_model, stored_text
from zflora_jax.ops.quantized import KINDS, QuantizedArray

pytestmark = pytest.mark.filterwarnings("ignore:head_dim 32")  # a group that is not full
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 9)).astype(np.int32)


def assert_same_bits(found, wanted):
    """Names, forms and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert_trees_equal(trees.arrays(found), trees.arrays(wanted))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype


def in_subtrees(model):
    config = model.config.replace(scan_layers=False)
    return Model(config, trees.unstack_layers(model.params, config.num_layers))


@pytest.mark.parametrize("kind", always(KINDS, ("int8", "nf4", "q4_1").__contains__))
def test_a_quantised_model_computes_what_its_numbers_do(kind):
    model = quantized_tiny(kind)
    assert stored_text(model) == f"{kind}: embed, k, o, q, v, down, gate, up"
    assert_logits_close(forward(model, TOKENS), forward(dequantize_model(model), TOKENS), 1e-6)


@pytest.mark.parametrize(
    ("kind", "method", "device"), in_turn([*KINDS], [*WIDENED], ["cpu", "gpu", "tpu"])
)
def test_fused_packed_and_swapped_equal_adapted_and_the_base_keeps_its_bits(kind, method, device):
    """With the blocks that the fused model stores, which `unfuse` gives."""
    model, adapter = quantized_tiny(kind), WIDENED[method]
    fused = fuse(model, adapter, moved(model, adapter))
    base, back = unfuse(fused)
    assert_same_bits(base.params, model.params)
    wanted = forward(model, TOKENS, adapter, back)
    assert np.abs(np.asarray(wanted) - np.asarray(forward(model, TOKENS))).max() > 0.1
    assert_logits_close(forward(fused, TOKENS), wanted)
    packed = pack_for_decode(fused, device)
    assert_logits_close(forward(packed, TOKENS), wanted)
    if device == "cpu" and kind == "int8":  # rounds the inputs of few rows to 15 bits
        assert_logits_close(forward(packed, TOKENS[:1, :1]), wanted[:1, :1], 2e-4)
    other = pack_for_decode(fuse(model, adapter, moved(model, adapter, seed=5)), device)
    swapped = swap(other, moved(model, adapter))
    if device != "cpu" or kind == "int8":
        assert_same_bits(swapped.params, packed.params)
    else:  # floats, so the blocks are not rounded to codes
        exact = forward(model, TOKENS, adapter, moved(model, adapter))
        assert_logits_close(forward(swapped, TOKENS), exact)


@pytest.mark.parametrize(
    ("kind", "count"),
    always([("q4_1", 4), *((kind, 1000) for kind in KINDS)], lambda case: case[1] == 4),
)
def test_many_swaps_leave_the_base_as_it_was(kind, count):
    model, adapter = quantized_tiny(kind), WIDENED["zflora-uniform"]
    tasks = [moved(model, adapter, seed) for seed in (1, 2)]
    fused = fuse(model, adapter, tasks[0])
    for i in range(1, count + 1):
        fused = swap(fused, tasks[i % 2])
    assert_same_bits(fused.params, fuse(model, adapter, tasks[0]).params)
    assert_same_bits(unfuse(fused)[0].params, model.params)
    assert fingerprint(unfuse(fused)[0]) == fingerprint(model)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if not row.widens])
def test_merging_by_addition_is_refused_and_says_what_else_there_is(method):
    model, adapter = quantized_tiny("int8"), AdapterConfig(method, rank=4)
    if method == "full":
        with pytest.raises(ConfigError, match=r"method 'full' trains the base's floats"):
            RunConfig(adapter=adapter, quantize=QuantizeConfig("nf4"))
        with pytest.raises(ConfigError, match=r"stored as codes: dequantise it first"):
            init_adapters(jax.random.key(0), model, adapter)
        return
    adapters = moved(model, adapter)
    with pytest.raises(ConfigError, match=r"adapters unmerged .*dequantise the base first"):
        fuse(model, adapter, adapters)
    numbers = dequantize_model(model)
    assert_logits_close(
        forward(model, TOKENS, adapter, adapters), forward(numbers, TOKENS, adapter, adapters), 1e-6
    )
    if method == "lora":  # the blocks of ffa are the same
        given = {"max_new_tokens": 5, "adapter": adapter, "adapters": adapters}
        beside = generate_tokens(model, [[3, 4, 5]], **given)
        merged = fuse(numbers, adapter, adapters)
        assert beside == generate_tokens(merged, [[3, 4, 5]], max_new_tokens=5)


def test_doras_norms_are_those_of_the_dequantised_kernels():
    model, adapter = quantized_tiny("int4", num_layers=2), DORA
    numbers, apart = dequantize_model(model), in_subtrees(model)
    found, wanted, again = (
        init_adapters(jax.random.key(0), m, adapter) for m in (model, numbers, apart)
    )
    assert_trees_equal(found, wanted)
    assert_trees_equal(found, trees.stack_layers(again, model.config.num_layers))
    moved_on = perturb(found)
    assert_logits_close(
        forward(model, TOKENS, adapter, moved_on), forward(numbers, TOKENS, adapter, moved_on), 1e-6
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group": 64}, "quantize.group=64 is for int8, int4 and nf4"),
        ({"kernels": "q8_0", "group": 64}, "quantize.group=64 is for int8, int4 and nf4"),
        ({"kernels": "int4", "group": 0}, "quantize.kernels=int4.*needs groups of 32"),
        (
            {"kernels": "int8", "group": 0, "embedding": "nf4"},
            "quantize.embedding=nf4.*needs groups of 32.*all three",
        ),
    ],
)
def test_settings_that_would_do_nothing_or_fail_later_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**given)


@pytest.mark.soak  # DoRA's norms are read of both layouts, too
def test_layers_stacked_or_apart_are_the_same():
    adapter, stacked = WIDENED["zflora-minimal"], quantized_tiny("q4_0", num_layers=2)
    apart, adapters = in_subtrees(stacked), moved(stacked, adapter)
    assert fingerprint(apart) == fingerprint(stacked)
    wanted = forward(fuse(stacked, adapter, adapters), TOKENS)
    fused = fuse(apart, adapter, trees.unstack_layers(adapters, 2), donate=True)
    assert_logits_close(forward(fused, TOKENS), wanted, 1e-6)


@pytest.mark.parametrize("family", always(["qwen2", "qwen3"], lambda name: name == "qwen3"))
def test_biases_and_head_norms_beside_codes(family):
    model, adapter = quantized_tiny("q8_0", family=family), WIDENED["zflora-uniform"]
    fused = fuse(model, adapter, moved(model, adapter))
    wanted = forward(model, TOKENS, adapter, unfuse(fused)[1])
    packed, other = (pack_for_decode(fused, "gpu") for _ in range(2))
    for found in (fused, packed):
        assert_logits_close(forward(found, TOKENS), wanted)
    assert_same_bits(swap(other, moved(model, adapter)).params, packed.params)


def test_an_untied_head_and_kinds_side_by_side():
    """Kernels of one input stay apart for decode where they are of different kinds."""
    model = tiny_model(head_dim=32, tie_word_embeddings=False, num_layers=1)
    mixed = quantize_model(model, how("int4", head="int8"))
    assert stored_text(mixed) == "float32: embed; int4: k, o, q, v, down, gate, up; int8: lm_head"
    wanted = forward(dequantize_model(mixed), TOKENS)
    for device in ("cpu", "gpu", "tpu"):
        assert_logits_close(forward(pack_for_decode(mixed, device), TOKENS), wanted)
    flat = trees.flatten(mixed.params)
    flat["layers/attn/q/kernel"] = trees.flatten(quantize_model(model, how("q8_0")).params)[
        "layers/attn/q/kernel"
    ]
    two = type(mixed)(mixed.config, trees.unflatten(flat))
    for device in ("cpu", "gpu"):
        packed = pack_for_decode(two, device)
        assert packed.config.execution.packed == (device == "cpu")  # as floats
        assert_logits_close(forward(packed, TOKENS), forward(dequantize_model(two), TOKENS))


def test_groups_follow_the_heads_and_codes_stay():
    model = quantize_model(tiny_model(head_dim=32), QuantizeConfig("int4", group=64))
    flat = trees.flatten(model.params)
    assert flat["layers/attn/o/kernel"].group == 32 and flat["layers/mlp/gate/kernel"].group == 64
    for name, leaf in flat.items():
        assert isinstance(leaf, QuantizedArray) == name.endswith("kernel")
    assert jnp.dtype(flat["final_norm/scale"].dtype) == jnp.float32
    assert_same_bits(quantize_model(model, QuantizeConfig("int4", group=64)).params, model.params)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: quantize_model(tiny_model(), how("nf4")), r"o/kernel: its 16 inputs are no mult"),
        (lambda: quantize_model(tiny_model(), "keep"), "'keep' is for the codes of a GGUF file"),
        (lambda: quantize_model(quantized_tiny("int8"), how("nf4")), "as int8 in groups of 0 alr"),
        (lambda: quantize_model(pack_for_decode(tiny_model()), "int8"), "then fuse, then pack"),
        (lambda: dequantize_model(pack_for_decode(quantized_tiny("int4"))), "a packed model cann"),
        (
            lambda: quantize_model(tiny_model(), QuantizeConfig("int8", head="int8")),
            r"quantize.head=int8: .* set quantize.embedding",
        ),
    ],
)
def test_uses_that_are_refused(use, message):
    with pytest.raises(ConfigError, match=message):
        use()
