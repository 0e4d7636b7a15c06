"""Initial adapters: forward blocks are random, the others zero, so step 0 is the base model."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.methods import (
    SERVED_HEAD_DIMS,
    block_shapes,
    default_extra_head_dim,
    live_layers,
    resolve_adapter,
)
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import group, kernel_shapes, param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.parallel.devices import widest_head


def adapter_shapes(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The leaves of the `adapters` collection.

    Args:
      config: of the base.
      adapter: of any method.

    Returns:
      Name -> shape, named and stacked as the base's parameters are ("layers/attn/q/forward": [L,
      ...]). For method "full" these are the base's own parameters.
    """
    if METHODS[adapter.method].in_place == "full":
        return param_shapes(config)
    layer = {
        f"{group(k)}/{k}/{name}": shape
        for k, blocks in block_shapes(config, adapter).items()
        for name, shape in blocks.items()
    }
    if config.execution.scan_layers:
        return {f"layers/{name}": (config.num_layers, *shape) for name, shape in layer.items()}
    return {
        f"layers_{i}/{name}": shape
        for i in range(config.num_layers)
        for name, shape in layer.items()
    }


def check_collection(
    config: LlamaConfig, adapter: AdapterConfig | None, given: Mapping[str, Any] | None
) -> None:
    """ValueError unless `given`, a model's `adapters` collection or None, is that of `adapter`."""
    if adapter is None:
        if given is None:
            return
        raise ValueError(
            "an `adapters` collection was given to a Llama without an adapter: pass"
            " Llama(config, adapter), or leave the collection out."
        )
    if given is None:
        raise ValueError(
            f"Llama has adapter method {adapter.method!r} but no `adapters` collection:"
            " apply({'params': ..., 'adapters': ...}, tokens)."
        )
    shapes = {name: leaf.shape for name, leaf in trees.flatten(given).items()}
    expected = adapter_shapes(config, adapter)
    if diff := trees.difference(expected, shapes):
        raise ValueError(f"the adapters are not those of {adapter}:\n{diff}")
    if wrong := [name for name in expected if shapes[name] != expected[name]]:
        raise ValueError(
            f"the adapters are not those of {adapter}: {wrong[0]} has shape {shapes[wrong[0]]},"
            f" expected {expected[wrong[0]]}."
        )


def init_adapters(key: jax.Array, model: Model, adapter: AdapterConfig) -> trees.Tree:
    """Make the initial `adapters` collection; the adapted model equals the base until it is
    trained.

    forward and lora_a are random, as `AdapterConfig.init` says; backward, cross, lora_b, ffa_a and
    q's forward are zero (k's is random). Blocks are zero in the layers where they are dead (see
    `methods.live_layers`) and stay zero, because they get no gradient. The values depend on `key`
    alone, not on whether layers are stacked.

    Args:
      key: a jax random key.
      model: the base.
      adapter: of any method.

    Returns:
      The tree in float32; for method "full" a float32 copy of the base's parameters.
    """
    if METHODS[adapter.method].in_place == "full":
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), model.params)
    config = model.config
    _warn_of_wide_heads(config, adapter)
    shapes, start, live = (
        kernel_shapes(config),
        adapter.explicit().init,
        live_layers(config, adapter),
    )

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        _, _, kernel, block = name.split("/")
        if block not in ("forward", "lora_a") or (kernel, block) == ("q", "forward"):
            return jnp.zeros(shape, jnp.float32)
        bound = 1 / math.sqrt(math.prod(shapes[kernel][0]))
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        if start == "kaiming_uniform":
            # With a = sqrt(5), as torch starts a linear layer and PEFT LoRA's A.
            drawn = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        else:
            drawn = bound * jax.random.normal(own, shape, jnp.float32)
        dead = [layer for layer in range(config.num_layers) if layer not in live[kernel][block]]
        return drawn.at[np.asarray(dead)].set(0.0) if dead else drawn

    stacked = adapter_shapes(config.replace(scan_layers=True), adapter)
    tree = trees.unflatten({name: draw(name, shape) for name, shape in stacked.items()})
    return tree if config.execution.scan_layers else trees.unstack_layers(tree, config.num_layers)


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
