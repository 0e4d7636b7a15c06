"""Fuse adapters into the base kernels, and take them out again.

A fused kernel is [[W, forward], [s backward, cross]]: its rows are the base and then the adapter
channels of the input stream, its columns those of the output stream. It is an ordinary kernel of a
Llama with wider streams (docs/method.md; this project's reconstruction of zFLoRA).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from zflora_jax.adapters.kernel_adapter import Widening
from zflora_jax.adapters.methods import base_config, fused_config, resolve_adapter
from zflora_jax.adapters.shapes import check_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, QK_NORMS, kernel_shapes, param_shapes
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.quantized_blocks import corner, padded, quantized_names, widen
from zflora_jax.parallel.mesh import mesh_in_use, place_like
from zflora_jax.parallel.sharding import constrain


def fuse(model: Model, adapter: AdapterConfig, adapters: Tree, *, donate: bool = False) -> Model:
    """Builds adapters into the kernels of a base model.

    Blocks are built in float32 and cast once to the base's dtype; a base block is copied, never
    recomputed. LoRA and FFA are added in float32 and cast once; "full" replaces the tree. On a mesh
    the fused model is divided as the base is, and no device holds a whole kernel (except for widths
    that the mesh does not divide, see `parallel.sharding.spec`).

    Args:
      model: The base, not packed; or a model that another adapter was merged into by addition,
        which is an ordinary model. `unfuse` then returns that one, without its source.
      adapter: Config of the adapters.
      adapters: Tree of `init_adapters` or training, float32.
      donate: Take each leaf out of `model.params` as it is fused, so that the two models are never
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
        run = _fuse_by_leaf if donate else _fuse
        params = run(config, adapter, model.params, adapters)
    # The files of the source are not those of a base that another adapter was merged into.
    source, base = (model.source, model.base) if model.adapter is None else (None, None)
    return Model(fused_config(config, adapter), params, model.tokenizer, source, adapter, base)


def _refuse_merging(adapter: AdapterConfig, params: Tree) -> None:
    """ConfigError for a method that changes the floats of a base kernel stored as codes."""
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
    if METHODS[adapter.method].in_place == "full":
        fused = jax.tree.map(lambda new, old: new.astype(old.dtype), adapters, params)
        return constrain(fused, fused=True)
    flat, p = trees.flatten(adapters), resolve_adapter(config, adapter)

    def visit(name: str, leaf: Any) -> Any:
        module, parameter = name.split("/")[-2:]
        if module in KERNELS and parameter == "kernel":
            wide, beside = widen(leaf, in_axis(config, module), *p.extra(module)), p.kernels
            if module not in beside:
                return wide
            own = {b: flat[name.removesuffix("kernel") + b] for b in beside[module].shapes}
            return beside[module].fuse(wide, own)
        if parameter == "bias":  # of heads, whose adapter dims have none
            return padded(leaf, {-1: p.heads})
        if parameter == "scale":
            extra = p.heads if module in QK_NORMS else p.residual
            return padded(leaf, {-1: extra}, value=1)
        # The state starts at zero and is dropped before the head, which both keep the base's width.
        return leaf

    return constrain(trees.map_with_names(visit, params), fused=True)


def in_axis(config: LlamaConfig, kernel: str) -> int:
    """The last input axis of a kernel, stacked or not, negative."""
    return -len(kernel_shapes(config)[kernel][1]) - 1


def unfuse(fused: Model) -> tuple[Model, Tree]:
    """Takes the adapters out of a fused model.

    Args:
      fused: A model of `fuse` or `load_model`, not packed.

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


@partial(jax.jit, static_argnums=(0, 1))
def _unfuse(config: LlamaConfig, adapter: AdapterConfig, params: Tree) -> tuple[Tree, Tree]:
    flat, shapes = trees.flatten(params), param_shapes(config)
    base = {name: corner(leaf, shapes[name]) for name, leaf in flat.items()}
    back: dict[str, Any] = {}
    for kernel, beside in widenings(config, adapter).items():
        for name in (name for name in flat if name.endswith(f"/{kernel}/kernel")):
            blocks = beside.unfuse(flat[name]).items()
            back |= {name.removesuffix("kernel") + block: value for block, value in blocks}
    return tuple(constrain(trees.unflatten(found), fused=True) for found in (base, back))  # type: ignore[return-value]


def widenings(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, Widening]:
    """The adapters of a method that widens, by kernel."""
    kernels = resolve_adapter(config, adapter).kernels.items()
    return {kernel: beside for kernel, beside in kernels if isinstance(beside, Widening)}


def require_widened(fused: Model, verb: str) -> AdapterConfig:
    """The adapter of a fused model; ValueError unless it widens the model, as `verb` needs."""
    if fused.adapter is None:
        raise ValueError(f"cannot {verb}: this model is not fused (model.adapter is None).")
    if not METHODS[fused.adapter.method].widens:
        raise ValueError(
            f"cannot {verb}: method {fused.adapter.method!r} was merged into the base kernels by"
            " addition, which cannot be undone exactly; keep the base and the adapters."
        )
    return fused.adapter
