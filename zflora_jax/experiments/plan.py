"""The needs of a run before it starts: parameters, steps, memory per device, its compiled step.

Everything comes from shapes: no weights are read and nothing runs. The compiler reports the memory
of the train step, for this machine or for a target (`parallel.targets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from zflora_jax.adapters.methods import adapter_shapes, resolve_adapter
from zflora_jax.adapters.widths import count_params, width_advice
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base, param_shapes
from zflora_jax.core.fields import first_line, require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.nn.quantize_model import quantized_shapes
from zflora_jax.ops.attention import attention_choice
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.sharding import (
    AXES,
    batch_sharding,
    make_mesh,
    shardings,
    slice_groups,
    state_shardings,
)
from zflora_jax.parallel.targets import GIB, Target
from zflora_jax.training.objective import objective_of
from zflora_jax.training.trainer import TrainState, init_state, step_of


def memory_plan(
    run: RunConfig,
    config: LlamaConfig,
    where: Target | None = None,
    memory_gib: float | None = None,
) -> dict[str, Any]:
    """Plans a run, for the longest of data.bucket_lengths.

    Args:
      run: The run's settings; its mesh may use a part of the target's devices.
      config: The base model's config.
      where: The devices to compile for, which may be absent; None: this process's.
      memory_gib: Memory of one device, in GiB; None: the target's.

    Returns:
      Counts; "stored", see `stored_bytes`; "compiled", see `compile_step`; "widths", see
      `adapters.widths.width_advice`. If the memory of a device is known also "memory_bytes", "fits"
      and, if it does not fit, "changes": text and settings of changes that reduce the memory.

    Raises:
      ConfigError: The mesh does not divide the model, there are too few devices, or the target's
        compiler is not installed.
    """
    rows, length = run.data.batch_size, run.data.bucket_lengths[-1]
    require(
        length <= config.max_position_embeddings,
        f"data.bucket_lengths goes up to {length}, beyond the model's context of"
        f" {config.max_position_embeddings}; leave out lengths above it.",
    )
    require(
        memory_gib is None or 0 < memory_gib < float("inf"),
        f"memory={memory_gib}: must be positive and finite, in GiB per device.",
    )
    compiled, _ = compile_step(run, config, where)
    result: dict[str, Any] = {
        "devices": run.mesh.devices,
        "params_base": count_base(config),
        "params_trainable": count_params(config, run.adapter),
        "steps": run.steps,
        "rows_per_step": rows,
        "tokens_per_step": rows * length,
        "tokens": rows * length * run.steps,
        "stored": stored_bytes(run, config),
        "compiled": compiled,
    }
    if advice := width_advice(config, run.adapter):
        result["widths"] = advice
    limit = where.chip.memory if where else None
    limit = limit if memory_gib is None else int(memory_gib * GIB)
    if limit is not None:
        fits = "bytes" in compiled and compiled["bytes"]["total"] <= limit
        result |= {"memory_bytes": limit, "fits": fits}
        result |= {} if fits else {"changes": dict(_changes(run))}
    return result


def compile_step(
    run: RunConfig, config: LlamaConfig, where: Target | None = None
) -> tuple[dict[str, Any], Any]:
    """Compiles the train step of a run.

    Args:
      run, config, where: As for `memory_plan`.

    Returns:
      ({"target"; "devices", how many there are; "attention", the kernel and why it is no flash
      kernel; "bytes" per device as the compiler plans them: arguments (base, adapters, moments,
      batch), outputs that do not share an argument's memory, temporaries, and their total; or
      "refused", what a TPU's compiler says of a program that does not fit}, the compiled step, None
      if it is refused).
    """
    slices, groups = run.mesh.slices, [jax.devices()]
    if where:
        groups = slice_groups(where.devices(slices), slices)
    used = run.mesh.devices // len(groups)
    mesh = make_mesh(run.mesh, [device for group in groups for device in group[:used]])
    kernel, reason = step_attention(run, config, mesh)
    found = {
        "target": where.name if where else jax.default_backend(),
        "devices": sum(map(len, groups)),
        "attention": {"kernel": kernel, "reason": reason},
    }
    try:
        with no_compile_cache():
            step = lowered_step(run, config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"refused": first_line(error)}, None
    memory = step.memory_analysis()
    sizes = {
        "arguments": int(memory.argument_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "temporaries": int(memory.temp_size_in_bytes),
    }
    return found | {"bytes": sizes | {"total": sum(sizes.values())}}, step


def lowered_step(run: RunConfig, config: LlamaConfig, mesh: Mesh) -> Any:
    """Lowers the train step of a run from shapes, for a mesh whose devices may be absent."""
    params, state, batch = step_arguments(run, config, mesh)
    step: Any = step_of(run, run.train.applied_to(config), state_shardings(state, mesh))
    with jax.set_mesh(mesh):
        return step.lower(params, state, batch)


def step_arguments(
    run: RunConfig, config: LlamaConfig, mesh: Any
) -> tuple[trees.Tree, TrainState, trees.Tree]:
    """Returns (params, state, batch) of a train step as ShapeDtypeStructs, placed on `mesh`, a
    Mesh or AbstractMesh.
    """
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


def step_attention(run: RunConfig, config: LlamaConfig, mesh: Mesh) -> tuple[str, str]:
    """Returns the attention kernel of a run's train step on a mesh whose devices may be absent, and
    why it is no flash kernel ("" where it is one).
    """
    config = run.train.applied_to(config)
    rows, length = run.data.micro_batch_size, run.data.bucket_lengths[-1]
    ids: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32) if run.data.packing else None
    head_dim = config.head_dim + resolve_adapter(config, run.adapter).heads
    shape = (rows, length, config.num_heads, head_dim)
    dtype = jnp.dtype(config.execution.dtype)
    with jax.set_mesh(mesh):
        return attention_choice(shape, config.num_kv_heads, dtype, AttentionMask(ids, ids))


def stored_bytes(run: RunConfig, config: LlamaConfig) -> dict[str, int]:
    """Returns the bytes of one device's part of the base, the adapters, their gradients (twice with
    micro-batches: those of one, and their sum) and the optimizer's state without its counters.
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


def _changes(run: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (effect, settings) of changes that reduce the memory, the cheapest first."""
    halves = run.data.micro_batch_size % (2 * run.mesh.row_parts) == 0
    if halves:
        accum = {"data.grad_accum_steps": 2 * run.data.grad_accum_steps}
        yield "more micro-batches, a little slower", accum
    if run.train.remat != "block":
        yield "recompute activations, about a third more work", {"train.remat": "block"}
    if run.train.dtype == "float32":
        yield "half the base and activations, rounded", {"train.dtype": "bfloat16"}
    if METHODS[run.adapter.method].in_place == "full":
        yield "an adapter instead of all parameters", {"adapter.method": "zflora-minimal"}
    elif not run.quantize.active:
        yield "the base in 4 bits, rounded", {"quantize.kernels": "nf4"}
    if halves:
        yield "twice the devices along fsdp", {"mesh.fsdp": 2 * run.mesh.fsdp}


def plan_table(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plan of `memory_plan` as one table, name -> value, for a terminal."""
    found = plan["compiled"]
    table: dict[str, Any] = {key: value for key, value in plan.items() if isinstance(value, int)}
    for name, size in plan["stored"].items():
        table[f"stored per device: {name}"] = f"{size / GIB:.2f} GiB"
    table["train step compiled for"] = f"{found['target']}, not run"
    if plan["devices"] < found["devices"] and found["target"] != "cpu":
        table["devices"] = f"{plan['devices']} of {found['devices']}; mesh.* can use the others"
    for name, size in found.get("bytes", {}).items():
        table[f"step per device: {name}"] = f"{size / GIB:.2f} GiB"
    if "refused" in found:
        table["refused by the compiler"] = found["refused"]
    kernel, reason = found["attention"]["kernel"], found["attention"]["reason"]
    table["attention"] = f"{kernel} ({reason})" if reason else kernel
    if "fits" in plan:
        table.pop("fits"), table.pop("memory_bytes")
        fits = "fits in" if plan["fits"] else "does not fit in"
        table["the run"] = f"{fits} {plan['memory_bytes'] / GIB:.2f} GiB per device"
    for text, settings in plan.get("changes", {}).items():
        [(key, value)] = settings.items()
        table[f"or --set {key}={value}"] = text
    return table | {f"on a {kind}": text for kind, text in plan.get("widths", {}).items()}
