"""The layout for decode: one subtree per layer, kernels that read the same input joined.

Codes of quantised kernels are moved, never computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.widths import multiples, this_kind
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, PACKED, QK_NORMS, kernel_shapes, param_shapes
from zflora_jax.core.model import Model, require_there
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.quantized import QuantizedArray, dequantize, filled, scaled_outputs
from zflora_jax.ops.rope import paired_order
from zflora_jax.parallel.mesh import mesh_in_use, mesh_of
from zflora_jax.parallel.sharding import constrain

# Factor of the residual state in packed kernels; a power of two changes no product. Its square is
# below the rounding of float32, so RMSNorm may sum over all channels, which is one kernel, not two.
STATE_SCALE = 2.0**-24


def pack_for_decode(
    model: Model,
    kind: str | None = None,
    *,
    unmerged: AdapterConfig | None = None,
    donate: bool = False,
) -> Model:
    """Brings a model, fused or not, into the layout for decode.

    q, k and v become one kernel, with their biases, and gate and up another; kernels are [out, in].
    A fused model's residual and MLP streams are padded with zero channels, its residual state is
    stored times `STATE_SCALE`, and the dims of its widened heads are in `ops.rope.paired_order` in
    q and k. On a CPU, codes other than int8 with one scale per output are dequantised, because
    products with floats are faster.

    In these cases kernels stay separate, and only stacked layers become subtrees: on a mesh; for a
    fused model in float16, whose range is too small, or next to unmerged adapters; for any model
    next to DoRA, which reads the norms of single kernels; and if kernels of one input have several
    types of codes.

    Args:
      model: A base or fused model; a packed one is returned as it is.
      kind: Type of device, "cpu", "gpu" or "tpu"; None for this process's.
      unmerged: Config of adapters that are to run next to the model.
      donate: Whether to empty `model.params` on the way, so that memory never holds two copies.

    Raises:
      ConfigError: The model's parameters were donated.
    """
    require_there(model.params)
    kind = kind or this_kind()
    if model.config.execution.packed:
        return model
    if donate:
        model = split_layers(model)
    config = model.config
    narrow = _fused(model) and config.execution.dtype == "float16"
    # On a mesh, a part of a joined kernel would lie on the device of another.
    separate = mesh_of(model.params) is not None or narrow or apart_for(model, unmerged)
    if separate or not _joinable(model.params, kind):
        if not config.execution.scan_layers:
            return model
        params = trees.unflatten(trees.flatten(model.params))  # `model` keeps its leaves
        return split_layers(replace(model, params=params))
    config = packed_config(config, kind, model.adapter, group_multiple(model.params, kind))
    return replace(model, config=config, params=_pack(config, kind, model.params, donate))


def _fused(model: Model) -> bool:
    return model.config.widened or model.adapter is not None


def apart_for(model: Model, unmerged: AdapterConfig | None) -> bool:
    """True if adapters next to a model need its kernels separate; see `pack_for_decode`."""
    reads = unmerged is not None and (unmerged.use_dora or METHODS[unmerged.method].kernel)
    return unmerged is not None and (_fused(model) or bool(reads))


def packed_config(
    config: LlamaConfig, kind: str, adapter: AdapterConfig | None = None, group: int = 1
) -> LlamaConfig:
    """The config of a base or fused model as `pack_for_decode` packs it for a type of device.
    adapter: Config of the adapter that is fused in; group: Result of `group_multiple`.
    """
    config = config.replace(scan_layers=False, packed=True)
    if adapter is None or not METHODS[adapter.method].widens:
        return config
    (of_residual, of_mlp), base = multiples(kind), base_config(config, adapter)
    d, f = config.hidden_size, config.intermediate_size
    return config.replace(
        fill_residual=-d % math.lcm(of_residual, group) if d > base.hidden_size else 0,
        fill_mlp=-f % math.lcm(of_mlp, group) if f > base.intermediate_size else 0,
    )


def _stays_codes(leaf: Any, kind: str) -> bool:
    """True if a leaf has codes that a type of device multiplies with; others become floats."""
    return isinstance(leaf, QuantizedArray) and (kind != "cpu" or leaf.one_scale)


def group_multiple(params: Tree, kind: str) -> int:
    """The multiple of inputs that makes all groups whole; 1 for floats."""
    leaves = trees.flatten(params).values()
    return math.lcm(*(leaf.group or 1 for leaf in leaves if _stays_codes(leaf, kind)))


def split_layers(model: Model) -> Model:
    """Gives each layer of a stacked model a subtree, the layout for decode on a mesh. Leaves are
    removed from `model.params`, so that memory never holds two copies: `model` cannot be used
    afterwards.
    """
    if not model.config.execution.scan_layers:
        return model
    split: Tree = {}
    with mesh_in_use(model.params):
        for name, leaf in trees.taken(model.params):
            part = trees.flatten(_unstack(model.config, trees.unflatten({name: leaf})))
            split |= jax.block_until_ready(part)
            del leaf, part
    config = model.config.replace(scan_layers=False)
    return replace(model, config=config, params=trees.unflatten(split))


@partial(jax.jit, static_argnums=0)
def _unstack(config: LlamaConfig, params: Tree) -> Tree:
    return constrain(trees.unstack_layers(params, config.num_layers), fused=True)


def _for_device(leaf: Any, kind: str, dtype: str) -> Any:
    floats = isinstance(leaf, QuantizedArray) and not _stays_codes(leaf, kind)
    return dequantize(leaf, dtype) if floats else leaf


def _joinable(params: Tree, kind: str) -> bool:
    """True if kernels of one input are all floats on a device, or codes of one type and group."""
    forms: dict[str, set[Any]] = {}
    for name, leaf in trees.flatten(params).items():
        if name.endswith("/kernel") and not name.startswith("lm_head"):
            layer, group, kernel, _ = name.split("/")
            form = (leaf.kind, leaf.group) if _stays_codes(leaf, kind) else None
            forms.setdefault("/".join((layer, group, KERNELS[kernel][0])), set()).add(form)
    return all(len(found) == 1 for found in forms.values())


def _pack(config: LlamaConfig, kind: str, params: Tree, donate: bool) -> Tree:
    """A whole model, each layer by the same compiled program."""

    def table(leaf: Any) -> Any:
        leaf = _for_device(leaf, kind, config.execution.dtype)
        return joined([leaf], 1, kind) if isinstance(leaf, QuantizedArray) and leaf.writes else leaf

    packed = {
        module: {name: table(leaf) for name, leaf in part.items()}
        for module, part in params.items()
        if not module.startswith("layers")
    }
    if not donate:  # the packed model has its own arrays, which `swap` may donate
        packed = jax.tree.map(jnp.copy, packed)
    take = params.pop if donate else params.__getitem__
    for i in range(config.num_layers):
        layer = _row(params["layers"], i) if "layers" in params else take(f"layers_{i}")
        packed[f"layers_{i}"] = jax.block_until_ready(_pack_layer(config, kind, layer))
        del layer
    scale = filled(packed["final_norm"]["scale"], (config.stored.hidden_size,))
    return packed | {"final_norm": {"scale": scale}}


@jax.jit
def _row(stacked: Tree, i: int) -> Tree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)


@partial(jax.jit, static_argnums=(0, 1))
def _pack_layer(config: LlamaConfig, kind: str, layer: Tree) -> Tree:
    shapes, reads, flat = param_shapes(config.stored), kernel_shapes(config), {}
    for name, leaf in trees.flatten(layer).items():
        leaf = _for_device(leaf, kind, config.execution.dtype)
        flat[name] = filled(_outputs(config, name.split("/")[-2], leaf), shapes[f"layers_0/{name}"])
    packed = {name: leaf for name, leaf in flat.items() if name.endswith("/scale")}
    for name, kernels in PACKED.items():
        group, count = name.split("/")[0], len(reads[kernels[0]][0])
        leaves = [flat[f"{group}/{kernel}/kernel"] for kernel in kernels]
        packed[f"{name}/kernel"] = joined(leaves, count, kind)
        biases = [flat[b] for kernel in kernels if (b := f"{group}/{kernel}/bias") in flat]
        if biases:
            packed[f"{name}/bias"] = jnp.concatenate([bias.reshape(-1) for bias in biases])
    return trees.unflatten(packed)


def state_scale(config: LlamaConfig, module: str) -> float:
    """The factor of a kernel's adapter outputs, or of a norm's gain, in a packed model: they are
    small where a norm follows, whose gain undoes it.
    """
    if module in ("q", "k", *QK_NORMS):
        small = config.base_head_dim is not None and config.traits.qk_norm
    else:
        writes = KERNELS[module][1] if module in KERNELS else "residual"  # else a norm
        small = config.base_hidden_size is not None and writes == "residual"
    if not small:
        return 1.0
    return 1 / STATE_SCALE if module.endswith("norm") else STATE_SCALE


def head_order(config: LlamaConfig, module: str) -> Any:
    """The native index of each place on a packed kernel's last axis; None if they are equal."""
    if config.base_head_dim is None or module not in ("q", "k", *QK_NORMS):
        return None
    # Whole widened heads are rotated, which takes no more operations than a base's.
    return paired_order(config.base_head_width, config.head_dim)


def _outputs(config: LlamaConfig, module: str, leaf: Any) -> Any:
    """A leaf of one layer with its last axis scaled by `state_scale` and in `head_order`."""
    if (scale := state_scale(config, module)) != 1:
        base = config.base_head_width if module in ("q", "k", *QK_NORMS) else config.base_width
        is_state = jnp.arange(leaf.shape[-1]) >= base
        leaf = scaled_outputs(leaf, jnp.where(is_state, scale, 1.0))
    if (order := head_order(config, module)) is not None:
        leaf = jax.tree.map(lambda part: part[..., order], leaf)
    return leaf


def joined(leaves: Sequence[Any], reads: int, kind: str) -> Any:
    """Joins kernels of one layer that read the same inputs, as [out, in]. All are float, or all are
    `filled` codes of one type and group size; on a TPU, codes in groups become [groups, inputs of a
    group, out], as XLA reads them inside a product. reads: Number of input axes.
    """

    def side_by_side(*parts: Any) -> Any:
        # Scales of kernels before a norm may be wider, see `scaled_outputs`.
        dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        flat = [part.reshape(math.prod(part.shape[:reads]), -1).astype(dtype) for part in parts]
        return jnp.concatenate(flat, axis=1)

    whole, first = jax.tree.map(side_by_side, *leaves), leaves[0]
    if not isinstance(first, QuantizedArray):
        return whole.T
    whole = replace(whole, reads=1, writes=1, inner=first.shape[reads - 1])
    if kind == "tpu" and first.group:
        grouped = -1, first.group, whole.shape[-1]
        return whole.map(lambda part: part.reshape(grouped), lambda part: part[:, None], reads=2)
    return replace(jax.tree.map(lambda part: part.T, whole), writes=0)
