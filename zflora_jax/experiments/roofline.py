"""The least time of a train step from published rates of a target; nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from zflora_jax.adapters.widths import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.step_shapes import step_arguments, stored_bytes
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.sharding import AXES
from zflora_jax.parallel.targets import Chip, Target


def step_flops(
    run: RunConfig,
    config: LlamaConfig,
    tokens: float,
    keys: float,
    learned: float,
    recomputed: bool = False,
) -> float:
    """Operations of a train step, all devices together: 2 per parameter and token in the forward
    pass, as many for the gradients of the inputs, and as many for those of trained parameters: 4N
    for a frozen base of N parameters, where full fine-tuning takes 6N. Attention takes 4 d_heads
    per key, token and layer forward, and 2.5 times that backward. train.loss=dpo adds a forward
    pass of the base.

    Args:
      run: The run's settings.
      config: The base model's config.
      tokens: Tokens of the step, without padding.
      keys: The keys that they attend to, summed over the tokens.
      learned: The tokens that go through the head.
      recomputed: Whether a recomputed forward pass counts (train.remat=block).
    """
    full = METHODS[run.adapter.method].in_place == "full"
    passes = _passes(run, recomputed)
    trained = 0 if full else count_params(config, run.adapter)
    base = tokens * _kernels(config) + learned * config.vocab_size * config.base_width
    width = config.num_heads * config.head_dim
    attention = keys * config.num_layers * 4 * width * (passes - 1 + 2.5)
    own = passes + 1 - run.train.pairs  # the reference's pass is without adapters
    return 2 * base * (passes + full) + 2 * trained * tokens * own + attention


def _passes(run: RunConfig, recomputed: bool) -> int:
    """Forward passes, that of train.remat=block if `recomputed`, and the one backward."""
    return 2 + (recomputed and run.train.remat == "block") + run.train.pairs


def batch_flops(run: RunConfig, config: LlamaConfig, batch: Mapping[str, Any]) -> float:
    """`step_flops` of a batch on the host, whose rows stand for those of all processes."""
    segments = batch["segments"]
    number = segments + (segments.max() + 1) * np.arange(len(segments))[:, None]
    lengths = [n for n in np.bincount(number[segments > 0]).tolist() if n]
    keys = sum(n * mean_keys(config, n) for n in lengths)
    found = step_flops(run, config, sum(lengths), keys, int(batch["loss_mask"].sum()))
    return found * run.data.batch_size / len(segments)


def roofline(
    run: RunConfig, config: LlamaConfig, chip: Chip, link_bytes: float | None = None
) -> dict[str, Any]:
    """Estimates the least time of a train step at the longest of data.bucket_lengths.

    Operations as in `step_flops`, those of a recomputed forward pass among them. HBM: kernels once
    per pass, adapters, gradients and moments read and written.

    Args:
      run: The run's settings.
      config: The base model's config.
      chip: The device.
      link_bytes: Bytes that a device sends in a step within its slice; None: as `traffic`
        estimates.

    Returns:
      "flops", "hbm_bytes", "link_bytes" per device; "compute_s", "hbm_s", "link_s" at the
      published rates; "bound", the name of the largest; "step_s", the largest.
    """
    mesh, length = run.mesh, run.data.bucket_lengths[-1]
    tokens = run.data.batch_size * length
    keys = tokens * mean_keys(config, length // (1 + run.train.pairs))
    flops = step_flops(run, config, tokens, keys, tokens, True)
    stored = stored_bytes(run, config)
    abstract = AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), AXES)
    read = trees.flatten(step_arguments(run, config, abstract)[0])
    if not config.tie_word_embeddings:
        del read["embed/embedding"]  # only one row per token is read
    kernels = sum(map(bytes_of, jax.tree.leaves(read))) / mesh.tensor
    amounts = {
        "compute": (flops / mesh.devices, chip.flops),
        "hbm": (
            _passes(run, recomputed=True) * run.data.grad_accum_steps * kernels
            + 2 * (stored["adapters"] + stored["gradients"] + stored["optimizer"]),
            chip.bandwidth,
        ),
        "link": (traffic(run, config) if link_bytes is None else float(link_bytes), chip.link),
    }
    times = {name: amount / rate for name, (amount, rate) in amounts.items()}
    bound = max(times, key=lambda name: times[name])
    found: dict[str, Any] = {f"{name}_s": seconds for name, seconds in times.items()}
    found |= {"flops": amounts["compute"][0], "hbm_bytes": amounts["hbm"][0]}
    return found | {"link_bytes": amounts["link"][0], "bound": bound, "step_s": times[bound]}


def mean_keys(config: LlamaConfig, length: int) -> float:
    """The mean number of keys that a token of a sequence of `length` tokens attends to."""
    window = min(config.sliding_window or length, length)
    return window - window * (window - 1) / (2 * length)


def _kernels(config: LlamaConfig) -> int:
    """Parameters of all kernels of the layers."""
    return config.num_layers * sum(math.prod(a + b) for a, b in kernel_shapes(config).values())


def traffic(run: RunConfig, config: LlamaConfig) -> float:
    """Estimates the bytes that a device sends in a train step; the terms are explained in
    docs/hosts.md, "Traffic between devices".
    """
    mesh, size = run.mesh, 2 if run.train.dtype == "bfloat16" else 4
    parts, micros = mesh.row_parts, run.data.grad_accum_steps
    gathered = 2 * _kernels(config) + config.vocab_size * config.base_width
    tokens = run.data.batch_size / parts * run.data.bucket_lengths[-1]
    trained = count_params(config, run.adapter)
    fsdp = (mesh.fsdp - 1) / mesh.fsdp * size * micros * gathered / mesh.tensor
    gradients = 2 * (parts - 1) / parts * 4 * trained
    summed = 4 * config.num_layers * tokens * config.base_width * size
    return fsdp + gradients + 2 * (mesh.tensor - 1) / mesh.tensor * summed


def _meshes(run: RunConfig, devices: int) -> Iterator[RunConfig]:
    """Yields the run on each mesh worth a comparison on so many devices, its own first: all of
    them along data, along fsdp, and two copies of the base. Meshes that the batch cannot be divided
    over are left out.
    """
    yield run
    for data in (devices, 1, 2):
        axes = {"mesh.data": data, "mesh.fsdp": devices // data, "mesh.tensor": 1}
        if run.mesh.slices > 1 or devices % data:
            continue
        try:
            other = override(run, axes)
        except ConfigError:
            continue
        if other.mesh != run.mesh and not (data == 2 and devices <= 2):
            yield other


def compare_meshes(
    run: RunConfig, config: LlamaConfig, where: Target, compiled: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Compares meshes over all devices of a target by `roofline`, without compiling them.

    Args:
      run: The run's settings.
      config: The base model's config.
      where: The target.
      compiled: Result of `compile_step` for the run's mesh, whose temporaries count for all.

    Returns:
      The run's mesh first: {"mesh": settings, "step_s", "bound", "tokens_per_s" and "run_s", the
      least time of all steps, "stored_bytes" per device, "best": whether it is the fastest of those
      that fit}.
    """
    room = where.chip.memory - compiled.get("bytes", {}).get("temporaries", 0)
    found = []
    for other in _meshes(run, compiled["devices"]):
        estimate, size = roofline(other, config, where.chip), stored_bytes(other, config)
        seconds, mesh = estimate["step_s"], other.mesh
        axes = {f"mesh.{axis}": getattr(mesh, axis) for axis in AXES if getattr(mesh, axis) > 1}
        row = {"mesh": axes, "step_s": seconds, "bound": estimate["bound"]}
        row |= {
            "tokens_per_s": run.data.batch_size * run.data.bucket_lengths[-1] / seconds,
            "run_s": seconds * run.steps,
            "stored_bytes": sum(size.values()) - size["gradients"],  # those are temporaries
        }
        found.append(row)
    fit = [row for row in found if row["stored_bytes"] <= room] if "bytes" in compiled else []
    best = min(fit, key=lambda row: row["step_s"], default=None)
    return [row | {"best": row is best} for row in found]
