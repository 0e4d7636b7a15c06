"""The layout for decode: one subtree per layer, kernels that read the same input side by side."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.blocks import STATE_SCALE, map_kernels
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.packing_quantized import (
    filled_codes,
    group_multiple,
    joined,
    packed_table,
    side_by_side,
)
from zflora_jax.adapters.widths import multiples, this_kind
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, QK_NORMS, param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.ops.quantized_blocks import scaled_outputs
from zflora_jax.ops.rope import paired_order
from zflora_jax.parallel.mesh import mesh_in_use, mesh_of
from zflora_jax.parallel.sharding import constrain


def pack_for_decode(
    model: Model,
    kind: str | None = None,
    *,
    beside: AdapterConfig | None = None,
    donate: bool = False,
) -> Model:
    """Bring a model, fused or not, into the layout for decode.

    q|k|v are one kernel and gate|up another, and all kernels of layers are [out, in]: qkv [(H + 2K)
    k, d], o [d, H k], gate_up [2f, d], down [d, f]; `ops.linear.packed_linear` reads them. A fused
    model's residual and MLP streams are filled up with zero channels, which change no result, its
    residual state is stored times `blocks.STATE_SCALE`, and the dims of its widened heads stand in
    `ops.rope.paired_order` in q and k. A family's biases of q, k, v become one, too.

    The kernels stay apart, and only stacked layers become subtrees, on a mesh (divided by
    `parallel.sharding.RULES`; side by side, a slice of one would lie where another's belongs), and
    of a fused model in float16, whose range is too small, or with adapters beside it; of any with
    DoRA beside it, which reads the norms of single kernels; or where kernels that read the same
    input are stored as codes of different kinds.

    Args:
      model: a base or fused model; an already packed one is returned as it is.
      kind: of devices that the widths are for (`adapters.widths`): "cpu", "gpu" or "tpu". None:
        this process's.
      beside: the config of adapters that are to run beside the model.
      donate: take each layer of a model that has a subtree for each out of `model.params` as it is
        packed, so that no two copies are in memory. `model` cannot be used afterwards.
    """
    if model.config.execution.packed:
        return model
    fused = model.config.widened or model.adapter is not None
    narrow = model.config.execution.dtype == "float16"
    apart = apart_for(model, beside) or not side_by_side(model.params)
    if mesh_of(model.params) is not None or (fused and narrow) or apart:
        if not model.config.execution.scan_layers:
            return model
        with mesh_in_use(model.params):
            params = _unstack(model.config, model.params)
        config = model.config.replace(scan_layers=False)
    else:
        kind, whole = kind or this_kind(), group_multiple(model.params)
        config = packed_config(model.config, kind, model.adapter, whole)
        params = _pack(config, kind, model.params, donate)
    return dataclasses.replace(model, config=config, params=params)


def apart_for(model: Model, beside: AdapterConfig | None) -> bool:
    """Whether adapters beside a model ask that its kernels stay apart; see `pack_for_decode`."""
    fused = model.config.widened or model.adapter is not None
    return beside is not None and (fused or beside.use_dora)


def packed_config(
    config: LlamaConfig, kind: str, adapter: AdapterConfig | None = None, group: int = 1
) -> LlamaConfig:
    """The config of a model that `pack_for_decode` packs.

    Args:
      config: of the model, base or fused.
      kind: of devices, as there.
      adapter: that the model was fused from; None for a base.
      group: inputs of a group of a quantised model, see `packing_quantized.group_multiple`.
    """
    config = config.replace(scan_layers=False, packed=True)
    if adapter is None or not METHODS[adapter.method].widens:
        return config
    wanted, base = multiples(kind), base_config(config, adapter)
    d, f = config.hidden_size, config.intermediate_size
    return config.replace(
        fill_residual=-d % math.lcm(wanted.residual, group) if d > base.hidden_size else 0,
        fill_mlp=-f % math.lcm(wanted.mlp, group) if f > base.intermediate_size else 0,
    )


def split_layers(model: Model) -> Model:
    """Give each layer of a stacked model a subtree, which is the layout for decode on a mesh.

    Each leaf is taken out of `model.params`, so that no two copies are in memory: `model` cannot be
    used afterwards.
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
    return dataclasses.replace(model, config=config, params=trees.unflatten(split))


@partial(jax.jit, static_argnums=0)
def _unstack(config: LlamaConfig, params: Tree) -> Tree:
    return constrain(trees.unstack_layers(params, config.num_layers), fused=True)


def _pack(config: LlamaConfig, kind: str, params: Tree, donate: bool) -> Tree:
    """A whole model, each layer by the same compiled program."""
    packed = {
        module: {name: packed_table(leaf, kind) for name, leaf in part.items()}
        for module, part in params.items()
        if not module.startswith("layers")
    }
    if not donate:  # what is packed is a model of its own, whose arrays `swap` may donate
        packed = jax.tree.map(jnp.copy, packed)
    take = params.pop if donate else params.__getitem__
    for i in range(config.num_layers):
        layer = _row(params["layers"], i) if "layers" in params else take(f"layers_{i}")
        packed[f"layers_{i}"] = jax.block_until_ready(_pack_layer(config, kind, layer))
        del layer
    scale = _filled(packed["final_norm"]["scale"], (config.stored.hidden_size,))
    return packed | {"final_norm": {"scale": scale}}


@jax.jit
def _row(stacked: Tree, i: int) -> Tree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)


@partial(jax.jit, static_argnums=(0, 1))
def _pack_layer(config: LlamaConfig, kind: str, layer: Tree) -> Tree:
    shapes = param_shapes(config.stored)
    layer = map_kernels(
        lambda kernel, name, leaf: _filled(
            _turned(config, name, _scaled(config, kernel, name, leaf)), shapes[name]
        ),
        {"layers_0": layer},
    )["layers_0"]

    def stacked(group_name: str, *kernels: str, axes: int = 1) -> dict[str, Any]:
        """The kernels, whose first `axes` axes are their input's, below each other as [out, in]."""
        parts = [layer[group_name][name] for name in kernels]
        leaves = [part["kernel"] for part in parts]
        found = {
            "kernel": joined(leaves, kind)
            if isinstance(leaves[0], QuantizedArray)
            else jnp.concatenate(
                [leaf.reshape(int(np.prod(leaf.shape[:axes])), -1).T for leaf in leaves]
            )
        }
        if "bias" in parts[0]:
            found["bias"] = jnp.concatenate([part["bias"].reshape(-1) for part in parts])
        return found

    attention = {"qkv": stacked("attn", *ATTENTION[:3]), "o": stacked("attn", "o", axes=2)}
    return {
        "attn_norm": layer["attn_norm"],
        "mlp_norm": layer["mlp_norm"],
        "attn": attention | {n: layer["attn"][n] for n in QK_NORMS if n in layer["attn"]},
        "mlp": {"gate_up": stacked("mlp", *MLP[:2]), "down": stacked("mlp", "down")},
    }


def _turned(config: LlamaConfig, name: str, leaf: Any) -> Any:
    """What writes or norms the heads of q or k, with widened heads in `paired_order`, others as
    they are: a rotation of whole heads takes no more operations than the base's. Where the heads
    are normed, their adapter dims are as small as the residual state.
    """
    module = name.split("/")[-2]
    if module not in ("q", "k", *QK_NORMS) or config.base_head_dim is None:
        return leaf
    if config.traits.qk_norm:
        scale = 1 / STATE_SCALE if module in QK_NORMS else STATE_SCALE
        is_state = jnp.arange(config.head_dim) >= config.rotary_dim
        scales = jnp.where(is_state, scale, 1.0)
        leaf = scaled_outputs(leaf, scales)
    order = paired_order(config.rotary_dim, config.head_dim)
    return jax.tree.map(lambda part: part[..., order], leaf)


def _scaled(config: LlamaConfig, kernel: str, name: str, leaf: Any) -> Any:
    """What writes the residual state with its columns times `STATE_SCALE`, and the norms before
    what reads it, which undo that; other leaves of one layer as they are.
    """
    writes = bool(kernel) and KERNELS[kernel][1] == "residual"
    norm = name.endswith(("attn_norm/scale", "mlp_norm/scale"))
    if config.base_hidden_size is None or not (writes or norm):
        return leaf
    is_state = jnp.arange(config.hidden_size) >= config.norm_dim
    scale = STATE_SCALE if writes else 1 / STATE_SCALE
    return scaled_outputs(leaf, jnp.where(is_state, scale, 1.0))


def _filled(leaf: Any, shape: tuple[int, ...]) -> Any:
    """`leaf` with zeros behind it along every axis, up to `shape`."""
    if isinstance(leaf, QuantizedArray):
        return filled_codes(leaf, shape)
    pads = [(0, wide - width) for wide, width in zip(shape, leaf.shape, strict=True)]
    return jnp.pad(leaf, pads) if leaf.shape != shape else leaf
