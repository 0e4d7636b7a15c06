"""Fuse adapters into the base kernels, and take them out again.

A fused kernel is [[W, forward], [s backward, cross]]: its rows are the base and then the adapter
channels of the input stream, its columns those of the output stream. It is an ordinary kernel of a
Llama with wider streams (docs/method.md; this project's reconstruction of zFLoRA).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.blocks import (
    Array,
    block_values,
    in_axis,
    map_kernels,
    pad_axis,
    require_widened,
    stored_values,
    with_block,
    with_codes,
)
from zflora_jax.adapters.methods import ResolvedAdapter, base_config, fused_config, resolve_adapter
from zflora_jax.adapters.shapes import check_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, QK_NORMS, kernel_shapes, param_shapes
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.copies import write_divided
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.ops.quantized_blocks import cut, quantized_names, widen
from zflora_jax.ops.tiling import tile
from zflora_jax.parallel.mesh import mesh_in_use, place_like
from zflora_jax.parallel.sharding import constrain


def fuse(model: Model, adapter: AdapterConfig, adapters: Tree, *, donate: bool = False) -> Model:
    """Build adapters into the kernels of a base model.

    Blocks are built in float32 and cast once to the base's dtype; a base block is copied, never
    recomputed. LoRA and FFA are added in float32 and cast once; "full" replaces the tree. On a mesh
    the fused model is divided as the base is, and no device holds a whole kernel (except for widths
    that the mesh does not divide, see `parallel.sharding.spec`).

    Args:
      model: the base, not packed; or one that an adapter was merged into by addition, which is an
        ordinary model. `unfuse` then gives that one back, and nothing names where it came from.
      adapter: of the adapters.
      adapters: float32, of `init_adapters` or training.
      donate: take each leaf out of `model.params` as it is fused, so that the two models are never
        in memory together. `model` cannot be used afterwards.

    Returns:
      A Model with the wider config and plain parameters that computes what the adapted model
      computes.

    Raises:
      ConfigError: the method merges by addition, and the base is quantised.
      ValueError: leaves are missing, unexpected, misshapen or not finite.
    """
    config = model.config
    if model.adapter is not None and METHODS[model.adapter.method].widens:
        raise ValueError(
            f"this model is already fused ({model.adapter.method}); unfuse it, or use swap to"
            " change its adapter."
        )
    if config.execution.packed:
        raise ValueError("this model is packed for decode; fuse first, then pack.")
    _refuse_merging(adapter, model.params)
    with mesh_in_use(model.params):
        adapters = place_like(model.params, adapters)
        check_adapters(adapters, config, adapter)
        params = (
            _fuse_by_leaf(config, adapter, model.params, adapters)
            if donate
            else _fuse(config, adapter, model.params, adapters)
        )
    # The files of the source are not of a base that another adapter was merged into.
    source, base = (model.source, model.base) if model.adapter is None else (None, None)
    return Model(fused_config(config, adapter), params, model.tokenizer, source, adapter, base)


def _refuse_merging(adapter: AdapterConfig, params: Tree) -> None:
    """ConfigError for a method that changes a base kernel's numbers, where those are codes."""
    codes = quantized_names(params)
    require(
        METHODS[adapter.method].widens or not codes,
        f"method {adapter.method!r} is merged by addition, and {codes[:1]} of this base is stored"
        " as codes, which would have to be computed anew, with an error as large as their own."
        " Keep the adapters beside the base (generate(model, ..., adapter=, adapters=)), or"
        " dequantise the base first (zf.dequantize_model); methods that widen are fused as they"
        " are.",
    )


def _fuse_by_leaf(
    config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> Tree:
    """`_fuse`, a program per leaf, which is taken out of `params`."""
    full, blocks = METHODS[adapter.method].in_place == "full", trees.flatten(adapters)
    fused = {}
    for name, leaf in trees.taken(params):
        beside = name if full else f"{name.rpartition('/')[0]}/"
        own = {block: x for block, x in blocks.items() if block.startswith(beside)}
        part = _fuse(config, adapter, trees.unflatten({name: leaf}), trees.unflatten(own))
        (fused[name],) = jax.block_until_ready(trees.flatten(part)).values()
        del leaf, part
    return trees.unflatten(fused)


@partial(jax.jit, static_argnums=(0, 1))
def _fuse(config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree) -> Tree:
    return constrain(_fused(config, adapter, params, adapters), fused=True)


def _fused(config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree) -> Tree:
    row = METHODS[adapter.method]
    if row.in_place == "full":
        return jax.tree.map(lambda new, old: new.astype(old.dtype), adapters, params)
    flat, p = trees.flatten(adapters), resolve_adapter(config, adapter)

    def visit(kernel: str, name: str, leaf: Any) -> Any:
        names = p.blocks.get(kernel, ())
        blocks = {b: flat[name.removesuffix("kernel") + b] for b in names}
        if not row.widens:
            if not names:
                return leaf
            if row.in_place == "lora":
                return _with_lora(leaf, blocks, adapter.scale_of(kernel), in_axis(config, kernel))
            product = tile(blocks["ffa_a"], int(np.prod(kernel_shapes(config)[kernel][1])))
            return (leaf.astype(jnp.float32) + adapter.scale * product.reshape(leaf.shape)).astype(
                leaf.dtype
            )
        if kernel:
            return _widen_kernel(leaf, blocks, kernel, config, adapter, p)
        module, parameter = name.split("/")[-2:]
        if parameter == "bias":  # of heads, whose adapter dims have none
            return pad_axis(leaf, -1, p.heads, 0)
        if parameter == "scale":
            return pad_axis(leaf, -1, p.heads if module in QK_NORMS else p.residual, 1)
        # The state starts at zero and is dropped before the head, which both keep the base's width.
        return leaf

    return map_kernels(visit, params)


def _with_lora(leaf: Array, blocks: dict[str, Array], scale: float, axis: int) -> Array:
    """A kernel with its low-rank product, and the norms of DoRA; `axis`: see `in_axis`."""
    product = partial(jnp.matmul, precision="highest")
    a, b = blocks["lora_a"], blocks["lora_b"]
    if "start_a" in blocks:  # A B - A0 B0
        a0, b0 = blocks["start_a"], blocks["start_b"]
        delta = product(a - a0, b) + product(a0, b - b0)
    else:
        delta = product(a, b)
    wide = leaf.astype(jnp.float32).reshape(delta.shape) + scale * delta
    if "magnitude" in blocks:
        norms = jnp.linalg.norm(wide, axis=-2, keepdims=True)
        ratio = blocks["magnitude"][..., None, :] / norms
        wide = wide * jnp.where(norms > 0, ratio, 1.0)
    return wide.reshape(leaf.shape).astype(leaf.dtype)


def _widen_kernel(
    leaf: Any,
    blocks: dict[str, Array],
    kernel: str,
    config: LlamaConfig,
    adapter: AdapterConfig,
    p: ResolvedAdapter,
) -> Any:
    axis = in_axis(config, kernel)
    reads, writes = KERNELS[kernel]
    if isinstance(leaf, QuantizedArray):
        coded = widen(leaf, getattr(p, reads), getattr(p, writes))
        for name, block in blocks.items():
            values = stored_values(kernel, name, block, adapter)
            coded = with_codes(coded, values, name, leaf.shape[-1], write_divided)
        return coded
    wide = pad_axis(pad_axis(leaf, axis, getattr(p, reads), 0), -1, getattr(p, writes), 0)
    for name, block in blocks.items():
        wide = with_block(
            wide,
            stored_values(kernel, name, block, adapter),
            name,
            axis,
            leaf.shape[axis],
            leaf.shape[-1],
        )
    return wide


def unfuse(fused: Model) -> tuple[Model, Tree]:
    """Take the adapters out of a fused model.

    Args:
      fused: of `fuse` or `load_model`, not packed.

    Returns:
      (The base model, bit for bit the one that was fused; the adapters in float32, equal up to the
      rounding of fuse's cast and of the division by s.)

    Raises:
      ValueError: the model is not fused, or its method merges by addition (lora, ffa, full).
    """
    adapter = require_widened(fused, "unfuse")
    if fused.config.execution.packed:
        raise ValueError("cannot unfuse a packed model; unfuse the model it was packed from.")
    config = base_config(fused.config, adapter)
    with mesh_in_use(fused.params):
        params, adapters = _unfuse(config, adapter, fused.params)
    return Model(config, params, fused.tokenizer, fused.source, base=fused.base), adapters


def _corner(leaf: Any, shape: tuple[int, ...]) -> Any:
    """The base's part of a leaf, of this shape."""
    if isinstance(leaf, QuantizedArray):
        outputs = slice(0, shape[-1]) if leaf.writes else slice(None)
        return cut(leaf, extra=False, outputs=outputs)
    return leaf[tuple(slice(0, n) for n in shape)]


@partial(jax.jit, static_argnums=(0, 1))
def _unfuse(config: LlamaConfig, adapter: AdapterConfig, params: Tree) -> tuple[Tree, Tree]:
    p, flat, shapes, back = (
        resolve_adapter(config, adapter),
        trees.flatten(params),
        param_shapes(config),
        {},
    )
    for name, leaf in flat.items():
        kernel = name.split("/")[-2]
        for block in p.blocks.get(kernel, ()) if name.endswith("kernel") else ():
            axis = in_axis(config, kernel)
            value = block_values(leaf, block, axis, shapes[name])
            back[name.removesuffix("kernel") + block] = (
                value / adapter.scale if block == "backward" else value
            )
    base = {name: _corner(leaf, shapes[name]) for name, leaf in flat.items()}
    return constrain(trees.unflatten(base), fused=True), constrain(
        trees.unflatten(back), fused=True
    )
