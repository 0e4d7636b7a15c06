"""Every row of OPTIMIZERS trains, goes on from a checkpoint bit for bit, is divided over a mesh and
counted in the plan; names without a row are refused before anything slow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from support.grids import always
from support.models import perturb, tiny_model
from support.runs import mark_saved

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import MeshConfig, OptimConfig, RunConfig
from zflora_jax.experiments.plan import stored_bytes
from zflora_jax.experiments.train import train
from zflora_jax.parallel import sharding
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.optim import OPTIMIZERS
from zflora_jax.training.trainer import TrainState, init_state, make_train_step
from zflora_jax.training.workdir import adopt, claim

STEPS = 5
# Wide enough that Adafactor keeps sums over rows and columns.
WIDE = {"num_heads": 4, "num_kv_heads": 4, "hidden_size": 128, "intermediate_size": 256}
FULL = AdapterConfig("full")


def settings(optimizer: str) -> OptimConfig:
    # At which a few steps on one batch lower its loss.
    rate = {"sgd": 0.3, "lion": 3e-4}.get(optimizer, 3e-3)
    return OptimConfig(rate, "constant", warmup_steps=0, eps=1e-3, optimizer=optimizer)


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 250, (4, 16)).astype(np.int32)
    return {
        "tokens": tokens,
        "loss_mask": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
    }


def training(
    optimizer: str, adapter: AdapterConfig, mesh_config: MeshConfig, state: TrainState | None = None
) -> Iterator[tuple[TrainState, float]]:
    """The states and losses of steps on one batch, from `state` on."""
    model, mesh = tiny_model(num_layers=2, **WIDE), sharding.make_mesh(mesh_config)
    optim = settings(optimizer)
    if state is None:
        adapters = init_adapters(jax.random.key(1), model, adapter)
        state = init_state(perturb(adapters, std=0.01), optim, STEPS)
    where = sharding.state_shardings(state, mesh)
    step = make_train_step(
        model.config, adapter, optim, STEPS, objective=CrossEntropy(32), state_sharding=where
    )
    params, state = sharding.shard(model.params, mesh), jax.device_put(state, where)
    rows = sharding.put_rows(batch(), 4, mesh)
    with jax.set_mesh(mesh):
        for _ in range(int(state.step), STEPS):
            state, metrics = step(params, state, rows)
            yield jax.tree.map(np.asarray, state), float(metrics["loss"])


@pytest.mark.parametrize(
    ("optimizer", "adapter"),
    always(
        [(o, a) for o in OPTIMIZERS for a in (FULL, AdapterConfig("zflora-minimal", rank=8))],
        lambda case: case[0] in ("lion", "adafactor") and case[1] == FULL,
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


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(fsdp=4)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_state_is_counted(optimizer, mesh_config):
    model = tiny_model(num_layers=2, **WIDE)
    run = RunConfig(adapter=FULL, optim=settings(optimizer), mesh=mesh_config)
    mesh = sharding.make_mesh(mesh_config)

    def fresh() -> TrainState:
        return init_state(init_adapters(jax.random.key(0), model, FULL), run.optim, STEPS)

    where = sharding.state_shardings(jax.eval_shape(fresh), mesh)
    state: Any = jax.jit(fresh, out_shardings=where)().opt_state
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert stored_bytes(run, model.config)["optimizer"] == held


def test_adafactor_keeps_less_than_one_number_a_parameter():
    model = tiny_model(num_layers=2, **WIDE)
    sizes = {
        name: stored_bytes(RunConfig(adapter=FULL, optim=settings(name)), model.config)["optimizer"]
        for name in OPTIMIZERS
    }
    assert sizes["adafactor"] < sizes["lion"] / 4 and sizes["adamw"] == 2 * sizes["lion"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "optim.optimizer",
            "adam",
            r"optim\.optimizer='adam': did you mean 'adamw'\? Allowed: adafactor, adamw, lion, sgd",
        ),
        (
            "train.report_to",
            "tensorboard,wandbb",
            r"report_to\[1\]='wandbb': did you mean 'wandb'\? Allowed: tensorboard, trackio, wandb",
        ),
    ],
)
def test_a_name_without_a_row_is_refused_before_anything_is_made(key, value, message, tmp_path):
    run = override(RunConfig(model="nowhere"), {key: value})
    with pytest.raises(ConfigError, match=message):
        train(run, tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_optimizer(run, tmp_path):
    claim(tmp_path, run)
    mark_saved(tmp_path, 2)
    other = dataclasses.replace(run, optim=dataclasses.replace(run.optim, optimizer="lion"))
    with pytest.raises(ConfigError, match=r"optim\.optimizer: 'adamw' there, 'lion' now"):
        adopt(tmp_path, other)
