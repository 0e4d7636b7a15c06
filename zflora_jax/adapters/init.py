"""Initial adapters: the first step computes what the base does. PiSSA and OLoRA start as a part of
the base, which is then removed from it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.kernel_adapter import DoRA
from zflora_jax.adapters.methods import (
    SERVED_HEAD_DIMS,
    adapter_shapes,
    live_layers,
    resolve_adapter,
)
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, OF_BASE, AdapterConfig
from zflora_jax.core.architecture import group
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.quantized import quantized_names
from zflora_jax.parallel.mesh import mesh_in_use
from zflora_jax.parallel.sharding import constrain


def init_adapters(key: jax.Array, model: Model, adapter: AdapterConfig) -> trees.Tree:
    """Makes the initial `adapters` collection; the adapted model equals the base until it is
    trained.

    forward and lora_a are random (`AdapterConfig.init`); DoRA's magnitudes are the norms of the
    base's columns. Other blocks, q's forward and dead layers (`live_layers`) are zero. Random
    values depend only on `key`, not on whether layers are stacked.

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
            f"method 'full' trains the base's floats, and {codes[:1]} of this base is stored as"
            " codes: dequantise it first (zf.dequantize_model), or choose another method.",
        )
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), model.params)
    require(
        adapter.init not in OF_BASE,
        f"adapter.init={adapter.init!r} removes the start from the base: use base, adapters ="
        " zf.split_base(model, adapter), and that base from then on.",
    )
    config = model.config
    _warn_of_wide_heads(config, adapter)
    kernels, live = resolve_adapter(config, adapter).kernels, live_layers(config, adapter)
    start = adapter.explicit().init

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        _, _, kernel, block = name.split("/")
        kernel_adapter = kernels[kernel]
        if isinstance(kernel_adapter, DoRA) and block == "magnitude":
            return jax.lax.map(kernel_adapter.start, _stacked(model, kernel))
        if block not in kernel_adapter.random:
            return jnp.zeros(shape, jnp.float32)
        bound = 1 / math.sqrt(math.prod(kernel_adapter.inputs))
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
    extra = resolve_adapter(config, adapter).heads
    width = config.base_head_width + extra
    if extra and width not in SERVED_HEAD_DIMS:
        warnings.warn(
            f"head_dim {config.base_head_width} + {extra} = {width} is outside {SERVED_HEAD_DIMS}:"
            " transformers runs it, but attention kernels of servers may refuse it (vLLM's CPU"
            " build does). Leave extra_head_dim unset for the smallest that they run, if there is"
            " one.",
            stacklevel=3,
        )


def _stacked(model: Model, kernel: str) -> Any:
    """A kernel of all layers, float or quantised."""
    layers = {
        layer: part[group(kernel)][kernel]["kernel"]
        for layer, part in model.params.items()
        if layer.startswith("layers")
    }
    return trees.stack_layers(layers, model.config.num_layers)["layers"]


def split_base(model: Model, adapter: AdapterConfig) -> tuple[Model, Tree | None]:
    """Removes the start of init="pissa" or "olora" from the base, as PEFT does.

    The new base and the adapters together compute what the model computes. Train, fuse and decode
    with this base; `plain_lora` gives adapters for the original one. The split depends only on the
    model and `adapter`, so a resumed run repeats it.

    Args:
      model: A float base, not packed.
      adapter: Adapter of method lora.

    Returns:
      (The base without s A B, each kernel rounded once to its dtype; the adapters, float32.) For
      any other init (model, None); `init_adapters` then makes the adapters.

    Raises:
      ConfigError: the base is stored as codes or packed, or a rank exceeds a kernel's smaller side.
    """
    if adapter.init not in OF_BASE:
        return model, None
    codes = quantized_names(model.params)
    require(
        not codes and not model.config.execution.packed,
        f"adapter.init={adapter.init!r} removes a part of the base's floats, and this base is"
        f" {'stored as codes' if codes else 'packed for decode'}: use a float base that is not"
        " packed (zf.dequantize_model), or another init.",
    )
    kernels = resolve_adapter(model.config, adapter).kernels
    for kernel, kernel_adapter in kernels.items():
        side = min(map(math.prod, (kernel_adapter.inputs, kernel_adapter.outputs)))
        rank = adapter.rank_of(kernel)
        above = f"rank {rank} is above the smaller side of {kernel}, {side}."
        require(rank <= side, f"adapter.init={adapter.init!r}: {above}")
    adapters = init_adapters(jax.random.key(0), model, adapter.replace(init=None))
    with mesh_in_use(model.params):
        params, adapters = _split(model.config, adapter, model.params, adapters)
    return dataclasses.replace(model, params=params), adapters


@partial(jax.jit, static_argnums=(0, 1))
def _split(
    config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> tuple[Tree, Tree]:
    live, count = live_layers(config, adapter), config.num_layers
    base, found = (trees.flatten(trees.stack_layers(tree, count)) for tree in (params, adapters))
    for kernel, kernel_adapter in resolve_adapter(config, adapter).kernels.items():
        path, at = f"layers/{group(kernel)}/{kernel}", np.asarray(live[kernel]["lora_a"])
        cut = partial(_cut, str(adapter.init), kernel_adapter)
        parts = jax.lax.map(cut, base[f"{path}/kernel"][at])  # one layer at a time
        for leaf, part in zip(("kernel", "lora_a", "lora_b"), parts, strict=True):
            tree, name = base if leaf == "kernel" else found, f"{path}/{leaf}"
            tree[name] = tree[name].at[at].set(part)
    left, start = trees.unflatten(base), trees.unflatten(found)
    if not config.execution.scan_layers:
        left, start = (trees.unstack_layers(tree, count) for tree in (left, start))
    return constrain(left), constrain(start)


def _cut(
    start: str, kernel_adapter: Any, kernel: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(W - s A B, A [in, r], B [r, out]) of one layer's kernel, with A and B as in PEFT."""
    matrix = kernel.astype(jnp.float32).reshape(math.prod(kernel_adapter.inputs), -1)
    rank = kernel_adapter.rank
    if start == "olora":  # QR of the transpose (arXiv 2406.01775); its first columns suffice
        q, _ = jnp.linalg.qr(matrix.T[:, :rank])
        a, b = jnp.matmul(matrix, q, precision="highest"), q.T
    else:  # "pissa", the largest singular values (arXiv 2404.02948)
        u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
        roots = jnp.sqrt(values[:rank] / kernel_adapter.scale)
        a, b = u[:, :rank] * roots[None], roots[:, None] * v[:rank]
    left = matrix - kernel_adapter.scale * jnp.matmul(a, b, precision="highest")
    return left.reshape(kernel.shape).astype(kernel.dtype), a, b


def plain_lora(adapter: AdapterConfig, adapters: Tree, start: Tree) -> tuple[AdapterConfig, Tree]:
    """Converts trained adapters of `split_base` to plain LoRA of twice the rank for the original
    model, as PEFT does: [A, A0] and [B; -B0] add A B - A0 B0.

    Args:
      adapter: Their config, with init="pissa" or "olora".
      adapters: The trained adapters.
      start: The adapters that `split_base` returned.
    """
    first, found = trees.flatten(start), trees.flatten(adapters)
    for name in [name for name in found if name.endswith("/lora_a")]:
        other = name.removesuffix("a") + "b"
        found[name] = jnp.concatenate([found[name], first[name]], axis=-1)
        found[other] = jnp.concatenate([found[other], -first[other]], axis=-2)
    factor = math.sqrt(2.0) if adapter.use_rslora else 2.0  # keeps alpha / divisor
    plain = adapter.replace(
        init=None,
        rank=2 * adapter.rank,
        alpha=None if adapter.alpha is None else factor * adapter.alpha,
        rank_pattern=tuple((kernel, 2 * rank) for kernel, rank in adapter.rank_pattern),
        alpha_pattern=tuple((kernel, factor * alpha) for kernel, alpha in adapter.alpha_pattern),
    )
    return plain, trees.unflatten(found)
