"""Blocks that can change nothing: which they are, that they are not counted, and that they stay
zero.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from support.cases import adapter_cases, case_id, dead_slices, is_few
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import adapter_shapes, live_layers, resolve_adapter
from zflora_jax.adapters.widths import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import OptimConfig
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import init_state, make_train_step

OPTIM = OptimConfig(warmup_steps=0, learning_rate=1e-2, weight_decay=0.1)
TINY = preset("tiny")  # d 64, heads 4/2 of 16, f 96, 2 layers


@pytest.mark.parametrize(
    ("method", "targets", "dead"),
    [
        ("zflora-minimal", "all", {"q": [0], "k": [0], "v": [0], "down": [3]}),
        ("zflora-minimal", "attention", {"q": [0], "k": [0], "v": [0], "o": [3]}),
        # Nothing writes before layer 0's down.
        ("zflora-minimal", "mlp", {"gate": [0], "up": [0], "down": [3]}),
        ("zflora-minimal", "q|down", {"q": [0], "down": [3]}),
        ("zflora-minimal", "q|o|down", {"q": [0], "o": [3], "down": [3]}),
        ("zflora-minimal", "o|up", {}),
        ("zflora-uniform", "all", {"q": [0], "k": [0], "v": [0], "down": [3]}),
        ("ffba", "all", {}),
        ("lora", "all", {}),
        ("ffa", "all", {}),
    ],
)
def test_dead_layers(method, targets, dead):
    """Where the state is read before it is written, or written after it was last read. What stays
    within a layer is never dead.
    """
    config, adapter = TINY.replace(num_layers=4), AdapterConfig(method, rank=6, targets=targets)
    live = live_layers(config, adapter)
    for kernel, names in live.items():
        state = ("forward" if kernel in ("o", "down") else "backward", "cross")
        for block, layers in names.items():
            want = dead.get(kernel, []) if block in state else []
            assert [i for i in range(4) if i not in layers] == want, (kernel, block)
    assert set(live) == set(resolve_adapter(config, adapter).blocks)


def test_counts_of_llama_3_2_1b_by_hand():
    """d 2048, 32 and 8 heads of 64, f 8192, 16 layers, r = m = 32: 2.0% of what is stored
    is dead.
    """
    config, r = preset("llama-3.2-1b"), 32
    adapter = AdapterConfig("zflora-minimal", rank=r)
    read, written = r * (2048 + 512 + 512), 2048 * r
    mlp = 2 * (2048 * r + r * 8192 + r * r) + (8192 * r + r * 2048 + r * r)
    stored, dead = 16 * (read + written + mlp), read + 8192 * r + r * r
    shapes = adapter_shapes(config, adapter).values()
    assert stored == sum(math.prod(shape) for shape in shapes) == 18_399_232
    assert count_params(config, adapter) == stored - dead == 18_037_760
    assert round(100 * dead / stored, 1) == 2.0
    only = adapter.replace(targets="attention")  # the last layer's o is dead then
    assert count_params(config, only) == 15 * (read + written)


def test_one_layer_can_be_dead_throughout():
    """With one layer, what o writes reaches gate and up alone."""
    config = TINY.replace(num_layers=1)
    assert count_params(config, AdapterConfig("zflora-minimal", rank=6, targets="attention")) == 0
    assert count_params(config, AdapterConfig("zflora-minimal", rank=6, targets="o|up")) == 6 * (
        64 + 96
    )


TRAINED_CASES = [a for a in adapter_cases() if METHODS[a.method].widens or a.targets == "all"]
# Layers that are left out by choice stay as they are because they are zero (test_lora_variants).
TRAINED_CASES = [a for a in TRAINED_CASES if a.layers_to_transform is None]


@pytest.mark.parametrize(
    "adapter", always([a for a in TRAINED_CASES if a.method != "full"], is_few), ids=case_id
)
def test_gradients_are_zero_where_a_block_is_dead_and_nowhere_else(adapter):
    model = tiny_model(num_layers=3)
    adapters, batch = perturb(init_adapters(jax.random.key(0), model, adapter)), a_batch()

    def loss(adapters: trees.Tree) -> jax.Array:
        variables = {"params": model.params, "adapters": adapters}
        return CrossEntropy(16)(model.config, adapter, variables, batch).loss

    live = live_layers(model.config, adapter)
    for name, gradient in trees.flatten(jax.jit(jax.grad(loss))(adapters)).items():
        *_, kernel, block = name.split("/")
        moved = [bool(np.any(layer)) for layer in np.asarray(gradient)]
        assert moved == [i in live[kernel][block] for i in range(3)], name


def a_batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
    ones = np.ones_like(tokens)
    return {"tokens": tokens, "loss_mask": ones.astype(bool), "segments": ones}


def test_dead_layers_stay_zero_in_training():
    """Weight decay included."""
    model, adapter = tiny_model(), AdapterConfig("zflora-uniform", rank=4)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 5)
    step, batch = make_train_step(model.config, adapter, OPTIM, 5), a_batch()
    for _ in range(2):
        state, _ = step(model.params, state, batch)
    dead = dead_slices(model.config, adapter, state.adapters)
    # Backward and cross of q, k, v; forward and cross of down.
    assert len(dead) == 8 and not any(np.any(x) for x in dead)
    zero = sum(int(np.sum(np.asarray(leaf) == 0)) for leaf in jax.tree.leaves(state.adapters))
    assert zero == sum(x.size for x in dead)
