"""An optimizer does what its settings say. Every row of OPTIMIZERS trains, goes on from a
checkpoint bit for bit, is divided over a mesh and counted in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.grids import always
from support.models import tiny_model
from support.sharded import batch, sharded_step

from zflora_jax import AdapterConfig, init_adapters
from zflora_jax.core import trees
from zflora_jax.core.run_config import MeshConfig, OptimConfig, RunConfig
from zflora_jax.experiments.plan import stored_bytes
from zflora_jax.parallel import sharding
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.optim import OPTIMIZERS, learning_rate_schedule, make_optimizer
from zflora_jax.training.trainer import TrainState, init_state

STEPS = 5
# Wide enough that Adafactor keeps sums over rows and columns.
WIDE = {"num_heads": 4, "num_kv_heads": 4, "hidden_size": 128, "intermediate_size": 256}
FULL = AdapterConfig("full")


def settings(optimizer: str) -> OptimConfig:
    """At which a few steps on one batch lower its loss."""
    rate = {"sgd": 0.3, "lion": 3e-4}.get(optimizer, 3e-3)
    return OptimConfig(rate, "constant", warmup_steps=0, eps=1e-3, optimizer=optimizer)


def training(
    optimizer: str, adapter: AdapterConfig, mesh_config: MeshConfig, state: TrainState | None = None
) -> Iterator[tuple[TrainState, float]]:
    """The states and losses of steps on one batch, from `state` on."""
    model, given = tiny_model(num_layers=2, **WIDE), {"optim": settings(optimizer), "std": 0.01}
    tokens = batch(4, 16)["tokens"]
    rows = {"tokens": tokens, "loss_mask": tokens >= 0, "segments": np.ones_like(tokens)}
    mesh, step, (params, state, rows) = sharded_step(
        model, adapter, mesh_config, rows, state=state, **given
    )
    with jax.set_mesh(mesh):
        for _ in range(int(state.step), STEPS):
            state, metrics = step(params, state, rows)
            yield jax.tree.map(np.asarray, state), float(metrics["loss"])


@pytest.mark.parametrize(
    ("optimizer", "adapter"),
    always(
        [(o, a) for o in OPTIMIZERS for a in (FULL, AdapterConfig("zflora-minimal", rank=8))],
        lambda case: case == ("adafactor", FULL),
    ),
)
def test_it_trains_resumes_and_shards(optimizer, adapter, tmp_path):
    whole = list(training(optimizer, adapter, MeshConfig()))
    losses = [loss for _, loss in whole]
    assert losses[-1] < losses[0]

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.tree.map(jax.numpy.asarray, whole[2][0]), {})
    with Checkpoints(tmp_path, create=False) as checkpoints:
        saved, _ = checkpoints.restore(whole[2][0])
    resumed = list(training(optimizer, adapter, MeshConfig(), saved))
    assert [loss for _, loss in resumed] == losses[3:]
    for have, want in zip(*map(jax.tree.leaves, (resumed[-1][0], whole[-1][0])), strict=True):
        np.testing.assert_array_equal(have, want)

    divided = [loss for _, loss in training(optimizer, adapter, MeshConfig(data=2, fsdp=2))]
    np.testing.assert_allclose(divided, losses, rtol=2e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_state_is_counted(optimizer):
    model = tiny_model(num_layers=2, **WIDE)
    run = RunConfig(adapter=FULL, optim=settings(optimizer), mesh=MeshConfig(fsdp=4))
    mesh = sharding.make_mesh(run.mesh)

    def fresh() -> TrainState:
        return init_state(init_adapters(jax.random.key(0), model, FULL), run.optim, STEPS)

    where = sharding.state_shardings(jax.eval_shape(fresh), mesh)
    state: Any = jax.jit(fresh, out_shardings=where)().opt_state
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert stored_bytes(run, model.config)["optimizer"] == held


# --- one update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_and_decays_to_the_final_fraction(schedule, warmup):
    rate = learning_rate_schedule(OptimConfig(2.0, schedule, warmup, 0.1), warmup + 20)
    with jax.numpy_dtype_promotion("standard"):
        values = [float(rate(step)) for step in range(warmup + 21)]
    rise = np.linspace(0.25, 2.0, 9)[:warmup]
    np.testing.assert_allclose(values[:warmup], rise, rtol=1e-5)
    done = np.arange(21) / 20
    left = {"cosine": (1 + np.cos(np.pi * done)) / 2, "linear": 1 - done, "constant": 1 + 0 * done}
    np.testing.assert_allclose(values[warmup:], 2 * (0.1 + 0.9 * left[schedule]), rtol=1e-5)


def one_update(optim: OptimConfig, params: trees.Tree, grads: trees.Tree) -> tuple[Any, Any]:
    """(updates by name, the optimizer's state)."""
    with jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(optim, 10_000)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
    return trees.flatten(updates), state


PLAIN = OptimConfig(learning_rate=0.1, schedule="constant", warmup_steps=0)


def test_weight_decay_skips_norm_gains_and_biases():
    q = {name: jnp.ones(3) for name in ("kernel", "forward", "bias")}
    params = {"final_norm": {"scale": jnp.ones(4)}, "layers": {"attn": {"q": q}}}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = one_update(replace(PLAIN, weight_decay=0.5), params, zero)
    for name, update in updates.items():
        wanted = 0.0 if name.endswith(("scale", "bias")) else -0.05
        np.testing.assert_allclose(update, wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("clip", [1.0, None])
def test_lora_plus_ratio_is_of_the_blocks_that_write_to_the_base(clip):
    names = ("lora_a", "lora_b", "forward", "backward", "cross")
    params = {"layers": {"attn": {"q": {name: jnp.zeros(2) for name in names}}}}
    grads, optim = jax.tree.map(jnp.ones_like, params), replace(PLAIN, clip_norm=clip)
    plain, _ = one_update(optim, params, grads)
    plus, _ = one_update(replace(optim, loraplus_ratio=4.0), params, grads)
    for name, update in plain.items():
        times = 4 if name.endswith(("lora_b", "backward")) else 1
        np.testing.assert_allclose(plus[name], update * times, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("clip", [0.5, 2.0, None])
def test_gradients_are_clipped_by_their_global_norm(clip):
    """Seen through Adam's first moment, which is (1 - b1) * clipped gradient after one step."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.asarray([0.6, 0.0]), "b": jnp.asarray([0.8])}  # norm 1
    _, state = one_update(OptimConfig(clip_norm=clip, b1=0.5), params, grads)
    moment = optax.tree_utils.tree_get(state, "mu")
    wanted = 0.5 * min(1.0, clip or 1.0) * np.asarray([0.6, 0.0, 0.8])
    np.testing.assert_allclose(np.concatenate([moment["a"], moment["b"]]), wanted, rtol=1e-6)
