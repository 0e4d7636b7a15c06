"""One training step and one evaluation step, as compiled functions, and the state that they change.

Only the adapter tree is differentiated. The base enters as a constant argument, so no gradient of a
base kernel is formed.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import OptimConfig, RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.nn.llama import Llama
from zflora_jax.ops.precision import at_config_precision, at_precision
from zflora_jax.parallel.sharding import batch_shards, gather_fsdp
from zflora_jax.training.loss import masked_cross_entropy
from zflora_jax.training.optim import learning_rate_schedule, make_optimizer

Array = jax.Array
# Tokens int32, loss_mask bool, segments int32, each [B, T]; see data.pipeline. Without segments
# each row is one sequence, padded on the right, where no real token sees it.
Batch = Mapping[str, Any]
Metrics = dict[str, Array]  # float32 scalars by name


def non_finite(what: str) -> NonFiniteError:
    """The error that ends training because of `what`."""
    return NonFiniteError(
        f"{what}; training stopped, the last checkpoint is from an earlier step and intact. "
        "Try a lower learning rate, or float32 instead of bfloat16."
    )


@flax.struct.dataclass
class TrainState:
    """What training changes.

    Attributes:
      step: int32 scalar, the number of finished steps.
      adapters: the trainable tree, float32.
      opt_state: of the optax optimizer.
    """

    step: Array
    adapters: Tree
    opt_state: Any


StepFn = Callable[[Tree, TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(adapters: Tree, optim: OptimConfig, steps: int) -> TrainState:
    """The state before the first of `steps` steps, with these `adapters`."""
    return TrainState(
        jnp.zeros((), jnp.int32), adapters, make_optimizer(optim, steps).init(adapters)
    )


def fresh_state(run: RunConfig, model: Model) -> TrainState:
    """The state before the first step of `run` on the base `model`."""
    adapters = init_adapters(jax.random.key(run.train.seed), model, run.adapter)
    return init_state(adapters, run.optim, run.train.steps)


def batch_loss(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    batch: Batch,
    chunk: int,
    rngs: dict[str, Array] | None = None,
) -> tuple[Array, Array]:
    """Summed cross-entropy of a batch on the tokens that its loss_mask chooses.

    Args:
      config: of the base.
      adapter: how `variables` are adapted, None for the base alone.
      variables: {"params": ..., "adapters": ...}.
      batch: see `Batch`, arrays [B, T].
      chunk: how many positions have logits at one time.
      rngs: {"dropout": key} in training with dropout.

    Returns:
      (sum in nats, number of tokens), float32 scalars.
    """
    llama = Llama(config, adapter)
    hidden, _ = llama.apply(
        variables, batch["tokens"], segment_ids=batch.get("segments"), method="hidden", rngs=rngs
    )  # type: ignore[misc]
    name = "embed/embedding" if config.tie_word_embeddings else "lm_head/kernel"
    # Gathered once, ahead of the loop over chunks; the lookup has the divided table.
    head = {
        kind: trees.map_with_names(lambda n, x: gather_fsdp(n, x) if n == name else x, tree)
        for kind, tree in variables.items()
    }
    return masked_cross_entropy(
        lambda x: llama.apply(head, x, method="logits"),  # type: ignore[return-value,arg-type]
        hidden,
        batch["tokens"],
        batch["loss_mask"],
        chunk,
        batch_shards(),
    )


def make_train_step(
    config: LlamaConfig,
    adapter: AdapterConfig,
    optim: OptimConfig,
    steps: int,
    grad_accum_steps: int = 1,
    chunk: int = 256,
    state_sharding: Any = None,
    seed: int = 0,
) -> StepFn:
    """Compile one training step. The same arguments give the same function, so that runs of one
    process that differ in their data alone trace and compile it once.

    The losses and gradients of the micro-batches are summed, and divided by the number of tokens
    once: the result does not depend on `grad_accum_steps`, except for what dropout draws.

    Args:
      config: of the base.
      adapter: what is trained.
      optim: the optimizer and its learning rate.
      steps: of the whole run, which the learning rate follows.
      grad_accum_steps: number of micro-batches of a batch [B, T]; divides B.
      chunk: how many positions have logits at one time.
      state_sharding: where the new state lies (`sharding.state_shardings`); None on one device.
      seed: of dropout, which draws by the seed, the step and the number of the micro-batch alone.

    Returns:
      A jitted function (params, state, batch) -> (state, metrics); `state` is donated. metrics are
      float32 scalars: loss (mean per token), tokens, grad_norm (before clipping), learning_rate,
      and finite (1.0 if all numbers of the new adapters are, else 0.0).
    """
    where, form = jax.tree.flatten(state_sharding)
    used_seed = seed if adapter.dropout else 0
    return _train_step(
        config, adapter, optim, steps, grad_accum_steps, chunk, used_seed, form, tuple(where)
    )


@functools.lru_cache(maxsize=8)
def _train_step(
    config: LlamaConfig,
    adapter: AdapterConfig,
    optim: OptimConfig,
    steps: int,
    grad_accum_steps: int,
    chunk: int,
    seed: int,
    form: Any,
    where: tuple[Any, ...],
) -> StepFn:
    """`make_train_step`; the state's sharding is given by its leaves and the form of its tree."""
    optimizer, schedule = make_optimizer(optim, steps), learning_rate_schedule(optim, steps)
    state_sharding = jax.tree.unflatten(form, where)

    def loss_sum(adapters: Tree, params: Tree, micro: Batch, rngs: Any) -> tuple[Array, Array]:
        variables = {"params": params, "adapters": adapters}
        return batch_loss(config, adapter, variables, micro, chunk, rngs)

    @jax.jit(donate_argnums=1, out_shardings=(state_sharding, None))
    def train_step(params: Tree, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rngs = _dropout_keys(seed, state.step, grad_accum_steps) if adapter.dropout else None
        with at_precision(config.execution.matmul_precision):
            loss, tokens, grads = _accumulated(
                loss_sum, params, state.adapters, batch, rngs, grad_accum_steps
            )
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1.0), grads)
        # optax mixes Python floats with int32 counters; our own code also runs under "strict".
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
            adapters = optax.apply_updates(state.adapters, updates)
            norm, rate = optax.tree.norm(grads), schedule(state.step)
        metrics = {
            "loss": loss / jnp.maximum(tokens, 1.0),
            "tokens": tokens,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "finite": _all_finite(adapters).astype(jnp.float32),
        }
        return TrainState(state.step + 1, adapters, opt_state), metrics

    return train_step


def _dropout_keys(seed: int, step: Array, count: int) -> dict[str, Array]:
    """A random key for each of `count` micro-batches of `step`: {"dropout": key [count]}."""
    stream = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(b"dropout")))
    own = jax.random.fold_in(stream, step)
    return {"dropout": jax.vmap(functools.partial(jax.random.fold_in, own))(jnp.arange(count))}


def _accumulated(
    loss_sum: Callable[..., tuple[Array, Array]],
    params: Tree,
    adapters: Tree,
    batch: Batch,
    rngs: dict[str, Array] | None,
    count: int,
) -> tuple[Array, Array, Tree]:
    """Sums over `count` micro-batches: of losses, of tokens, of gradients of `adapters`."""
    # Every count-th row, so that each device's rows are spread over the micro-batches evenly.
    micros = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def add(
        total: tuple[Array, Array, Tree], part: tuple[Batch, Any]
    ) -> tuple[tuple[Array, Array, Tree], None]:
        (loss, tokens), grads = jax.value_and_grad(loss_sum, has_aux=True)(adapters, params, *part)
        return jax.tree.map(jnp.add, total, (loss, tokens, grads)), None

    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapters))
    return jax.lax.scan(add, zero, (micros, rngs))[0]


def _all_finite(tree: Tree) -> Array:
    """Whether no number of `tree` is NaN or infinite, a bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@jax.jit(static_argnums=(0, 1, 4))
@at_config_precision
def eval_step(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    batch: Batch,
    chunk: int = 256,
) -> tuple[Array, Array]:
    """`batch_loss` without gradients, compiled: (sum in nats, number of tokens)."""
    return batch_loss(config, adapter, variables, batch, chunk)
