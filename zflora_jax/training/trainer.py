"""Training: the state, one step, one evaluation step, one loop. No file formats: saving and logging
are hooks.

Only the adapter tree is differentiated; the base enters as a constant argument, so no gradient of a
base kernel is formed.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import OptimConfig
from zflora_jax.core.trees import Tree
from zflora_jax.nn.llama import Llama
from zflora_jax.ops.precision import at_config_precision, at_precision
from zflora_jax.parallel.sharding import batch_shards, gather_fsdp
from zflora_jax.training.loss import masked_cross_entropy
from zflora_jax.training.optim import learning_rate_schedule, make_optimizer

Array = jax.Array
# Tokens int32, loss_mask bool, segments int32, each [B, T]; see data.pipeline.
Batch = Mapping[str, Any]


class NonFiniteError(RuntimeError):
    """A loss, a gradient or an update was NaN or infinite, and no such state was saved; or a
    held-out loss was, of a state that is a number itself and may be saved.
    """


def non_finite(what: str) -> NonFiniteError:
    return NonFiniteError(
        f"{what}; training stopped, the last checkpoint is from an earlier step and intact. "
        "Try a lower learning rate, or float32 instead of bfloat16."
    )


@flax.struct.dataclass
class TrainState:
    """What training changes. step: int32 scalar, the number of finished steps. adapters: the
    trainable tree, float32. opt_state: optax's.
    """

    step: Array
    adapters: Tree
    opt_state: Any


def init_state(adapters: Tree, optim: OptimConfig, steps: int) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32), adapters, make_optimizer(optim, steps).init(adapters)
    )


def batch_loss(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    batch: Batch,
    chunk: int,
    rngs: dict[str, Array] | None = None,
) -> tuple[Array, Array]:
    """Summed cross-entropy of a batch [B, T] on its loss_mask, and the number of tokens summed.

    rngs: {"dropout": key} in training with dropout.
    """
    llama = Llama(config, adapter)
    hidden, _ = llama.apply(
        variables, batch["tokens"], segment_ids=batch["segments"], method="hidden", rngs=rngs
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
) -> Callable[[Tree, TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """(params, state, batch) -> (state, metrics), jitted; the state is donated.

    A batch [B, T] runs as `grad_accum_steps` micro-batches; sums of losses and gradients over all
    of them are divided by the number of tokens once, so the result does not depend on
    `grad_accum_steps` (but for what drops out). state_sharding: where the new state lies
    (sharding.state_shardings), None on one device. seed: of the adapter's dropout; what a
    micro-batch drops follows from it, the step and the micro-batch's number alone. metrics: loss
    (mean per token), tokens, grad_norm (before clipping), learning_rate, and finite, 1 where the
    new adapters are all numbers and 0 elsewhere: float32 scalars.
    """
    optimizer, schedule = make_optimizer(optim, steps), learning_rate_schedule(optim, steps)

    def loss_sum(
        adapters: Tree, params: Tree, micro: Batch, rngs: dict[str, Array] | None
    ) -> tuple[Array, Array]:
        return batch_loss(
            config, adapter, {"params": params, "adapters": adapters}, micro, chunk, rngs
        )

    def streams(step: Array) -> dict[str, Array] | None:
        """A random key for each micro-batch, where there is something to draw: key
        [grad_accum_steps].
        """
        if not adapter.dropout:
            return None
        own = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(b"dropout"))), step
        )
        return {"dropout": jax.vmap(partial(jax.random.fold_in, own))(jnp.arange(grad_accum_steps))}

    @jax.jit(donate_argnums=1, out_shardings=(state_sharding, None))
    def train_step(
        params: Tree, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        # Every grad_accum_steps-th row, so that each device's rows are spread over the
        # micro-batches evenly.
        micros = jax.tree.map(
            lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), dict(batch)
        )

        def add(
            total: tuple[Array, Array, Tree], part: tuple[Batch, Any]
        ) -> tuple[tuple[Array, Array, Tree], None]:
            (loss, tokens), grads = jax.value_and_grad(loss_sum, has_aux=True)(
                state.adapters, params, *part
            )
            return jax.tree.map(jnp.add, total, (loss, tokens, grads)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.adapters))
        with at_precision(config.execution.matmul_precision):
            (loss, tokens, grads), _ = jax.lax.scan(add, zero, (micros, streams(state.step)))
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1.0), grads)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes Python floats with int32 counters; our own code also runs under "strict"
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters)
            adapters, norm, rate = (
                optax.apply_updates(state.adapters, updates),
                optax.tree.norm(grads),
                schedule(state.step),
            )
        finite = (
            jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(adapters)])
            .all()
            .astype(jnp.float32)
        )
        metrics = {
            "loss": loss / jnp.maximum(tokens, 1.0),
            "tokens": tokens,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
        }
        metrics["finite"] = finite
        return TrainState(state.step + 1, adapters, opt_state), metrics

    return train_step


@jax.jit(static_argnums=(0, 1, 4))
@at_config_precision
def eval_step(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    batch: Batch,
    chunk: int = 256,
) -> tuple[Array, Array]:
    """Summed loss and number of tokens of one batch, no gradients."""
    return batch_loss(config, adapter, variables, batch, chunk)


def fit(
    step_fn: Callable[[Tree, TrainState, Batch], tuple[TrainState, dict[str, Array]]],
    params: Tree,
    state: TrainState,
    batches: Iterator[Batch],
    steps: int,
    *,
    on_metrics: Callable[[int, dict[str, float]], None],
    is_due: Callable[[int], bool],
    on_due: Callable[[int, TrainState], None],
    should_stop: Callable[[int], bool] = lambda _: False,
    on_stop: Callable[[int, TrainState], None] = lambda *_: None,
) -> TrainState:
    """Run from `state` to `steps` finished steps.

    Step n is dispatched before the metrics of step n-1 are fetched, so the device does not wait for
    the host. `on_metrics(n, metrics)` sees every step once, in order, with "wait_seconds": how
    long, since the metrics before, a batch was waited for while the device had nothing to do;
    `on_due(n, state)` (saving, evaluation) runs after the n-th step where `is_due(n)`, and only
    once the metrics up to n are known to be finite; `on_stop(n, state)` runs instead where
    `should_stop(n)` before the last step, and training ends there. Raises NonFiniteError naming the
    step.
    """
    pending: tuple[int, dict[str, Array]] | None = None
    waited = 0.0

    def settle() -> None:
        nonlocal pending, waited
        if pending is None:
            return
        number, arrays = pending
        metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        pending = None
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise non_finite(f"{name} is {metrics[name]} at step {number}")
        if not metrics.pop("finite", 1.0):
            raise non_finite(f"the adapters are NaN or infinite after the update of step {number}")
        idle, waited = waited, 0.0
        on_metrics(number, metrics | {"wait_seconds": idle})

    for number in range(int(state.step) + 1, steps + 1):
        asked = time.perf_counter()
        batch = next(batches)
        running = pending is not None and not pending[1]["loss"].is_ready()  # type: ignore[attr-defined]
        if not running:  # else the device had the step before to do
            waited += time.perf_counter() - asked
        state, metrics = step_fn(params, state, batch)
        settle()
        pending = number, metrics
        stopping = should_stop(number) and number < steps
        if is_due(number) or stopping:
            settle()
        if stopping:  # at once, and before anything that takes time: who asked may not wait long
            on_stop(number, state)
            break
        if is_due(number):
            on_due(number, state)
    settle()
    return state
