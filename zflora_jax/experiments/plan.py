"""The needs of a run before it starts: parameters, steps, memory per device, its compiled step.

Everything comes from shapes: no weights are read and nothing runs. The compiler reports the memory
of the train step, for this machine or for a target (`parallel.targets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.adapters.widths import count_params, width_advice
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import first_line, require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.roofline import roofline
from zflora_jax.experiments.saved_step import each_length, save_steps
from zflora_jax.experiments.step_shapes import program_bytes, step_arguments, stored_bytes
from zflora_jax.ops.attention import attention_choice
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.sharding import make_mesh, state_shardings
from zflora_jax.parallel.targets import GIB, Target
from zflora_jax.training.objective import objective_of
from zflora_jax.training.trainer import step_of


def memory_plan(
    run: RunConfig,
    config: LlamaConfig,
    where: Target | None = None,
    memory_gib: float | None = None,
    save: str | Path | None = None,
) -> dict[str, Any]:
    """Plans a run, for the longest of data.bucket_lengths.

    Args:
      run: The run's settings; its mesh may use a part of the target's devices.
      config: The base model's config.
      where: The devices to compile for, which may be absent; None: this process's.
      memory_gib: Memory of one device, in GiB; None: the target's.
      save: File for the compiled steps, which `train` can load; None: no file.

    Returns:
      Counts; "stored" from `stored_bytes`; "compiled" from `compile_step`; "widths" from
      `width_advice`; for a target "roofline". If a device's memory is known, also "memory_bytes",
      "fits" and, if it does not fit, "changes" that reduce the memory: text -> settings.

    Raises:
      ConfigError: The mesh does not fit the model or the devices, or a compiler is missing.
    """
    rows, length = run.data.batch_size, run.data.bucket_lengths[-1]
    require(
        length <= config.max_position_embeddings,
        f"data.bucket_lengths goes up to {length}, beyond the model's context of"
        f" {config.max_position_embeddings}; leave out lengths above it.",
    )
    require(
        memory_gib is None or 0 < memory_gib <= 8192,
        f"memory={memory_gib}: must be positive and at most 8192, in GiB per device.",
    )
    limit = int(memory_gib * GIB) if memory_gib else where.chip.memory if where else None
    compiled, step = compile_step(run, config, where)
    if save is not None:
        _save(save, run, config, where, step)
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
    kind = {"cuda": "gpu", "tpu": "tpu"}[where.platform] if where else None
    every = width_advice(config, run.adapter).items()
    result["widths"] = {name: text for name, text in every if kind in (None, name)}
    if where:
        result["roofline"] = roofline(run, config, where.chip)
    if limit is not None:
        fits = "bytes" in compiled and compiled["bytes"]["total"] <= limit
        more = {} if fits else {"changes": dict(_changes(run))}
        return result | {"memory_bytes": limit, "fits": fits} | more
    return result


def compile_step(
    run: RunConfig, config: LlamaConfig, where: Target | None = None
) -> tuple[dict[str, Any], Any]:
    """Compiles the train step of a run.

    Args:
      run, config, where: Arguments of `memory_plan`.

    Returns:
      ({"target"; "devices", their number; "attention", the kernel and why it is no flash kernel;
      "bytes", see `program_bytes`, with base, adapters, moments and batch as arguments; or instead
      "refused", the message of a TPU's compiler for a program that does not fit}, the compiled
      step, None if it is refused).
    """
    mesh = _mesh(run, where)
    kernel, reason = step_attention(run, config, mesh)
    found = {
        "target": where.name if where else jax.default_backend(),
        "devices": len(where.devices() if where else jax.devices()),
        "attention": {"kernel": kernel, "reason": reason},
    }
    try:
        with no_compile_cache():
            step = lowered_step(run, config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"refused": first_line(error)}, None
    return found | {"bytes": program_bytes(step)}, step


def _mesh(run: RunConfig, where: Target | None) -> Mesh:
    devices = where.devices() if where else jax.devices()
    return make_mesh(run.mesh, devices[: run.mesh.devices])


def _save(
    path: str | Path, run: RunConfig, config: LlamaConfig, where: Target | None, longest: Any
) -> None:
    """Writes the compiled steps of all lengths, of which the longest is compiled already."""
    steps: dict[int, tuple[Any, Any]] = {}
    for length, one in each_length(run):
        last = length == run.data.bucket_lengths[-1]
        step = longest if last else compile_step(one, config, where)[1]
        require(
            step is not None,
            f"{path} is not written: the compiler refuses the step for rows of {length} tokens.",
        )
        steps[length] = lowered_step(one, config, mesh := _mesh(run, where)), step
    save_steps(path, run, mesh, steps)


def lowered_step(run: RunConfig, config: LlamaConfig, mesh: Mesh) -> Any:
    """Lowers the train step of a run from shapes, for a mesh whose devices may be absent."""
    params, state, batch = step_arguments(run, config, mesh)
    step: Any = step_of(run, run.train.applied_to(config), state_shardings(state, mesh))
    with jax.set_mesh(mesh):
        return step.lower(params, state, batch)


def step_attention(run: RunConfig, config: LlamaConfig, mesh: Mesh) -> tuple[str, str]:
    """Returns the attention kernel of a run's train step on a mesh whose devices may be absent, and
    why it is no flash kernel ("" if it is one).
    """
    config = run.train.applied_to(config)
    rows, length = run.data.micro_batch_size, run.data.bucket_lengths[-1]
    ids: Any = objective_of(run).arrays(rows, length, run.data.packing).get("segments")
    head_dim = config.head_dim + resolve_adapter(config, run.adapter).heads
    shape = (rows, length, config.num_heads, head_dim)
    dtype = jnp.dtype(config.execution.dtype)
    with jax.set_mesh(mesh):
        return attention_choice(shape, config.num_kv_heads, dtype, AttentionMask(ids, ids))


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


def plan_table(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plan of `memory_plan` as one table, name -> value, for a terminal."""
    found = plan["compiled"]
    table: dict[str, Any] = {key: value for key, value in plan.items() if type(value) is int}
    table.pop("memory_bytes", None)
    for name, size in plan["stored"].items():
        table[f"stored per device: {name}"] = _in_words(size)
    table["train step compiled for"] = f"{found['target']}, not run"
    if plan["devices"] < found["devices"] and found["target"] != "cpu":
        table["devices"] = f"{plan['devices']} of {found['devices']}; mesh.* can use the others"
    for name, size in found.get("bytes", {}).items():
        table[f"step per device: {name}"] = _in_words(size)
    if "refused" in found:
        table["refused by the compiler"] = found["refused"]
    kernel, reason = found["attention"]["kernel"], found["attention"]["reason"]
    table["attention"] = f"{kernel} ({reason})" if reason else kernel
    if "fits" in plan:
        fits = "fits in" if plan["fits"] else "does not fit in"
        table["the run"] = f"{fits} {_in_words(plan['memory_bytes'])} per device"
    for text, settings in plan.get("changes", {}).items():
        [(key, value)] = settings.items()
        table[f"or --set {key}={value}"] = text
    if "roofline" in plan:
        seconds, hbm = plan["roofline"]["step_s"], plan["roofline"]["bound"] == "hbm"
        table["at published rates"] = (
            f"{1e3 * seconds:.3g} ms a step at least, bound by {'memory' if hbm else 'compute'};"
            f" all steps {timedelta(seconds=round(seconds * plan['steps']))} h at least"
            + " (without links between devices)"
            * (plan["devices"] > 1)
        )
    return table | {f"decode on a {kind}": text for kind, text in plan["widths"].items()}


def _in_words(size: int) -> str:
    """Returns bytes in GiB, MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 2**10:.1f} KiB"
