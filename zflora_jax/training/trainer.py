"""One training step and one evaluation step, as compiled functions, and the state that they change.

Only the adapter tree is differentiated. The base enters as a constant argument, so no gradient of a
base kernel is formed.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from zflora_jax.core.trees import Tree, stack_layers, unstack_layers
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
Own = tuple[Any, Any]  # a run's peak learning rate, float32, and seed of dropout, uint32


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

    config: LlamaConfig  # the base's
    adapter: AdapterConfig
    optim: OptimConfig
    steps: int  # length of the whole run, for the learning rate
    objective: Objective = CROSS_ENTROPY
    grad_accum_steps: int = 1  # micro-batches per batch
    seed: int = 0  # dropout's, which draws only by seed, step and number of the micro-batch
    scan_layers: bool = True  # else each layer is compiled for itself

    @classmethod
    def of(cls, run: RunConfig, config: LlamaConfig) -> TrainStep:
        """The step that the settings of `run` choose, on a base of `config`."""
        how = objective_of(run), run.data.grad_accum_steps, run.train.seed, run.train.scan_layers
        return cls(config, run.adapter, run.optim, run.steps, *how)

    def jitted(self, state_sharding: Any = None) -> StepFn:
        """The compiled step, shared by equal steps; it donates `state`. state_sharding: Sharding of
        the new state (`sharding.state_shardings`); None on one device.
        """
        step = self if self.adapter.dropout else replace(self, seed=0)
        return _jitted(step, *_flat(state_sharding))

    def divided(self) -> tuple[TrainStep, Own]:
        """Returns the step at rate 1 and seed 0, and its rate and seed. Rates scale updates."""
        own = np.float32(self.optim.learning_rate), np.uint32(self.seed)
        return replace(self, optim=replace(self.optim, learning_rate=1.0), seed=0), own

    def __call__(
        self, params: Tree, state: TrainState, batch: Batch, own: Own | None = None
    ) -> tuple[TrainState, Metrics]:
        """Makes the step. own: Rate and seed, for a step that is `divided`."""
        factor, seed = (1.0, self.seed) if own is None else own
        with at_precision(self.config.execution.matmul_precision):
            sums, grads = self._accumulated(params, state, batch, seed)

        def mean(x: Array) -> Array:
            # One maximum per use: XLA rounds differently when it divides by a shared one.
            return x / jnp.maximum(sums.divisor, 1.0)

        grads = jax.tree.map(mean, grads)
        optimizer = make_optimizer(self.optim, self.steps)
        # optax mixes Python floats with int32 counters; our own code also runs under "strict".
        with jax.numpy_dtype_promotion("standard"), jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
            updates = jax.tree.map(lambda x: factor * x, updates)
            adapters = optax.apply_updates(state.adapters, updates)
            norm = optax.tree.norm(grads)
            rate = factor * learning_rate_schedule(self.optim, self.steps)(state.step)
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

    def _accumulated(
        self, params: Tree, state: TrainState, batch: Batch, seed: Any
    ) -> tuple[Sums, Tree]:
        """Sums over the micro-batches: the objective's, and the adapters' gradients."""
        count, config, adapters = self.grad_accum_steps, self.config, state.adapters
        if not self.scan_layers:  # arguments and results stay stacked
            config = config.replace(scan_layers=False)
            params, adapters = (unstack_layers(x, config.num_layers) for x in (params, adapters))
        # Every count-th row, so that each device's rows are spread over the micro-batches evenly.
        micros = {k: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}
        rngs = _dropout_keys(seed, state.step, count) if self.adapter.dropout else None

        def sums_of(adapters: Tree, micro: Batch, rngs: Any) -> tuple[Array, Sums]:
            variables = {"params": params, "adapters": adapters}
            sums = self.objective(config, self.adapter, variables, micro, rngs)
            return sums.loss, sums

        def add(total: tuple[Sums, Tree], part: tuple[Batch, Any]) -> Any:
            (_, sums), grads = jax.value_and_grad(sums_of, has_aux=True)(adapters, *part)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        zero = jnp.zeros(())
        sums = Sums(zero, zero, dict.fromkeys(self.objective.metrics, zero))
        start = sums, jax.tree.map(jnp.zeros_like, adapters)
        sums, grads = jax.lax.scan(add, start, (micros, rngs))[0]
        return sums, grads if self.scan_layers else stack_layers(grads, config.num_layers)


def step_of(run: RunConfig, config: LlamaConfig, state_sharding: Any = None) -> StepFn:
    """The compiled step of the settings of `run`, on a base of `config`."""
    return TrainStep.of(run, config).jitted(state_sharding)


def make_steps(
    steps: Sequence[TrainStep], state_sharding: Any, params: Tree, states: Any, batches: Any
) -> list[tuple[TrainState, Metrics]]:
    """Makes a step of each of several runs over one base in one call. Their adapters, optimizer
    states and rows are stacked, so all share one product with each base kernel. Donates `states`, a
    list like `batches`. steps: Equal once `TrainStep.divided`; a single one is made unstacked.
    """
    if len(steps) == 1:
        return [steps[0].jitted(state_sharding)(params, states[0], batches[0])]
    parts = [step.divided() for step in steps]
    together = _jitted(parts[0][0], *_flat(state_sharding), len(steps))
    return together(params, states, batches, [own for _, own in parts])


def _flat(tree: Any) -> tuple[Any, tuple[Any, ...]]:
    """A tree as hashable values: its structure and its leaves."""
    leaves, form = jax.tree.flatten(tree)
    return form, tuple(leaves)


@functools.lru_cache(maxsize=16)
def _jitted(step: TrainStep, form: Any, leaves: tuple[Any, ...], runs: int | None = None) -> Any:
    """`step` for one run, or for `runs` of them. form, leaves: `_flat` of a state's sharding."""

    def train_step(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(params, state, batch)

    def train_steps(params: Tree, states: Any, batches: Any, own: Any) -> Any:
        every = (states, batches, own)
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in every]
        made = jax.vmap(step, in_axes=(None, 0, 0, 0))(params, *stacked)
        leaves, form = jax.tree.flatten(made)
        return [jax.tree.unflatten(form, own) for own in zip(*leaves, strict=True)]

    where = jax.tree.unflatten(form, leaves), None
    options = None if step.objective.excess_precision else {"xla_allow_excess_precision": False}
    settings: Any = {"donate_argnums": 1, "compiler_options": options}
    if runs is None:
        return jax.jit(train_step, out_shardings=where, **settings)
    return jax.jit(train_steps, out_shardings=[where] * runs, **settings)


def _dropout_keys(seed: Any, step: Array, count: int) -> dict[str, Array]:
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
    """Compiled `objective` without gradients, with the same arguments and result."""
    return objective(config, adapter, variables, batch)
