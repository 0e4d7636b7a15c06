"""The needs of a run before it starts: parameters, steps, memory per device, its compiled step.

Everything comes from shapes: no weights are read and nothing runs. Base, adapters, gradients and
optimizer state are counted from the sharding rules; the compiler reports what the train step needs,
for this machine or for a target (`parallel.targets`). In this module `run` is the RunConfig and
`config` the base model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from zflora_jax.adapters.methods import adapter_shapes, resolve_adapter
from zflora_jax.adapters.widths import count_params, width_advice
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base, param_shapes
from zflora_jax.core.fields import require
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
from zflora_jax.training.trainer import init_state, step_of

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
      Counts; "stored", see `stored_bytes`; "compiled", see `compile_step`; "widths", where devices
      pad the adapter's widths (`adapters.widths.width_advice`). If the memory of a device is known
      also "memory_bytes", "fits" and, if it does not fit, "changes": text and settings of the
      cheapest changes that reduce the memory.

    Raises:
      ConfigError: the mesh does not divide the model, there are too few devices, or the target's
        compiler is not installed.
    """
    require(
        memory_gib is None or 0 < memory_gib < float("inf"),
        f"memory={memory_gib}: must be positive and finite, in GiB per device.",
    )
    config, rows = shaped_config(run, config), run.data.batch_size
    compiled, _ = compile_step(run, config, where)
    result: dict[str, Any] = {
        "devices": run.mesh.devices,
        "params_base": count_base(config),
        "params_trainable": count_params(config, run.adapter),
        "steps": run.train.steps,
        "rows_per_step": rows,
        "tokens_per_step": rows * run.data.bucket_lengths[-1],
        "tokens": rows * run.data.bucket_lengths[-1] * run.train.steps,
        "stored": stored_bytes(run, config),
        "compiled": compiled,
    }
    if advice := width_advice(config, run.adapter):
        result["widths"] = advice
    if memory_gib is not None or where is not None:
        limit = int(memory_gib * GIB) if memory_gib else where.chip.memory if where else 0
        fits = "bytes" in compiled and compiled["bytes"]["total"] <= limit
        result |= {"memory_bytes": limit, "fits": fits}
        if not fits:
            result["changes"] = dict(_changes(run))
    return result


def compile_step(
    run: RunConfig, config: LlamaConfig, where: Target | None = None
) -> tuple[dict[str, Any], Any]:
    """Compiles the train step of a run.

    Args:
      run: The run's settings.
      config: The base model's config.
      where: The devices to compile for; None: this process's.

    Returns:
      ({"target"; "devices", how many there are; "attention", the kernel and why it is no flash
      kernel; "bytes" per device as the compiler plans them: arguments (base, adapters, moments,
      batch), outputs that do not share an argument's memory, temporaries, and their total; or, of a
      program that the compiler refuses because it does not fit, "needs", the bytes that it names},
      the compiled step, None if it is refused).

    Raises:
      ConfigError: there are fewer devices than the mesh has, or the compiler is not installed.
    """
    mesh, groups = run.mesh, [jax.devices()]
    if where:
        groups = slice_groups(where.devices(mesh.slices), mesh.slices)
    devices = [d for group in groups for d in group[: mesh.devices // len(groups)]]
    kernel, reason = step_attention(run, config, make_mesh(mesh, devices))
    found = {
        "target": where.name if where else jax.default_backend(),
        "devices": sum(map(len, groups)),
        "attention": {"kernel": kernel, "reason": reason},
    }
    try:
        with no_compile_cache():
            step = lowered_step(run, config, devices).compile()
    except jax.errors.JaxRuntimeError as error:
        needs = _needed(str(error))
        if needs is None:
            raise
        return found | {"needs": needs}, None
    memory = step.memory_analysis()
    sizes = {
        "arguments": int(memory.argument_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "temporaries": int(memory.temp_size_in_bytes),
    }
    return found | {"bytes": sizes | {"total": sum(sizes.values())}}, step


def lowered_step(run: RunConfig, config: LlamaConfig, devices: Sequence[Any] | None = None) -> Any:
    """Lowers the train step of a run, from shapes.

    Args:
      run: The run's settings.
      config: The base model's config.
      devices: The devices, which may be absent; None: this process's.

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


def step_attention(run: RunConfig, config: LlamaConfig, mesh: Mesh) -> tuple[str, str]:
    """Returns the attention kernel of a run's train step.

    Args:
      run: The run's settings.
      config: The base model's config.
      mesh: The mesh of the step; its devices may be absent.

    Returns:
      (The kernel's name, why it is no flash kernel or "" where it is one), see
      `ops.attention.attention_choice`.
    """
    widths = shaped_config(run, config)
    rows, length = run.data.micro_batch_size, run.data.bucket_lengths[-1]
    ids: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32) if run.data.packing else None
    head_dim = widths.head_dim + resolve_adapter(widths, run.adapter).heads
    shape = (rows, length, widths.num_heads, head_dim)
    dtype, scale = jnp.dtype(widths.execution.dtype), widths.rotary_dim**-0.5
    with jax.set_mesh(mesh):
        return attention_choice(shape, widths.num_kv_heads, dtype, AttentionMask(ids, ids), scale)


def stored_bytes(run: RunConfig, config: LlamaConfig) -> dict[str, int]:
    """Returns the bytes of one device's part of the base, the adapters, their gradients (twice with
    micro-batches: those of one, and their sum) and the optimizer's state without its counters.
    """
    config = shaped_config(run, config)
    mesh: Any = AbstractMesh((run.mesh.data, run.mesh.fsdp, run.mesh.tensor), AXES)
    params, adapters, _ = abstract_arguments(run, config, 1)
    state = jax.eval_shape(lambda a: init_state(a, run.optim, run.train.steps), adapters)
    where = state_shardings(state, mesh)

    def local(tree: Any, at: Any) -> int:
        return sum(
            bytes_of(jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype))
            for leaf, place in zip(*map(jax.tree.leaves, (tree, at)), strict=True)
            if leaf.shape
        )

    trainable = local(state.adapters, where.adapters)
    return {
        "base": local(params, shardings(params, mesh)),
        "adapters": trainable,
        "gradients": trainable * (2 if run.data.grad_accum_steps > 1 else 1),
        "optimizer": local(state.opt_state, where.opt_state),
    }


def shaped_config(run: RunConfig, config: LlamaConfig) -> LlamaConfig:
    """Returns the base's config with the run's dtype, remat and precision.

    Raises:
      ConfigError: the longest of data.bucket_lengths exceeds the model's context.
    """
    longest, limit = run.data.bucket_lengths[-1], config.max_position_embeddings
    require(
        longest <= limit,
        f"data.bucket_lengths goes up to {longest}, beyond the model's context of {limit}; leave"
        " out lengths above it.",
    )
    return run.train.applied_to(config)


def abstract_arguments(
    run: RunConfig, config: LlamaConfig, rows: int
) -> tuple[trees.Tree, trees.Tree, dict[str, Any]]:
    """Returns (params, adapters, batch of `rows` rows) as ShapeDtypeStructs."""

    def tree(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> trees.Tree:
        leaves = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
        return trees.unflatten(leaves)

    base = tree(param_shapes(config), jnp.dtype(config.execution.dtype))
    return (
        quantized_shapes(config, run.quantize, base),
        tree(adapter_shapes(config, run.adapter), jnp.float32),
        objective_of(run).arrays(rows, run.data.bucket_lengths[-1], run.data.packing),
    )


def _needed(message: str) -> int | None:
    """The bytes that a TPU's compiler names where a program does not fit; None for another error.

    "Used 20.11G of 15.75G hbm", or "HLO temporaries (46.96G) exceeds available HBM".
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _changes(run: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (effect, settings) of changes that reduce the memory, the cheapest first."""
    full = METHODS[run.adapter.method].in_place == "full"
    if run.data.micro_batch_size % (2 * run.mesh.row_parts) == 0:
        same = "other positions drop out" if run.adapter.dropout else "the same result"
        accum = {"data.grad_accum_steps": 2 * run.data.grad_accum_steps}
        yield f"more micro-batches: {same}, a little slower", accum
    if run.train.loss_chunk >= 128:
        chunk = {"train.loss_chunk": run.train.loss_chunk // 2}
        yield "smaller chunks of logits: the same result, a little slower", chunk
    if run.train.remat not in ("block", "offload"):
        remat = {"train.remat": "block"}
        yield "recompute activations: the same result, about a third more work", remat
    if run.train.dtype == "float32":
        yield "bfloat16: half the base and activations, rounded", {"train.dtype": "bfloat16"}
    if full:
        yield "an adapter instead of all parameters", {"adapter.method": "zflora-minimal"}
    elif not run.quantize.active:
        yield "the base in 4 bits, rounded", {"quantize.kernels": "nf4"}
    if run.data.micro_batch_size % (2 * run.mesh.row_parts) == 0:
        yield "twice the devices along fsdp", {"mesh.fsdp": 2 * run.mesh.fsdp}
    if shorter := [n for n in run.data.bucket_lengths if n <= run.data.bucket_lengths[-1] // 2]:
        yield "leave out the long examples", {"data.bucket_lengths": shorter}


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """Formats a plan of `memory_plan` for a terminal."""

    def sized(sizes: Mapping[str, int]) -> list[str]:
        return [f"{name:<24} {size / GIB:>8.2f} GiB" for name, size in sizes.items()]

    found, lines = plan["compiled"], ["stored per device", *sized(plan["stored"])]
    lines += ["", f"train step compiled for {found['target']}, not run; bytes per device"]
    if plan["devices"] < found["devices"] and found["target"] != "cpu":
        idle = f"the mesh uses {plan['devices']} of {found['devices']} devices"
        lines.append(f"{idle}: mesh.fsdp, mesh.data or mesh.tensor can use the others")
    lines += sized({"refused: needs": found["needs"]} if "needs" in found else found["bytes"])
    kernel, reason = found["attention"]["kernel"], found["attention"]["reason"]
    lines.append(f"{'attention':<24} {kernel:>8}" + (f"  ({reason})" if reason else ""))
    if "fits" in plan:
        fits = "fits in" if plan["fits"] else "does not fit in"
        lines += ["", f"{fits} {plan['memory_bytes'] / GIB:.2f} GiB per device"]
    if "changes" in plan:
        lines.append("less memory, the cheapest change first:")
        for text, settings in plan["changes"].items():
            how = " ".join(f"{key}={value}" for key, value in settings.items())
            lines.append(f"  {how:<28} {text}")
    return lines + [f"on a {kind}: {text}" for kind, text in plan.get("widths", {}).items()]
