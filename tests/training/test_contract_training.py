"""Every method trains its adapters alone: no base kernel moves or has its gradient formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import CASES, DORA, UNIFORM, case_id, every_method
from support.checks import assert_trees_equal, equations
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import adapter_shapes
from zflora_jax.config import METHODS, AdapterConfig, OptimConfig
from zflora_jax.core import trees
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import TrainStep, init_state


# twin of the others: test_init_adapters, where every block of theirs has a gradient
@pytest.mark.parametrize("adapter", always(CASES, [DORA, UNIFORM].__contains__), ids=case_id)
def test_only_adapters_move_and_no_base_gradient_is_formed(adapter, tokens):
    model = tiny_model()
    before = jax.tree.map(np.array, model.params)
    optim = OptimConfig(warmup_steps=0)
    state = init_state(perturb(init_adapters(jax.random.key(1), model, adapter)), optim, 3)
    start = jax.tree.map(np.array, state.adapters)
    batch = {"tokens": tokens, "loss_mask": tokens >= 0, "segments": jnp.ones_like(tokens)}
    step = TrainStep(model.config, adapter, optim, 3).jitted()
    state, metrics = step(model.params, state, batch)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert_trees_equal(model.params, before)
    for name, leaf in trees.flatten(state.adapters).items():
        still = np.array_equal(leaf, trees.flatten(start)[name])
        assert still == ("/start_" in name), f"{name}: trained is {not still}"
    moments = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert moments <= set(adapter_shapes(model.config, adapter).values())


@every_method
def test_no_product_forms_a_base_gradient(adapter):
    """The compiled step has no matrix product of the shape of a base kernel's gradient."""
    if adapter.method == "full":
        return
    if METHODS[adapter.method].heads:
        # No block, flat or not, then has the shape of a kernel of tiny.
        adapter = adapter.replace(extra_head_dim=64)
    model = tiny_model(num_layers=1, scan_layers=False)
    state = jax.eval_shape(
        lambda: init_state(init_adapters(jax.random.key(1), model, adapter), OptimConfig(), 100)
    )
    batch = CrossEntropy().arrays(2, 24, packed=True)
    step = TrainStep(model.config, adapter, OptimConfig(), 100).jitted()
    shapes = {
        tuple(sorted(equation.outvars[0].aval.shape))
        for equation in equations(jax.make_jaxpr(step)(model.params, state, batch).jaxpr)
        if equation.primitive.name == "dot_general"
    }
    assert shapes, "no products found: the walk is broken"
    leaves = trees.flatten(model.params).items()
    assert not shapes & {tuple(sorted(x.shape)) for name, x in leaves if "kernel" in name}


def test_the_same_arguments_give_the_same_step():
    """A seed matters to dropout alone."""

    def step(dropout, seed, steps=9):
        adapter = AdapterConfig("lora", rank=2, dropout=dropout)
        one = TrainStep(tiny_model().config, adapter, OptimConfig(), steps, seed=seed)
        return one.jitted()

    assert step(0.0, 1) is step(0.0, 2) is not step(0.0, 1, steps=8)
    assert step(0.5, 1) is step(0.5, 1) is not step(0.5, 2)
