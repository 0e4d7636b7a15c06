"""The arguments of a train step as shapes, on a mesh whose devices may be absent; their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from zflora_jax.adapters.methods import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.nn.quantize_model import quantized_shapes
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.sharding import AXES, batch_sharding, shardings, state_shardings
from zflora_jax.training.objective import objective_of
from zflora_jax.training.trainer import TrainState, init_state


def step_arguments(
    run: RunConfig, config: LlamaConfig, mesh: Any
) -> tuple[trees.Tree, TrainState, trees.Tree]:
    """Returns (params, state, batch) of a train step as ShapeDtypeStructs on `mesh`."""
    config = run.train.applied_to(config)

    def tree(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> trees.Tree:
        leaves = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
        return trees.unflatten(leaves)

    def placed(tree: Any, at: Any) -> Any:
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), tree, at)

    base = tree(param_shapes(config), jnp.dtype(config.execution.dtype))
    params = quantized_shapes(config, run.quantize, base)
    adapters = tree(adapter_shapes(config, run.adapter), jnp.float32)
    state = jax.eval_shape(lambda a: init_state(a, run.optim, run.steps), adapters)
    rows, length = run.data.batch_size, run.data.bucket_lengths[-1]
    batch = objective_of(run).arrays(rows, length, run.data.packing)
    return (
        placed(params, shardings(params, mesh)),
        placed(state, state_shardings(state, mesh)),
        placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch)),
    )


def program_bytes(program: Any) -> dict[str, int]:
    """Returns the bytes of one device that the compiler plans for a step: arguments, outputs that
    do not share an argument's memory, temporaries, and their total.
    """
    memory = program.memory_analysis()
    sizes = {
        "arguments": int(memory.argument_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "temporaries": int(memory.temp_size_in_bytes),
    }
    return sizes | {"total": sum(sizes.values())}


def stored_bytes(run: RunConfig, config: LlamaConfig) -> dict[str, int]:
    """Returns the bytes of one device's part of the base, the adapters, their gradients (twice with
    micro-batches: one's and the sum) and the optimizer's state without its counters.
    """
    mesh = AbstractMesh((run.mesh.data, run.mesh.fsdp, run.mesh.tensor), AXES)
    params, state, _ = step_arguments(run, config, mesh)

    def local(tree: Any) -> int:
        parts = (
            jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
            for leaf in jax.tree.leaves(tree)
            if leaf.shape
        )
        return sum(map(bytes_of, parts))

    trainable = local(state.adapters)
    return {
        "base": local(params),
        "adapters": trainable,
        "gradients": trainable * (2 if run.data.grad_accum_steps > 1 else 1),
        "optimizer": local(state.opt_state),
    }
