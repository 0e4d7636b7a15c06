"""Initial adapters: their values, what they depend on, warnings of head sizes, FFA's factor."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import assert_trees_equal

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import SERVED_HEAD_DIMS, live_layers, resolve_adapter
from zflora_jax.adapters.widths import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.presets import preset
from zflora_jax.ops.linear import tile

TINY = preset("tiny")  # d 64, heads 4/2 of 16, f 96, 2 layers


def a_model(**changes: object) -> Model:
    """Of the tiny shape with `changes`; values from numpy, so that nothing is compiled."""
    config, rng = TINY.replace(**changes), np.random.default_rng(0)
    shapes = param_shapes(config)
    return Model(
        config,
        trees.unflatten(
            {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
        ),
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_initial_values(method):
    """forward: N(0, 1/in), lora_a uniform within +-1/sqrt(in), q's forward zero; everything else
    zero.
    """
    model = a_model(hidden_size=128, intermediate_size=160, num_layers=3)
    adapters = init_adapters(
        jax.random.key(5),
        model,
        AdapterConfig(method, rank=12, extra_head_dim=16 if METHODS[method].heads else None),
    )
    inputs, live = {"o": 64, "down": 160}, live_layers(model.config, AdapterConfig(method, rank=12))
    drawn, row = 0, METHODS[method]
    for name, leaf in trees.flatten(adapters).items():
        _, _, kernel, block = name.split("/")
        assert leaf.dtype == np.float32
        dead = [i for i in range(3) if i not in live[kernel][block]]
        assert not np.any(np.asarray(leaf)[dead])
        value = np.delete(np.asarray(leaf, np.float64), dead, axis=0)
        if block in ("forward", "lora_a") and (kernel, block) != ("q", "forward"):
            drawn += 1
            std, n = (
                1 / math.sqrt(inputs.get(kernel, 128) * (3 if block == "lora_a" else 1)),
                value.size,
            )
            assert abs(value.mean()) < 5 * std / math.sqrt(n), name
            assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * n), name
            assert len(np.unique(value)) > 0.99 * n, name  # layers do not share their values
        else:
            assert not value.any(), name
    # Two kernels write each stream with random blocks: o and down, k and v (q's is zero), gate and
    # up.
    assert drawn == {"lora": 7, "ffa": 0}.get(method, 2 * (row.residual + row.heads + row.mlp))


def test_full_starts_as_a_copy_of_the_base():
    model = a_model()
    adapters = init_adapters(jax.random.key(0), model, AdapterConfig("full"))
    assert_trees_equal(adapters, model.params)
    assert adapters["final_norm"]["scale"] is not model.params["final_norm"]["scale"]
    assert count_params(TINY, AdapterConfig("full")) == trees.size(model.params)


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_depend_on_the_key_alone(method):
    adapter = AdapterConfig(method, rank=6)
    stacked, apart = (a_model(scan_layers=scan) for scan in (True, False))
    apart.params = trees.unstack_layers(stacked.params, 2)
    adapters = init_adapters(jax.random.key(1), stacked, adapter)
    assert_trees_equal(init_adapters(jax.random.key(1), stacked, adapter), adapters)
    assert_trees_equal(
        trees.stack_layers(init_adapters(jax.random.key(1), apart, adapter), 2), adapters
    )
    if method in ("ffa", "full"):
        return
    other = trees.flatten(init_adapters(jax.random.key(2), stacked, adapter))
    random = [name for name, leaf in trees.flatten(adapters).items() if np.any(leaf)]
    assert random and not any(
        np.array_equal(other[name], trees.flatten(adapters)[name]) for name in random
    )


def test_a_leaf_does_not_change_with_the_leaves_beside_it():
    """Values come from the leaf's name, and no two kernels share them."""
    model, lora = a_model(), AdapterConfig("lora", rank=6)
    every, some = (
        trees.flatten(init_adapters(jax.random.key(1), model, lora.replace(targets=targets)))
        for targets in ("all", "down|q")
    )
    assert set(some) < set(every)
    assert_trees_equal(some, {name: every[name] for name in some})
    firsts = [np.ravel(x)[:8].tobytes() for name, x in every.items() if name.endswith("lora_a")]
    assert len(set(firsts)) == 7


@pytest.mark.parametrize(
    ("base", "extra", "advice"),
    [
        (16, 8, "extra_head_dim=16 is the smallest that they run"),
        (256, 16, "no extra_head_dim gives one"),
    ],
)
def test_a_head_size_that_servers_lack_is_allowed_with_a_warning(base, extra, advice):
    message = rf"head_dim {base} \+ {extra} = {base + extra} is outside .*vLLM.*{advice}"
    model = a_model(num_layers=1, head_dim=base)
    with pytest.warns(UserWarning, match=message):
        init_adapters(jax.random.key(0), model, AdapterConfig("ffba", extra_head_dim=extra))


def test_served_head_sizes_and_untouched_heads_do_not_warn():
    ffba = AdapterConfig("ffba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for adapter in (
            *(ffba.replace(extra_head_dim=e) for e in (None, 48, 0)),
            AdapterConfig("zflora-minimal"),
        ):
            assert resolve_adapter(TINY, adapter).heads + 16 in (16, *SERVED_HEAD_DIMS)
            init_adapters(jax.random.key(0), a_model(num_layers=1), adapter)


def test_the_tiling_is_that_of_the_design():
    rank, out = 5, 12
    want = [
        [math.sqrt(rank / out) if j % rank == i else 0.0 for j in range(out)] for i in range(rank)
    ]
    np.testing.assert_allclose(tile(np.eye(rank, dtype=np.float32), out), want, rtol=1e-6)
