"""A run's train step compiled for devices that are absent: memory, collectives, a roofline.

Nothing runs. Bytes and kernels are those of the compiler's program; times are estimates from
published rates (`parallel.targets.CHIPS`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from zflora_jax.adapters.counts import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.fields import require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.compiled_plan import compiled_step, planned_bytes, step_attention
from zflora_jax.experiments.planner import (
    abstract_arguments,
    bytes_per_device,
    memory_plan,
    shaped_config,
)
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.program_text import BETWEEN_SLICES, Program, kernels
from zflora_jax.parallel.sharding import make_mesh
from zflora_jax.parallel.slices import slice_groups
from zflora_jax.parallel.targets import GIB, Target

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def target_plan(run: RunConfig, config: LlamaConfig, where: Target) -> dict[str, Any]:
    """Plan a run on a target.

    Args:
      run: the settings; its mesh may use a part of the target's devices.
      config: the base's.
      where: the target.

    Returns:
      The plan of `memory_plan`, with "memory_bytes" and "fits" by the compiler, and under
      "compiled": "target" and how many "devices" it has; "bytes" per device as the compiler plans
      them; "kernels" of a step; "attention", its kernel and why it is no flash kernel;
      "collectives", kind -> bytes that a device sends in a step; "roofline". Of a program that the
      compiler refuses because it does not fit there are only "target", "devices", "attention" and
      "needs", the bytes that it names. "changes", if it does not fit, are by the formula of
      `memory_plan`, scaled to the compiler's total.

    Raises:
      ConfigError: the target has fewer devices than the mesh, or its compiler is not installed.
    """
    devices, mesh = where.devices(run.mesh.slices), run.mesh
    given = f"target {where.name} has" if mesh.slices == 1 else f"{mesh.slices} x {where.name} have"
    require(
        mesh.devices <= len(devices),
        f"mesh.data={mesh.data} x mesh.fsdp={mesh.fsdp} x mesh.tensor={mesh.tensor} needs"
        f" {mesh.devices} devices; {given} {len(devices)}. Lower one of them, or choose another"
        f" topology: {', '.join(where.chip.topologies)}.",
    )
    found = compiled_facts(run, config, where) | {"devices": len(devices)}
    memory, total = where.chip.memory, found.get("needs") or found["bytes"]["total"]
    fits, flash = total <= memory and "needs" not in found, found["attention"]["kernel"] != "blocks"
    scale = total / bytes_per_device(run, shaped_config(run, config), flash=flash)["total"]
    plan = memory_plan(run, config, memory / scale / GIB, flash=flash)
    for change in plan.get("changes", []):
        change["total"] = int(change["total"] * scale)
    return plan | {"memory_bytes": memory, "fits": fits, "compiled": found}


def compiled_facts(run: RunConfig, config: LlamaConfig, where: Target) -> dict[str, Any]:
    """What is under "compiled" in `target_plan`."""
    own = run.mesh.devices // run.mesh.slices
    groups = slice_groups(where.devices(run.mesh.slices), run.mesh.slices)
    devices = [device for group in groups for device in group[:own]]
    kernel, reason = step_attention(run, config, make_mesh(run.mesh, devices))
    found: dict[str, Any] = {
        "target": where.name,
        "attention": {"kernel": kernel, "reason": reason},
    }
    try:
        with no_compile_cache():
            compiled = compiled_step(run, config, devices)
    except jax.errors.JaxRuntimeError as error:
        needs = _needed(str(error))
        if needs is None:
            raise
        return found | {"needs": needs}
    program = Program(compiled.as_text())
    sent = program.collectives()
    return found | {
        "bytes": planned_bytes(compiled),
        "kernels": sum(times for op, times in program.runs() if kernels([op])),
        "collectives": sent,
        "roofline": roofline(run, config, where, sum(sent.values()) - sent.get(BETWEEN_SLICES, 0)),
    }


def _needed(message: str) -> int | None:
    """The bytes that a TPU's compiler names where a program does not fit; None for another error.

    "Used 20.11G of 15.75G hbm", or "HLO temporaries (46.96G) exceeds available HBM", which counts
    arguments and results too.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * _UNITS[unit])


def roofline(
    run: RunConfig, config: LlamaConfig, where: Target, link_bytes: int
) -> dict[str, float | str]:
    """The least time of a step by published rates: an estimate, no measurement.

    Operations: 2 a parameter and token in the forward pass, as many for the gradients of the inputs
    and for a forward pass that is computed again, and as many for the gradients of what is trained;
    attention 4 S d_heads a token and layer forward, with S the mean number of keys that a token
    sees, and 2.5 times that backward. Bytes of HBM: kernels once in each pass, saved activations
    written and read, adapters, gradients and moments read and written. Both are lower bounds.

    Args:
      run: the settings.
      config: the base's.
      where: the target.
      link_bytes: that a device sends in a step within its slice. What crosses slices is left out:
        the network between them has no published rate.

    Returns:
      "flops", "hbm_bytes", "link_bytes" per device; "compute_s", "hbm_s", "link_s" at the
      published rates; "bound", the largest of them by name; "step_s", the largest.
    """
    config, chip, mesh = shaped_config(run, config), where.chip, run.mesh
    tokens = run.data.batch_size * run.data.bucket_lengths[-1]
    layer = sum(math.prod(a + b) for a, b in kernel_shapes(config).values())
    head = config.vocab_size * config.norm_dim
    passes = 2 + int(run.train.remat == "block")
    base, trained = config.num_layers * layer + head, count_params(config, run.adapter)
    full = METHODS[run.adapter.method].in_place == "full"
    parameters = 2 * base * (passes + full) + (0 if full else 2 * trained * (passes + 1))
    width = config.num_heads * config.head_dim
    length = run.data.bucket_lengths[-1]
    window = min(config.sliding_window or length, length)
    keys = window - window * (window - 1) / (2 * length)  # of a token, in the mean
    attention = config.num_layers * 4 * keys * width * (passes - 1 + 2.5)
    sizes = bytes_per_device(run, config)
    read = trees.flatten(abstract_arguments(run, config, 1)[0])
    if not config.tie_word_embeddings:
        del read["embed/embedding"]  # of a token a row alone
    kernel_bytes = sum(map(bytes_of, jax.tree.leaves(read))) / mesh.tensor
    found: dict[str, float | str] = {
        "flops": tokens * (parameters + attention) / mesh.devices,
        "hbm_bytes": passes * run.data.grad_accum_steps * kernel_bytes
        + 2 * sizes["activations"] * run.data.grad_accum_steps
        + 2 * (sizes["adapters"] + sizes["gradients"] + sizes["optimizer"]),
        "link_bytes": float(link_bytes),
    }
    times = {
        "compute": float(found["flops"]) / chip.flops,
        "hbm": float(found["hbm_bytes"]) / chip.bandwidth,
        "link": float(found["link_bytes"]) / chip.link,
    }
    bound = max(times, key=lambda name: times[name])
    found |= {f"{name}_s": seconds for name, seconds in times.items()}
    return found | {"bound": bound, "step_s": times[bound]}


def target_lines(plan: Mapping[str, Any]) -> list[str]:
    """What `target_plan` found, in words, for a terminal."""
    found = plan["compiled"]
    lines = ["", f"compiled for {found['target']}, not run; bytes per device"]
    if plan["devices"] < found["devices"]:
        idle = f"the mesh uses {plan['devices']} of {found['devices']} devices"
        lines.insert(1, f"{idle}: mesh.fsdp, mesh.data or mesh.tensor can use the others")
    if "needs" in found:
        return [*lines, f"{'refused: needs':<24} {found['needs'] / GIB:>8.2f} GiB"]
    lines += [f"{name:<24} {size / GIB:>8.2f} GiB" for name, size in found["bytes"].items()]
    kernel, reason = found["attention"]["kernel"], found["attention"]["reason"]
    lines += [
        f"{'kernels of a step':<24} {found['kernels']:>8}",
        f"{'attention':<24} {kernel:>8}" + (f"  ({reason})" if reason else ""),
    ]
    lines += [
        f"{kind:<24} {size / 1e9:>8.3f} GB sent" for kind, size in found["collectives"].items()
    ]
    line = found["roofline"]
    lines += ["", "roofline of a step, an estimate from published rates"]
    for name, amount, unit in (
        ("compute", line["flops"] / 1e12, "TFLOP"),
        ("hbm", line["hbm_bytes"] / 1e9, "GB"),
        ("link", line["link_bytes"] / 1e9, "GB"),
    ):
        lines.append(f"{name:<24} {amount:>8.2f} {unit:<5} {1e3 * line[f'{name}_s']:>9.1f} ms")
    return [*lines, f"bound by {line['bound']}: at least {1e3 * line['step_s']:.1f} ms a step"]
