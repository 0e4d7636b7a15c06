"""Initial adapters: their values, what they depend on, warnings of head sizes, FFA's factor; blocks
that can change nothing are not counted and stay zero.
"""

import math
import warnings

import jax
import numpy as np
import pytest
from support.cases import adapter_cases, case_id, is_few
from support.checks import assert_trees_equal
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax import ConfigError, count_params, init_adapters, preset
from zflora_jax.adapters.methods import (
    SERVED_HEAD_DIMS,
    adapter_shapes,
    live_layers,
    resolve_adapter,
)
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.training.objective import CrossEntropy

TINY = preset("tiny")  # d 64, heads 4/2 of 16, f 96, 2 layers


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_initial_values(method):
    """forward: N(0, 1/in), lora_a uniform within +-1/sqrt(in), q's forward zero; everything else
    zero.
    """
    model, row = tiny_model(hidden_size=128, intermediate_size=160, num_layers=3), METHODS[method]
    adapter = AdapterConfig(method, rank=12, extra_head_dim=16 if row.heads else None)
    adapters = trees.flatten(init_adapters(jax.random.key(5), model, adapter))
    inputs, live, drawn = {"o": 64, "down": 160}, live_layers(model.config, adapter), 0
    for name, leaf in adapters.items():
        _, _, kernel, block = name.split("/")
        assert leaf.dtype == np.float32
        dead = [i for i in range(3) if i not in live[kernel][block]]
        assert not np.any(np.asarray(leaf)[dead])
        value = np.delete(np.asarray(leaf, np.float64), dead, axis=0)
        if block not in ("forward", "lora_a") or (kernel, block) == ("q", "forward"):
            assert not value.any(), name
            continue
        drawn, n = drawn + 1, value.size
        std = 1 / math.sqrt(inputs.get(kernel, 128) * (3 if block == "lora_a" else 1))
        assert abs(value.mean()) < 5 * std / math.sqrt(n), name
        assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * n), name
        assert len(np.unique(value)) > 0.99 * n, name  # layers do not share their values
    # Two kernels write each stream with random blocks: o and down; k and v, but not q; gate and up.
    mlp = row.mlp and row.units
    assert drawn == {"lora": 7, "ffa": 0}.get(method, 2 * (row.residual + row.heads + mlp))
    if row.widens:  # the start may be chosen
        starts = {
            init: trees.flatten(init_adapters(jax.random.key(5), model, adapter.replace(init=init)))
            for init in ("normal", "kaiming_uniform")
        }
        assert_trees_equal(starts["normal"], adapters)
        for name, leaf in starts["kaiming_uniform"].items():
            bound = 1 / math.sqrt(inputs.get(name.split("/")[2], 128))
            assert np.any(leaf) == np.any(adapters[name]) and np.abs(leaf).max() <= bound, name
            assert not np.any(leaf) or np.abs(adapters[name]).max() > bound, name


@pytest.mark.parametrize(
    ("method", "init", "message"),
    [
        *(
            (m, "normal", f"'normal': method '{m}' does not have it.*unset")
            for m in ("ffa", "full")
        ),
        ("lora", "gaussian", "'gaussian': .*Allowed: kaiming_uniform, normal"),
    ],
)
def test_starts_that_do_not_exist(method, init, message):
    with pytest.raises(ConfigError, match=rf"adapter\.init={message}"):
        AdapterConfig(method, init=init)


def test_full_starts_as_a_copy_of_the_base():
    model = tiny_model()
    adapters = init_adapters(jax.random.key(0), model, AdapterConfig("full"))
    assert_trees_equal(adapters, model.params)
    assert adapters["final_norm"]["scale"] is not model.params["final_norm"]["scale"]
    assert count_params(TINY, AdapterConfig("full")) == trees.size(model.params)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ffa", "full")])
def test_initial_values_depend_on_the_key_and_the_leaf_s_name(method):
    """Not on how layers are stored, nor on the leaves beside it."""
    adapter = AdapterConfig(method, rank=6)
    stacked, apart = (tiny_model(scan_layers=scan) for scan in (True, False))
    apart.params = trees.unstack_layers(stacked.params, 2)
    adapters = init_adapters(jax.random.key(1), stacked, adapter)
    assert_trees_equal(init_adapters(jax.random.key(1), stacked, adapter), adapters)
    assert_trees_equal(
        trees.stack_layers(init_adapters(jax.random.key(1), apart, adapter), 2), adapters
    )
    every = trees.flatten(adapters)
    other = trees.flatten(init_adapters(jax.random.key(2), stacked, adapter))
    random = [name for name, leaf in every.items() if np.any(leaf)]
    assert random and not any(np.array_equal(other[name], every[name]) for name in random)
    firsts = [np.ravel(every[name])[:8].tobytes() for name in random]
    assert len(set(firsts)) == len(random)
    if method == "lora":
        some = init_adapters(jax.random.key(1), stacked, adapter.replace(targets="down|q"))
        assert_trees_equal(some, {n: every[n] for n in trees.flatten(some)})


def test_head_sizes_that_servers_lack_are_allowed_with_a_warning():
    ffba = AdapterConfig("ffba")
    for base in (16, 256):
        message = (
            rf"head_dim {base} \+ 8 = {base + 8} is outside .*vLLM.*Leave extra_head_dim unset"
        )
        with pytest.warns(UserWarning, match=message):
            model = tiny_model(num_layers=1, head_dim=base)
            init_adapters(jax.random.key(0), model, ffba.replace(extra_head_dim=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for adapter in (
            *(ffba.replace(extra_head_dim=e) for e in (None, 48, 0)),
            AdapterConfig("zflora-minimal"),
        ):
            assert resolve_adapter(TINY, adapter).heads + 16 in (16, *SERVED_HEAD_DIMS)
            init_adapters(jax.random.key(0), tiny_model(num_layers=1), adapter)


# --- dead layers ---------------------------------------------------------------------------------


def test_counts_by_hand():
    """Llama-3.2-1B, d 2048, 32 and 8 heads of 64, f 8192, 16 layers, r = 32, m = 32 or 0."""
    config, r = preset("llama-3.2-1b"), 32
    adapter = AdapterConfig("zflora-minimal", rank=r)
    read, written = r * (2048 + 512 + 512), 2048 * r
    mlp = 2 * (2048 * r + r * 8192 + r * r) + (8192 * r + r * 2048 + r * r)
    stored, dead = 16 * (read + written + mlp), read + 8192 * r + r * r
    units = adapter.replace(extra_mlp_units=r)
    assert stored == sum(map(math.prod, adapter_shapes(config, units).values())) == 18_399_232
    assert count_params(config, units) == stored - dead == 18_037_760
    assert count_params(config, adapter) == 15 * (read + 8192 * r) + 16 * (written + 2 * 8192 * r)
    only = adapter.replace(targets="attention")  # the last layer's o is dead then
    assert count_params(config, only) == 15 * (read + written)
    # With one layer, what o writes reaches gate and up only.
    one, adapter = TINY.replace(num_layers=1), adapter.replace(rank=6)
    assert count_params(one, adapter.replace(targets="attention")) == 0
    assert count_params(one, adapter.replace(targets="o|up")) == 6 * (64 + 96)


# Layers that are left out by choice stay as they are because they are zero.
TRAINED_CASES = [
    a
    for a in adapter_cases()
    if a.method != "full"
    and a.layers_to_transform is None
    and (METHODS[a.method].widens or a.targets == "all")
]


@pytest.mark.parametrize("adapter", always(TRAINED_CASES, is_few), ids=case_id)
def test_gradients_are_zero_where_a_block_is_dead_and_nowhere_else(adapter):
    model = tiny_model(num_layers=3)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = {"tokens": tokens, "loss_mask": ones.astype(bool), "segments": ones}

    def loss(adapters: trees.Tree) -> jax.Array:
        variables = {"params": model.params, "adapters": adapters}
        return CrossEntropy(16)(model.config, adapter, variables, batch).loss

    live = live_layers(model.config, adapter)
    for name, gradient in trees.flatten(jax.jit(jax.grad(loss))(adapters)).items():
        *_, kernel, block = name.split("/")
        moved = [bool(np.any(layer)) for layer in np.asarray(gradient)]
        assert moved == [i in live[kernel][block] for i in range(3)], name
