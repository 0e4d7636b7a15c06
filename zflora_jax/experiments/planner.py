"""The needs of a run before it starts: parameters, bytes per device, steps and tokens.

Everything is computed from shapes. Base, adapters, gradients and moments are counted from the
sharding rules and are exact. Activations are the arrays that jax.vjp saves for the backward pass,
by abstract evaluation. The working set is the memory that one layer or one chunk of logits needs
besides, by the formula at `_working_set`. `compiled_plan` asks the compiler instead. Below, `run`
has the settings and `config` is the base's.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec as P

from zflora_jax.adapters.counts import count_params
from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.adapters.widths import width_advice
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base, kernel_shapes, param_shapes
from zflora_jax.core.fields import ConfigError, override, require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.base import numerics
from zflora_jax.nn.quantize_model import quantized_shapes
from zflora_jax.ops.attention_blocks import query_blocks
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.sharding import AXES, spec, specs, state_shardings
from zflora_jax.parallel.targets import GIB
from zflora_jax.training.objective import objective_of
from zflora_jax.training.trainer import init_state


def memory_plan(
    run: RunConfig, config: LlamaConfig, memory_gib: float | None = None, *, flash: bool = False
) -> dict[str, Any]:
    """Plan the memory of a run, for the longest of data.bucket_lengths.

    Args:
      run: the settings.
      config: the base's.
      memory_gib: memory of one device, in GiB.
      flash: whether attention runs a flash kernel, which keeps no scores.

    Returns:
      Counts, and "bytes_per_device": purpose -> bytes, with their sum as "total"; "widths", where
      devices fill up the adapter's (`adapters.widths.width_advice`). With `memory_gib`
      also "fits" and, if it does not fit, "changes": the three cheapest ones, each alone, and all
      together.

    Raises:
      ConfigError: the mesh does not divide the model.
    """
    require(
        memory_gib is None or 0 < memory_gib < float("inf"),
        f"memory={memory_gib}: must be positive and finite, in GiB per device.",
    )
    config = shaped_config(run, config)
    sizes, rows = bytes_per_device(run, config, flash=flash), run.data.batch_size
    result: dict[str, Any] = {
        "devices": run.mesh.devices,
        "params_base": count_base(config),
        "params_trainable": count_params(config, run.adapter),
        "steps": run.train.steps,
        "rows_per_step": rows,
        "tokens_per_step": rows * run.data.bucket_lengths[-1],
        "tokens": rows * run.data.bucket_lengths[-1] * run.train.steps,
        "bytes_per_device": sizes,
    }
    if advice := width_advice(config, run.adapter):
        result["widths"] = advice
    if memory_gib is not None:
        limit = int(memory_gib * GIB)
        result |= {"memory_bytes": limit, "fits": sizes["total"] <= limit}
        if not result["fits"]:
            result["changes"] = _changes(run, config, limit, flash)
    return result


def bytes_per_device(run: RunConfig, config: LlamaConfig, *, flash: bool = False) -> dict[str, int]:
    """Bytes on each device, by purpose. flash: as for `memory_plan`."""
    mesh = AbstractMesh((run.mesh.data, run.mesh.fsdp, run.mesh.tensor), AXES)
    trainable = _local(adapter_shapes(config, run.adapter), mesh, 4)
    sizes = {
        "base": _local_base(run, config, mesh),
        "adapters": trainable,
        # Of this micro-batch, and the sum over them.
        "gradients": trainable * (2 if run.data.grad_accum_steps > 1 else 1),
        "optimizer": _optimizer_state(run, config, mesh),
        "activations": _activations(run, config),
        "working set": _working_set(run, config, mesh, flash),
    }
    return sizes | {"total": sum(sizes.values())}


def shaped_config(run: RunConfig, config: LlamaConfig) -> LlamaConfig:
    """The base's config as a run computes with it.

    Raises:
      ConfigError: the longest of data.bucket_lengths exceeds the model's context.
    """
    longest, limit = run.data.bucket_lengths[-1], config.max_position_embeddings
    require(
        longest <= limit,
        f"data.bucket_lengths goes up to {longest}, beyond the model's context of {limit}; leave"
        " out lengths above it.",
    )
    return numerics(run, config).replace(dtype=run.train.dtype)


def _local(shapes: Mapping[str, tuple[int, ...]], mesh: Any, width: int) -> int:
    """Bytes of one device's slices of leaves of these shapes, at `width` bytes per number."""
    total = 0
    for name, shape in shapes.items():
        parts = math.prod(mesh.shape[axis] for axis in spec(name, shape, mesh) if axis is not None)
        total += math.prod(shape) * width // parts
    return total


def _local_base(run: RunConfig, config: LlamaConfig, mesh: Any) -> int:
    """Bytes of one device's slices of the base, as it is stored."""
    total, width = 0, jnp.dtype(config.execution.dtype).itemsize
    if not run.quantize.active:
        return _local(param_shapes(config), mesh, width)
    for name, leaf in trees.flatten(abstract_arguments(run, config, 1)[0]).items():
        parts = jax.tree.leaves(leaf)
        at = jax.tree.leaves(specs(name, leaf, mesh), is_leaf=lambda x: isinstance(x, P))
        for part, where in zip(parts, at, strict=True):
            shared = math.prod(mesh.shape[axis] for axis in where if axis is not None)
            total += bytes_of(part) // shared
    return total


def _optimizer_state(run: RunConfig, config: LlamaConfig, mesh: Any) -> int:
    """Bytes of one device's part of the optimizer's state, without its counters."""
    _, adapters, _ = abstract_arguments(run, config, 1)
    state = jax.eval_shape(lambda a: init_state(a, run.optim, run.train.steps), adapters)
    where = state_shardings(state, mesh).opt_state
    leaves = zip(*map(jax.tree.leaves, (state.opt_state, where)), strict=True)
    return sum(
        math.prod(at.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, at in leaves
        if leaf.shape
    )


def _local_rows(run: RunConfig) -> int:
    return run.data.micro_batch_size // run.mesh.row_parts


def abstract_arguments(
    run: RunConfig, config: LlamaConfig, rows: int
) -> tuple[trees.Tree, trees.Tree, dict[str, Any]]:
    """(params, adapters, batch) as ShapeDtypeStructs."""

    def tree(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> trees.Tree:
        return trees.unflatten(
            {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
        )

    base = tree(param_shapes(config), jnp.dtype(config.execution.dtype))
    return (
        quantized_shapes(config, run.quantize, base),
        tree(adapter_shapes(config, run.adapter), jnp.float32),
        objective_of(run).arrays(rows, run.data.bucket_lengths[-1], run.data.packing),
    )


def _activations(run: RunConfig, config: LlamaConfig) -> int:
    """Bytes that the forward pass of one device's rows, heads and MLP units saves for the backward
    pass.
    """
    parts = run.mesh.tensor
    if config.execution.remat == "offload":  # what is kept for it lies in the host's memory
        config = config.replace(remat="block")
    config = config.replace(
        num_heads=config.num_heads // parts,
        num_kv_heads=config.num_kv_heads // parts,
        intermediate_size=config.intermediate_size // parts,
    )
    params, adapters, batch = abstract_arguments(run, config, _local_rows(run))

    def kept(params: trees.Tree, adapters: trees.Tree, batch: Any) -> Any:
        def loss(adapters: trees.Tree) -> Any:
            variables = {"params": params, "adapters": adapters}
            return objective_of(run)(config, run.adapter, variables, batch).loss

        return jax.vjp(loss, adapters)[1]

    # What is kept includes the frozen kernels themselves, which are no copies.
    leaves = collections.Counter(
        (leaf.shape, leaf.dtype)
        for leaf in jax.tree.leaves(jax.eval_shape(kept, params, adapters, batch))
    )
    given = collections.Counter(
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((params, adapters, batch))
    )
    return sum(
        math.prod(shape) * dtype.itemsize * count
        for (shape, dtype), count in (leaves - given).items()
    )


def _working_set(run: RunConfig, config: LlamaConfig, mesh: Any, flash: bool) -> int:
    """Bytes of the largest of three: a chunk of logits and its backward pass, 3 C V float32 in
    compiled steps; one layer's backward pass, 3 B H T^2 float32 of attention (less if its queries
    are computed in blocks; of a flash kernel 12 B T H k) and 4 B T f of the MLP; with the head, or
    the kernels of one layer, where fsdp gathers them or they are dequantised. Method "full" sums
    the gradient of the gathered head over the chunks: two more heads in float32.
    """
    rows, length, tensor = _local_rows(run), run.data.bucket_lengths[-1], run.mesh.tensor
    parts = tensor if config.vocab_size % tensor == 0 else 1  # of the vocabulary
    width = jnp.dtype(config.execution.dtype).itemsize
    gathered = mesh.shape["fsdp"] > 1
    head = config.vocab_size * config.hidden_size * width // parts
    logits = 3 * min(run.train.loss_chunk, rows * length) * config.vocab_size * 4 // parts + (
        head if gathered else 0
    )
    if gathered and METHODS[run.adapter.method].in_place == "full":
        logits += 2 * config.vocab_size * config.hidden_size * 4 // parts
    attention = 3 * rows * config.num_heads * length * length * 4 // tensor // query_blocks(length)
    if flash:
        attention = 12 * rows * length * config.num_heads * config.head_dim * width // tensor
    mlp = 4 * rows * length * config.intermediate_size * width // tensor
    layer = sum(math.prod(a + b) for a, b in kernel_shapes(config).values()) * width // tensor
    kept = (
        rows * length * 16 * config.hidden_size * width if config.execution.remat == "block" else 0
    )
    return max(logits, attention + mlp + kept + (layer if gathered or run.quantize.active else 0))


def _changes(run: RunConfig, config: LlamaConfig, limit: int, flash: bool) -> list[dict[str, Any]]:
    """The three cheapest changes that reduce the memory, and all three together."""

    def total_of(run: RunConfig) -> int:
        return bytes_per_device(run, shaped_config(run, config), flash=flash)["total"]

    total, found, together = total_of(run), list[dict[str, Any]](), run
    for text, settings in _candidates(run):
        try:
            changed = override(run, settings)
            new = total_of(changed)
        except ConfigError:  # a mesh that does not divide the model
            continue
        if new < 0.98 * total:
            found.append({"change": text, "settings": settings, "total": new, "fits": new <= limit})
            # It may not go with the ones before it, such as twice the devices for too few rows.
            with contextlib.suppress(ConfigError):
                together = override(together, settings)
        if len(found) == 3:
            break
    if len(found) > 1:
        new = total_of(together)
        found.append(
            {
                "change": "all of these that go together",
                "settings": {},
                "total": new,
                "fits": new <= limit,
            }
        )
    return found


def _candidates(run: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (cost in words, settings) of possible changes, the cheapest first."""
    micro, parts = run.data.micro_batch_size, run.mesh.row_parts
    if micro % (2 * parts) == 0:
        same = "other numbers drop out" if run.adapter.dropout else "the same numbers"
        yield (
            f"more micro-batches: {same}, a little slower",
            {"data.grad_accum_steps": 2 * run.data.grad_accum_steps},
        )
    if run.train.loss_chunk >= 128:
        yield (
            "smaller chunks of logits: the same numbers, a little slower",
            {"train.loss_chunk": run.train.loss_chunk // 2},
        )
    if run.train.remat not in ("block", "offload"):
        yield (
            "recompute activations: the same numbers, about a third more work",
            {"train.remat": "block"},
        )
    if run.train.dtype == "float32":
        yield (
            "bfloat16: half the base and activations, rounded numbers",
            {"train.dtype": "bfloat16"},
        )
    if not run.quantize.active and METHODS[run.adapter.method].in_place != "full":
        yield "the base in 4 bits: rounded numbers", {"quantize.kernels": "nf4"}
    if METHODS[run.adapter.method].in_place == "full":
        yield "an adapter instead of all parameters", {"adapter.method": "zflora-minimal"}
    if micro % (2 * parts) == 0:
        yield "twice the devices along fsdp", {"mesh.fsdp": 2 * run.mesh.fsdp}
    yield "twice the devices along tensor", {"mesh.tensor": 2 * run.mesh.tensor}
    shorter = [n for n in run.data.bucket_lengths if n <= run.data.bucket_lengths[-1] // 2]
    if shorter:
        yield "leave out the long examples", {"data.bucket_lengths": shorter}


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan of `memory_plan` in words, for a terminal."""

    def gib(size: float) -> str:
        return f"{size / GIB:.2f} GiB"

    lines = [f"{name:<12} {gib(size):>12}" for name, size in plan["bytes_per_device"].items()]
    compiled = plan.get("compiled", {})
    if compiled and "target" not in compiled:
        lines += ["", "as the compiler of this machine plans it:"] + [
            f"{name:<12} {gib(size):>12}" for name, size in compiled["bytes"].items()
        ]
    if "fits" in plan:
        lines += [
            "",
            (
                f"{'fits in' if plan['fits'] else 'does not fit in'} {gib(plan['memory_bytes'])}"
                " per device"
            ),
        ]
        for change in plan.get("changes", []):
            how = " ".join(f"{key}={value}" for key, value in change["settings"].items())
            lines.append(
                f"  {how or '':<24} {gib(change['total']):>12} "
                f" {'fits' if change['fits'] else 'not yet'}: {change['change']}"
            )
    lines += [f"on a {kind}: {text}" for kind, text in plan.get("widths", {}).items()]
    return lines
