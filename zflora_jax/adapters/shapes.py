"""The leaves of the adapters collection, and checks against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import group, param_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree


def block_shapes(
    config: LlamaConfig, adapter: AdapterConfig
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the blocks in one layer.

    forward is [*in, *out_z], backward [*in_z, *out], cross [*in_z, *out_z]; the z axes have the
    same heads and, in place of the stream's width, its extra width. Low-rank factors are over
    flattened axes: lora_a [in, r], lora_b [r, out], ffa_a [in, r], magnitude [out].

    Args:
      config: Config of the base.
      adapter: Adapter of any method.

    Returns:
      Kernel -> block name -> shape.
    """
    kernels = resolve_adapter(config, adapter).kernels
    return {kernel: beside.shapes for kernel, beside in kernels.items()}


def adapter_shapes(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The leaves of the `adapters` collection.

    Args:
      config: Config of the base.
      adapter: Adapter of any method.

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


def _expected(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = adapter_shapes(config, adapter).items()
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}


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
    what = f"the `adapters` collection of {adapter}"
    trees.check_like(given, _expected(config, adapter), what, finite=False)


def check_adapters(adapters: Tree, config: LlamaConfig, adapter: AdapterConfig) -> None:
    """ValueError unless the adapters have the leaves and shapes of the method and are finite."""
    trees.check_like(adapters, _expected(config, adapter), f"adapters of method {adapter.method!r}")
