"""Several tasks on one base: swaps leave the base's bits and compile nothing."""

from __future__ import annotations

import itertools
import weakref
from functools import partial

import jax
import numpy as np
import pytest
from support.checks import assert_trees_equal, compiled
from support.models import perturb, untied

from zflora_jax import AdapterConfig, ConfigError, forward, generate_tokens, init_adapters, save_hf
from zflora_jax.adapters import fuse as fusing
from zflora_jax.adapters.fuse import fuse, swap, unfuse
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.model import Model, fingerprint

MINIMAL = AdapterConfig("zflora-minimal", rank=6, alpha=9.0, extra_mlp_units=6)
PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [100], [4, 4, 8, 1]]


@pytest.fixture(scope="module")
def base() -> Model:
    return untied()


def adapters_of(model: Model, adapter: AdapterConfig, seed: int) -> trees.Tree:
    return perturb(init_adapters(jax.random.key(seed), model, adapter), seed=seed)


@pytest.mark.parametrize("packed", [False, True])
def test_a_hundred_swaps_compile_once_and_leave_the_base(base, packed):
    tasks = [adapters_of(base, MINIMAL, seed) for seed in (1, 2)]
    want = [generate_tokens(fuse(base, MINIMAL, task), PROMPTS, max_new_tokens=8) for task in tasks]
    assert want[0] != want[1]
    fused = fuse(base, MINIMAL, tasks[0])
    first = pack_for_decode(fused) if packed else fused
    kept = jax.tree.map(np.asarray, first.params)
    live = swap(first, tasks[1])
    assert generate_tokens(live, PROMPTS, max_new_tokens=8) == want[1]
    compiled = fusing._swap._cache_size()
    for turn in range(101):
        live = swap(live, tasks[turn % 2])
    assert fusing._swap._cache_size() == compiled
    assert_trees_equal(live.params, kept)  # the last was task 0
    assert generate_tokens(live, PROMPTS, max_new_tokens=8) == want[0]
    if not packed:
        assert_trees_equal(unfuse(live)[0].params, base.params)


def test_what_was_changed_or_given_away_is_noticed(tmp_path):
    answer, base = partial(generate_tokens, prompts=PROMPTS, max_new_tokens=4), untied()
    before, task = answer(base), adapters_of(base, MINIMAL, 1)
    base.params["embed"]["embedding"] = jax.numpy.roll(base.params["embed"]["embedding"], 7, axis=0)
    assert answer(base) == answer(Model(base.config, base.params)) != before
    kept = weakref.ref(jax.tree.leaves(base.params["layers"])[0])
    live, _ = fuse(base, MINIMAL, task), fingerprint(base)
    assert answer(live) and swap(live, task)
    answer(fuse(base, MINIMAL, task, donate=True))
    assert kept() is None
    uses = answer, partial(forward, tokens=[[1]]), lambda model: save_hf(tmp_path, model)
    for gone, last in ((live, unfuse), (base, partial(fuse, adapter=MINIMAL, adapters=task))):
        for use in (*uses, last):
            with pytest.raises(ConfigError, match=r"of this model were donated: `swap` writes"):
                use(gone)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("method", "packed"),
    list(itertools.product(["ffba", "zflora-minimal", "zflora-uniform"], [True, False])),
)
@pytest.mark.soak  # of time; a hundred swaps are above
def test_a_swap_copies_no_kernel(base, method, packed):
    """It allocates less than one layer's smallest kernel on top of the donated buffers."""
    adapter = AdapterConfig(method, rank=4)
    adapters = adapters_of(base, adapter, 1)
    model = fuse(base, adapter, adapters)
    model = pack_for_decode(model) if packed else model
    narrow = base_config(model.config.replace(packed=False), adapter)
    lowered = fusing._swap.lower(model.config, narrow, adapter, model.params, adapters)
    memory = compiled(lowered).memory_analysis()
    kernels = [
        leaf.nbytes for name, leaf in trees.flatten(model.params).items() if name.endswith("kernel")
    ]
    assert memory.alias_size_in_bytes >= sum(kernels)
    assert memory.temp_size_in_bytes < min(kernels) / (1 if packed else base.config.num_layers)
