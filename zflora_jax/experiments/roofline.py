"""The least time of a train step, from published rates of a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from zflora_jax.adapters.widths import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.step_shapes import step_arguments, stored_bytes
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.sharding import AXES
from zflora_jax.parallel.targets import Chip


def step_flops(
    run: RunConfig,
    config: LlamaConfig,
    tokens: float,
    keys: float,
    learned: float,
    recomputed: bool = False,
) -> float:
    """Counts the operations of a train step on all devices together. Each parameter and token needs
    2 in the forward pass, 2 for the gradients of inputs and, if trained, 2 for its own gradient:
    4N for a frozen base of N parameters, 6N in full fine-tuning. Attention needs 4 d_heads per key,
    token and layer forward, and 2.5 times that backward. train.loss=dpo adds a forward pass of the
    base.

    Args:
      run: The run's settings.
      config: The base model's config.
      tokens: Tokens of the step, without padding.
      keys: Number of keys that they attend to, summed over the tokens.
      learned: Number of tokens that go through the head.
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
    """Number of passes: forward, backward, the reference's (DPO), and `recomputed` ones."""
    return 2 + (recomputed and run.train.remat == "block") + run.train.pairs


def batch_flops(run: RunConfig, config: LlamaConfig, batch: Mapping[str, Any]) -> float:
    """`step_flops` of a host's batch, extrapolated to the rows of all processes."""
    segments = batch["segments"]
    number = segments + (segments.max() + 1) * np.arange(len(segments))[:, None]
    lengths = [n for n in np.bincount(number[segments > 0]).tolist() if n]
    keys = sum(n * mean_keys(config, n) for n in lengths)
    found = step_flops(run, config, sum(lengths), keys, int(batch["loss_mask"].sum()))
    return found * run.data.batch_size / len(segments)


def roofline(
    run: RunConfig, config: LlamaConfig, chip: Chip, link_bytes: float = 0.0
) -> dict[str, Any]:
    """Estimates the least time of a train step at the longest of data.bucket_lengths.

    Recomputed passes count. HBM: kernels once per pass; adapters, gradients and moments both ways.

    Args:
      run: The run's settings.
      config: The base model's config.
      chip: The device.
      link_bytes: Bytes that a device sends in a step within its slice, from its program.

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
        "link": (link_bytes, chip.link),
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
