"""What XLA plans for the train step of a run, which is compiled and not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.planner import abstract_arguments, shaped_config
from zflora_jax.ops.attention import attention_choice
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.parallel.sharding import batch_sharding, make_mesh, shardings, state_shardings
from zflora_jax.training.trainer import init_state, step_of


def lowered_step(run: RunConfig, config: LlamaConfig, devices: Sequence[Any] | None = None) -> Any:
    """Lower the train step of a run, from shapes alone.

    Args:
      run: whose step it is.
      config: of the model.
      devices: that it is for, which may be absent; None: this process's.

    Raises:
      ConfigError: there are too few devices.
    """
    config, mesh = shaped_config(run, config), make_mesh(run.mesh, devices)
    params, adapters, batch = abstract_arguments(run, config, run.data.batch_size)
    state = jax.eval_shape(lambda a: init_state(a, run.optim, run.train.steps), adapters)
    where = state_shardings(state, mesh)

    def placed(tree: Any, at: Any) -> Any:
        return jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, at
        )

    rows = jax.tree.map(lambda leaf: NamedSharding(mesh, batch_sharding(mesh).spec), batch)
    step: Any = step_of(run, config, where)
    with jax.set_mesh(mesh):
        return step.lower(
            placed(params, shardings(params, mesh)), placed(state, where), placed(batch, rows)
        )


def compiled_step(run: RunConfig, config: LlamaConfig, devices: Sequence[Any] | None = None) -> Any:
    """`lowered_step`, compiled; arguments and errors are the same."""
    return lowered_step(run, config, devices).compile()


def compiled(run: RunConfig, config: LlamaConfig) -> dict[str, int]:
    """Bytes per device as the compiler plans them for `compiled_step`; no array is allocated.

    Returns:
      Bytes of the arguments (base, adapters, moments, batch), of outputs that do not share an
      argument's memory, of temporaries, and their total.
    """
    return planned_bytes(compiled_step(run, config))


def step_attention(run: RunConfig, config: LlamaConfig, mesh: Mesh) -> tuple[str, str]:
    """The attention kernel of a run's train step.

    Args:
      run: whose step it is.
      config: of the base.
      mesh: that the step is for; its devices may be absent.

    Returns:
      (the kernel's name, why it is no flash kernel, "" where it is one), see
      `ops.attention.attention_choice`.
    """
    widths = shaped_config(run, config)
    rows, length = run.data.micro_batch_size, run.data.bucket_lengths[-1]
    ids: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32) if run.data.packing else None
    head_dim = widths.head_dim + resolve_adapter(widths, run.adapter).heads
    shape = (rows, length, widths.num_heads, head_dim)
    dtype, scale = jnp.dtype(run.train.dtype), widths.rotary_dim**-0.5
    with jax.set_mesh(mesh):
        return attention_choice(shape, widths.num_kv_heads, dtype, AttentionMask(ids, ids), scale)


def planned_bytes(step: Any) -> dict[str, int]:
    """Bytes per device of a compiled step, see `compiled`."""
    found = step.memory_analysis()
    sizes = {
        "arguments": int(found.argument_size_in_bytes),
        "outputs": int(found.output_size_in_bytes - found.alias_size_in_bytes),
        "temporaries": int(found.temp_size_in_bytes),
    }
    return sizes | {"total": sum(sizes.values())}
