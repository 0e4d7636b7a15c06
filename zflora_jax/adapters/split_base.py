"""LoRA that starts as a part of the base, which is taken out of the base: PiSSA and OLoRA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.kernel_adapter import LowRank
from zflora_jax.adapters.methods import live_layers, resolve_adapter
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import OF_BASE, AdapterConfig
from zflora_jax.core.architecture import group
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.quantized_blocks import quantized_names
from zflora_jax.parallel.mesh import mesh_in_use
from zflora_jax.parallel.sharding import constrain


def split_base(model: Model, adapter: AdapterConfig) -> tuple[Model, Tree | None]:
    """Takes the part of the base that init="pissa" or "olora" starts as out of the base, as PEFT
    does.

    The base and the adapters together compute what the model computes. Train, fuse and decode with
    this base from here on; `plain_lora` gives adapters for the original model. The split depends on
    the model and `adapter` alone, so a resumed run repeats it.

    Args:
      model: A float base, not packed.
      adapter: Adapter of method lora.

    Returns:
      (The base without s A B, each kernel rounded once to its dtype; the adapters, float32.) With
      another init (model, None): its adapters are those of `init_adapters`.

    Raises:
      ConfigError: the base is stored as codes or packed, or a rank exceeds a kernel's smaller side.
    """
    if adapter.init not in OF_BASE:
        return model, None
    codes = quantized_names(model.params)
    require(
        not codes and not model.config.execution.packed,
        f"adapter.init={adapter.init!r} takes a part out of the base's floats, and this base is"
        f" {'stored as codes' if codes else 'packed for decode'}: use a float base that is not"
        " packed (zf.dequantize_model), or another init.",
    )
    kernels = resolve_adapter(model.config, adapter).kernels
    for kernel, beside in kernels.items():
        side = min(math.prod(beside.inputs), math.prod(beside.outputs))
        rank = adapter.rank_of(kernel)
        require(
            rank <= side,
            f"adapter.init={adapter.init!r}: rank {rank} is above the smaller side of {kernel},"
            f" {side}.",
        )
    adapters = init_adapters(jax.random.key(0), model, adapter.replace(init=None))
    with mesh_in_use(model.params):
        params, adapters = _split(model.config, adapter, model.params, adapters)
    return dataclasses.replace(model, params=params), adapters


@partial(jax.jit, static_argnums=(0, 1))
def _split(
    config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> tuple[Tree, Tree]:
    base, found, live = trees.flatten(params), trees.flatten(adapters), live_layers(config, adapter)
    for kernel, beside in resolve_adapter(config, adapter).kernels.items():
        path, layers = f"{group(kernel)}/{kernel}", live[kernel]["lora_a"]
        assert isinstance(beside, LowRank)
        cut = partial(_cut, str(adapter.init), beside)
        updates: dict[str, tuple[jax.Array, ...]]
        if config.execution.scan_layers:
            updates = {f"layers/{path}": _in_layers(cut, base[f"layers/{path}/kernel"], layers)}
        else:
            updates = {f"layers_{i}/{path}": cut(base[f"layers_{i}/{path}/kernel"]) for i in layers}
        for name, (kernel_left, a, b) in updates.items():
            base[f"{name}/kernel"] = kernel_left
            found |= {f"{name}/lora_a": a, f"{name}/lora_b": b}
    return constrain(trees.unflatten(base)), constrain(trees.unflatten(found))


def _in_layers(cut: Any, stacked: jax.Array, layers: Sequence[int]) -> tuple[jax.Array, ...]:
    """`cut` of the `layers` of a stacked kernel, one at a time; zero factors in the others."""
    at = np.asarray(layers)
    left, a, b = jax.lax.map(cut, stacked[at])
    factors = (jnp.zeros((len(stacked), *x.shape[1:])).at[at].set(x) for x in (a, b))
    return stacked.at[at].set(left), *factors


def _cut(start: str, beside: LowRank, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(W - s A B, A, B) of a kernel of one layer."""
    matrix = kernel.astype(jnp.float32).reshape(math.prod(beside.inputs), -1)
    a, b = part_of_base(start, beside.rank, beside.scale, matrix)
    left = matrix - beside.scale * jnp.matmul(a, b, precision="highest")
    return left.reshape(kernel.shape).astype(kernel.dtype), a, b


def part_of_base(
    start: str, rank: int, scale: float, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors of the part s A B of a base kernel.

    Args:
      start: "pissa", the largest singular values (arXiv 2404.02948), or "olora", QR factors of the
        kernel's transpose (arXiv 2406.01775), each as PEFT takes it.
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


def plain_lora(adapter: AdapterConfig, adapters: Tree, start: Tree) -> tuple[AdapterConfig, Tree]:
    """Adapters of `split_base`, trained, as plain LoRA of twice the rank for the original model:
    [A, A0] and [B; -B0], so that A B - A0 B0 is added, as PEFT converts its own.

    Args:
      adapter: Their config, with init="pissa" or "olora".
      adapters: The trained adapters.
      start: The adapters that `split_base` returned.

    Returns:
      (The config of the plain adapters, the adapters.)
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
