"""Initial adapters: forward blocks are random, the others zero, so step 0 is the base model."""

from __future__ import annotations

import math
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.methods import (
    SERVED_HEAD_DIMS,
    default_extra_head_dim,
    live_layers,
    resolve_adapter,
)
from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, OF_BASE, AdapterConfig
from zflora_jax.core.architecture import group, kernel_shapes
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.quantized import float_values
from zflora_jax.ops.quantized_blocks import quantized_names
from zflora_jax.parallel.devices import widest_head


def init_adapters(key: jax.Array, model: Model, adapter: AdapterConfig) -> trees.Tree:
    """Make the initial `adapters` collection; the adapted model equals the base until it is
    trained.

    forward and lora_a are random, as `AdapterConfig.init` says; backward, cross, lora_b, ffa_a and
    q's forward are zero (k's is random); DoRA's magnitudes are the norms of the base's columns, and
    factors that start as a part of the base are that part. Blocks are zero in the layers where they
    are dead (see `methods.live_layers`) and stay zero, because they get no gradient. Random values
    depend on `key` alone, not on whether layers are stacked.

    Args:
      key: a jax random key.
      model: the base.
      adapter: of any method.

    Returns:
      The tree in float32; for method "full" a float32 copy of the base's parameters.

    Raises:
      ConfigError: method "full" on a base of codes; or a value of `adapter` that this model does
        not allow.
    """
    if METHODS[adapter.method].in_place == "full":
        codes = quantized_names(model.params)
        require(
            not codes,
            f"method 'full' trains the base's numbers, and {codes[:1]} of this base is stored as"
            " codes: dequantise it first (zf.dequantize_model), or choose another method.",
        )
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), model.params)
    config = model.config
    _warn_of_wide_heads(config, adapter)
    shapes, start, live = (
        kernel_shapes(config),
        adapter.explicit().init,
        live_layers(config, adapter),
    )

    of_base = {} if METHODS[adapter.method].in_place != "lora" else _of_base(model, adapter)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        _, _, kernel, block = name.split("/")
        dead = [layer for layer in range(config.num_layers) if layer not in live[kernel][block]]
        if name in of_base:
            part = of_base[name]
            return part.at[np.asarray(dead)].set(0.0) if dead else part
        if block not in ("forward", "lora_a") or (kernel, block) == ("q", "forward"):
            return jnp.zeros(shape, jnp.float32)
        bound = 1 / math.sqrt(math.prod(shapes[kernel][0]))
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        if start == "kaiming_uniform":
            # With a = sqrt(5), as torch starts a linear layer and PEFT LoRA's A.
            drawn = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        else:
            drawn = bound * jax.random.normal(own, shape, jnp.float32)
        return drawn.at[np.asarray(dead)].set(0.0) if dead else drawn

    stacked = adapter_shapes(config.replace(scan_layers=True), adapter)
    tree = trees.unflatten({name: draw(name, shape) for name, shape in stacked.items()})
    return tree if config.execution.scan_layers else trees.unstack_layers(tree, config.num_layers)


def _of_base(model: Model, adapter: AdapterConfig) -> dict[str, jax.Array]:
    """The leaves of LoRA that are made of the base's kernels, by their stacked names."""
    config, found, flat = model.config, dict[str, jax.Array](), trees.flatten(model.params)
    if not adapter.use_dora and adapter.init not in OF_BASE:
        return found
    for kernel in resolve_adapter(config, adapter).blocks:
        own, name = f"{group(kernel)}/{kernel}", f"layers/{group(kernel)}/{kernel}"
        stacked = flat.get(f"{name}/kernel")
        if stacked is None:
            apart = [flat[f"layers_{i}/{own}/kernel"] for i in range(config.num_layers)]
            stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *apart)
        made = _of_kernel(config, adapter, kernel, stacked)
        found |= {f"{name}/{block}": leaf for block, leaf in made.items()}
    return found


def _of_kernel(
    config: LlamaConfig, adapter: AdapterConfig, kernel: str, stacked: Any
) -> dict[str, jax.Array]:
    """`_of_base` of one kernel of all layers, float or quantised; a layer's numbers at a time."""
    found, inputs = dict[str, jax.Array](), math.prod(kernel_shapes(config)[kernel][0])

    def numbers(layer: Any) -> jax.Array:
        return float_values(layer).reshape(inputs, -1).astype(jnp.float32)

    if adapter.use_dora:
        found["magnitude"] = jax.lax.map(
            lambda layer: jnp.linalg.norm(numbers(layer), axis=0), stacked
        )
    if adapter.init in OF_BASE:
        start = str(adapter.init), adapter.rank_of(kernel), adapter.scale_of(kernel)
        layers = np.asarray(live_layers(config, adapter)[kernel]["lora_a"])
        live = jax.tree.map(lambda part: part[layers], stacked)
        parts = jax.lax.map(lambda layer: part_of_base(*start, numbers(layer)), live)
        for factor, part in zip("ab", parts, strict=True):
            whole = jnp.zeros((config.num_layers, *part.shape[1:])).at[layers].set(part)
            # Arrays of their own: one of them is donated to every step.
            found |= {f"{s}_{factor}": jnp.array(whole) for s in ("lora", "start")}
    return found


def part_of_base(
    start: str, rank: int, scale: float, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors of the part of a base kernel that LoRA starts as, s A B.

    Args:
      start: "pissa", the largest singular values (arXiv 2404.02948), or "olora", of the QR factors
        of its transpose (arXiv 2406.01775), each as PEFT takes it.
      rank: r, at most the smaller side of the kernel.
      scale: s.
      kernel: [in, out] float32.

    Returns:
      A [in, r] and B [r, out].
    """
    if start == "olora":
        q, _ = jnp.linalg.qr(kernel.T[:, :rank])  # the first columns of Q are those of these
        return jnp.matmul(kernel, q, precision="highest"), q.T
    u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
    roots = jnp.sqrt(values[:rank] / scale)
    return u[:, :rank] * roots[None], roots[:, None] * v[:rank]


def _warn_of_wide_heads(config: LlamaConfig, adapter: AdapterConfig) -> None:
    """Warn of heads that the attention kernels of servers, or of this GPU, do not take."""
    heads = config.rotary_dim + resolve_adapter(config, adapter).heads
    if heads != config.rotary_dim and heads not in SERVED_HEAD_DIMS:
        advice = "no extra_head_dim gives one that they run"
        if config.rotary_dim < max(SERVED_HEAD_DIMS):
            advice = (
                f"extra_head_dim={default_extra_head_dim(config.rotary_dim)} is the smallest that"
                " they run"
            )
        warnings.warn(
            f"head_dim {config.rotary_dim} + {heads - config.rotary_dim} = {heads} is outside"
            f" {SERVED_HEAD_DIMS}: transformers runs it, but attention kernels of servers may"
            f" refuse it (vLLM's CPU build does); {advice}.",
            stacklevel=3,
        )
    limit = widest_head() if config.execution.dtype in ("bfloat16", "float16") else 0
    if config.rotary_dim <= limit < heads:
        warnings.warn(
            f"head_dim {config.rotary_dim} + {heads - config.rotary_dim} = {heads}: cuDNN's"
            f" attention takes heads up to {limit} on this GPU, so attention is computed by plain"
            " products, which take more time and memory for long sequences. Method"
            " 'zflora-minimal' leaves the heads as they are; so does extra_head_dim=0 where the"
            " method widens other streams too.",
            stacklevel=3,
        )
