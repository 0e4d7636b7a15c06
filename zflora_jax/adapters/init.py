"""Initial adapters: forward blocks are random, the others zero, so step 0 is the base model."""

from __future__ import annotations

import math
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.dora import DoRA
from zflora_jax.adapters.methods import (
    SERVED_HEAD_DIMS,
    default_extra_head_dim,
    live_layers,
    resolve_adapter,
)
from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, OF_BASE, AdapterConfig
from zflora_jax.core.architecture import group
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.quantized_blocks import quantized_names
from zflora_jax.parallel.devices import widest_head


def init_adapters(key: jax.Array, model: Model, adapter: AdapterConfig) -> trees.Tree:
    """Makes the initial `adapters` collection; the adapted model equals the base until it is
    trained.

    forward and lora_a are random, as `AdapterConfig.init` says; backward, cross, lora_b, ffa_a and
    q's forward are zero (k's is random); DoRA's magnitudes are the norms of the base's columns.
    Blocks are zero in the layers where they are dead (see `methods.live_layers`) and stay zero,
    because they get no gradient. Random values depend on `key` alone, not on whether layers are
    stacked.

    Args:
      key: A jax random key.
      model: The base.
      adapter: Adapter of any method; init="pissa" and "olora" are for `split_base`.

    Returns:
      The tree in float32; for method "full" a float32 copy of the base's parameters.

    Raises:
      ConfigError: method "full" on a base of codes; a start that changes the base; or a value of
        `adapter` that this model does not allow.
    """
    if METHODS[adapter.method].in_place == "full":
        codes = quantized_names(model.params)
        require(
            not codes,
            f"method 'full' trains the base's numbers, and {codes[:1]} of this base is stored as"
            " codes: dequantise it first (zf.dequantize_model), or choose another method.",
        )
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), model.params)
    require(
        adapter.init not in OF_BASE,
        f"adapter.init={adapter.init!r} takes the start out of the base: use base, adapters ="
        " zf.split_base(model, adapter), and that base from then on.",
    )
    config = model.config
    _warn_of_wide_heads(config, adapter)
    kernels, live = resolve_adapter(config, adapter).kernels, live_layers(config, adapter)
    start = adapter.explicit().init

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        _, _, kernel, block = name.split("/")
        beside = kernels[kernel]
        if isinstance(beside, DoRA) and block == "magnitude":
            return jax.lax.map(beside.start, _stacked(model, kernel))
        if block not in beside.random:
            return jnp.zeros(shape, jnp.float32)
        bound = 1 / math.sqrt(math.prod(beside.inputs))
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


def _stacked(model: Model, kernel: str) -> Any:
    """A kernel of all layers, float or quantised."""
    tree = trees.stack_layers(
        {
            layer: part[group(kernel)][kernel]["kernel"]
            for layer, part in model.params.items()
            if layer.startswith("layers")
        },
        model.config.num_layers,
    )
    return tree["layers"]


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
