"""One training step and one evaluation step, as compiled functions, and the state that they change.

Only the adapter tree is differentiated. The base enters as a constant argument, so no gradient of a
base kernel is formed.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import OptimConfig, RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.precision import at_config_precision, at_precision
from zflora_jax.training.objective import CROSS_ENTROPY, Batch, Objective, Sums, objective_of
from zflora_jax.training.optim import learning_rate_schedule, make_optimizer

Array = jax.Array
Metrics = dict[str, Array]  # float32 scalars by name


@flax.struct.dataclass
class TrainState:
    """The state that training changes: the number of finished steps, an int32 scalar, the trained
    tree, float32, and the optimizer's state.
    """

    step: Array
    adapters: Tree
    opt_state: Any


StepFn = Callable[[Tree, TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(adapters: Tree, optim: OptimConfig, steps: int) -> TrainState:
    """The state before the first of `steps` steps, with these `adapters`."""
    opt_state = make_optimizer(optim, steps).init(adapters)
    return TrainState(jnp.zeros((), jnp.int32), adapters, opt_state)


def fresh_state(run: RunConfig, model: Model, start: Tree | None = None) -> TrainState:
    """The state before the first step of `run`; start: Adapters of `split_base`, None to draw."""
    if start is None:
        start = init_adapters(jax.random.key(run.train.seed), model, run.adapter)
    return init_state(start, run.optim, run.steps)


@dataclass(frozen=True)
class TrainStep:
    """One training step as a function (params, state, batch) -> (state, metrics).

    Losses and gradients of the micro-batches are summed, and divided by the objective's divisor
    once: the result does not depend on `grad_accum_steps`, except for the draws of dropout.
    Metrics: loss (mean), the divisor under `objective.unit`, the means of `objective.metrics`,
    grad_norm (before clipping), learning_rate, and finite (1.0 if all new adapter weights are).

    """

    config: LlamaConfig  # of the base
    adapter: AdapterConfig
    optim: OptimConfig
    steps: int  # of the whole run, which the learning rate follows
    objective: Objective = CROSS_ENTROPY
    grad_accum_steps: int = 1  # micro-batches of a batch
    seed: int = 0  # of dropout, which draws by seed, step and number of the micro-batch only

    def __call__(self, params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with at_precision(self.config.execution.matmul_precision):
            sums, grads = self._accumulated(params, state, batch)

        def mean(x: Array) -> Array:
            # A maximum for each: XLA divides by a shared one with other rounding.
            return x / jnp.maximum(sums.divisor, 1.0)

        grads = jax.tree.map(mean, grads)
        optimizer = make_optimizer(self.optim, self.steps)
        # optax mixes Python floats with int32 counters; our own code also runs under "strict".
        with jax.numpy_dtype_promotion("standard"), jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
            adapters = optax.apply_updates(state.adapters, updates)
            norm = optax.tree.norm(grads)
            rate = learning_rate_schedule(self.optim, self.steps)(state.step)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(adapters)])
        metrics = {
            "loss": mean(sums.loss),
            self.objective.unit: sums.divisor,
            **jax.tree.map(mean, sums.metrics),
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "finite": finite.all().astype(jnp.float32),
        }
        return TrainState(state.step + 1, adapters, opt_state), metrics

    def _accumulated(self, params: Tree, state: TrainState, batch: Batch) -> tuple[Sums, Tree]:
        """Sums over the micro-batches: the objective's, and of gradients of the adapters."""
        count = self.grad_accum_steps
        # Every count-th row, so that each device's rows are spread over the micro-batches evenly.
        micros = {k: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}
        rngs = _dropout_keys(self.seed, state.step, count) if self.adapter.dropout else None

        def sums_of(adapters: Tree, micro: Batch, rngs: Any) -> tuple[Array, Sums]:
            variables = {"params": params, "adapters": adapters}
            sums = self.objective(self.config, self.adapter, variables, micro, rngs)
            return sums.loss, sums

        def add(total: tuple[Sums, Tree], part: tuple[Batch, Any]) -> Any:
            (_, sums), grads = jax.value_and_grad(sums_of, has_aux=True)(state.adapters, *part)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        zero = jnp.zeros(())
        sums = Sums(zero, zero, dict.fromkeys(self.objective.metrics, zero))
        start = sums, jax.tree.map(jnp.zeros_like, state.adapters)
        return jax.lax.scan(add, start, (micros, rngs))[0]


def make_train_step(
    config: LlamaConfig,
    adapter: AdapterConfig,
    optim: OptimConfig,
    steps: int,
    *,
    state_sharding: Any = None,
    **settings: Any,
) -> StepFn:
    """A `TrainStep` of these attributes as a jitted function that donates `state`; runs get theirs
    from `step_of`. The same arguments give the same function, so that runs of one process compile
    it once. state_sharding: Where the new state lies (`sharding.state_shardings`); None on one
    device.
    """
    if not adapter.dropout:
        settings["seed"] = 0
    leaves, form = jax.tree.flatten(state_sharding)
    return _jitted(TrainStep(config, adapter, optim, steps, **settings), form, tuple(leaves))


@functools.lru_cache(maxsize=8)
def _jitted(step: TrainStep, form: Any, leaves: tuple[Any, ...]) -> StepFn:
    """`step` compiled; `form` and `leaves` are the state's sharding, hashable."""

    def train_step(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(params, state, batch)

    where = jax.tree.unflatten(form, leaves)
    options = None if step.objective.excess_precision else {"xla_allow_excess_precision": False}
    settings: Any = {"donate_argnums": 1, "compiler_options": options}
    return jax.jit(train_step, out_shardings=(where, None), **settings)


def step_of(run: RunConfig, config: LlamaConfig, state_sharding: Any = None) -> StepFn:
    """`make_train_step` with the settings of `run`, on a base of `config`."""
    return make_train_step(
        config,
        run.adapter,
        run.optim,
        run.steps,
        objective=objective_of(run),
        grad_accum_steps=run.data.grad_accum_steps,
        seed=run.train.seed,
        state_sharding=state_sharding,
    )


def _dropout_keys(seed: int, step: Array, count: int) -> dict[str, Array]:
    """A random key for each of `count` micro-batches of `step`: {"dropout": key [count]}."""
    stream = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(b"dropout")))
    own = jax.random.fold_in(stream, step)
    return {"dropout": jax.vmap(functools.partial(jax.random.fold_in, own))(jnp.arange(count))}


@jax.jit(static_argnums=(0, 1, 4))
@at_config_precision
def eval_step(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    batch: Batch,
    objective: Objective = CROSS_ENTROPY,
) -> Sums:
    """`objective` without gradients, compiled; its arguments and result are the same."""
    return objective(config, adapter, variables, batch)
