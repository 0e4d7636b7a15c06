"""Train steps of a tiny model on a mesh, with a batch that eight devices divide."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from support.models import perturb, tiny_model
from zflora_jax import AdapterConfig, Model, init_adapters
from zflora_jax.core.run_config import MeshConfig, OptimConfig
from zflora_jax.core.trees import Tree
from zflora_jax.parallel import sharding
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import TrainState, TrainStep, init_state

# With Adam's usual eps the first updates are the signs of the gradients, and those of gradients
# near zero are rounding.
OPTIM = OptimConfig(warmup_steps=0, learning_rate=1e-2, eps=1e-3)


def sharded_model(**changes: Any) -> Model:
    """A tiny model whose every dimension 8 divides."""
    return tiny_model(num_heads=8, num_kv_heads=8, head_dim=8, vocab_size=264, **changes)


def batch(rows: int = 8, length: int = 24) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[1, 10:] = 2
    segments[2, 20:] = 0
    return {
        "tokens": draw.integers(0, 250, (rows, length)).astype(np.int32),
        "loss_mask": (draw.random((rows, length)) < 0.6) & (segments > 0),
        "segments": segments,
    }


def pairs(rows: int = 8, length: int = 24) -> dict[str, np.ndarray]:
    """Pairs of two halves of a row."""
    found = batch(rows, length)
    segments = np.broadcast_to(1 + 2 * np.arange(length, dtype=np.int32) // length, (rows, length))
    learned = np.broadcast_to(np.arange(length) % (length // 2) > 3, (rows, length))
    return found | {"segments": segments, "loss_mask": learned}


def sharded_step(
    model: Model,
    adapter: AdapterConfig,
    mesh_config: MeshConfig,
    rows: dict[str, np.ndarray] | None = None,
    *,
    optim: OptimConfig = OPTIM,
    state: TrainState | None = None,
    std: float = 0.02,
    **settings: Any,
) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """Mesh, train step, and its arguments where they belong; std: of the noise on the adapters."""
    mesh = sharding.make_mesh(mesh_config)
    if state is None:
        adapters = perturb(init_adapters(jax.random.key(0), model, adapter), 1, std)
        state = init_state(adapters, optim, 10)
    where = sharding.state_shardings(state, mesh)
    settings = {"objective": CrossEntropy(32)} | settings
    step = TrainStep(model.config, adapter, optim, 10, **settings).jitted(where)
    placed = jax.device_put(rows or batch(), sharding.batch_sharding(mesh))
    return mesh, step, (sharding.shard(model.params, mesh), jax.device_put(state, where), placed)


def three_steps(*args: Any, **settings: Any) -> tuple[np.ndarray, Tree]:
    """Loss, gradient norm and tokens (or pairs) of three steps [3, 3], and the trained adapters.
    The arguments are those of `sharded_step`.
    """
    mesh, step, (params, state, rows) = sharded_step(*args, **settings)
    where, found = jax.tree.map(lambda x: x.sharding, state), []
    names = "loss", "grad_norm", settings.get("objective", CrossEntropy).unit
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, metrics = step(params, state, rows)
            found.append([float(metrics[name]) for name in names])
    # The state stays where it was put.
    assert jax.tree.map(lambda x: x.sharding, state) == where
    return np.asarray(found), jax.device_get(state.adapters)
