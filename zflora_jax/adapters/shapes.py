"""The leaves of the adapters collection, and checks against them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, group, kernel_shapes, param_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree


def block_shapes(
    config: LlamaConfig, adapter: AdapterConfig
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the blocks in one layer.

    forward is [*in, *out_z], backward [*in_z, *out], cross [*in_z, *out_z]; the z axes have the
    same heads and, in place of the stream's width, its extra width. Low-rank factors are over
    flattened axes: lora_a and start_a [in, r], lora_b and start_b [r, out], ffa_a [in, r],
    magnitude [out].

    Args:
      config: of the base.
      adapter: of any method.

    Returns:
      Kernel -> block name -> shape.
    """
    p = resolve_adapter(config, adapter)
    extra = {"residual": p.residual, "heads": p.heads, "mlp": p.mlp}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for kernel, names in p.blocks.items():
        reads, writes = KERNELS[kernel]
        axes_in, axes_out = kernel_shapes(config)[kernel]
        z_in, z_out = axes_in[:-1] + (extra[reads],), axes_out[:-1] + (extra[writes],)
        factor_a = (math.prod(axes_in), adapter.rank_of(kernel))
        factor_b = (adapter.rank_of(kernel), math.prod(axes_out))
        every = {
            "lora_a": factor_a,
            "lora_b": factor_b,
            "start_a": factor_a,
            "start_b": factor_b,
            "magnitude": (math.prod(axes_out),),
            "ffa_a": (math.prod(axes_in), adapter.rank),
            "forward": axes_in + z_out,
            "backward": z_in + axes_out,
            "cross": z_in + z_out,
        }
        shapes[kernel] = {name: every[name] for name in names}
    return shapes


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


def check_adapters(adapters: Tree, config: LlamaConfig, adapter: AdapterConfig) -> None:
    """ValueError unless the adapters have the leaves and shapes of the method and are finite."""
    expected = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in adapter_shapes(config, adapter).items()
    }
    trees.check_like(adapters, trees.unflatten(expected), f"adapters of method {adapter.method!r}")
