"""The layout for decode: one subtree per layer, kernels that read the same input side by side."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.blocks import STATE_SCALE, Array, map_kernels
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.widths import multiples, this_kind
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, QK_NORMS, param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.rope import paired_order
from zflora_jax.parallel.mesh import mesh_in_use, mesh_of
from zflora_jax.parallel.sharding import constrain


def pack_for_decode(
    model: Model, kind: str | None = None, *, beside: AdapterConfig | None = None
) -> Model:
    """Bring a model, fused or not, into the layout for decode.

    q|k|v are one kernel and gate|up another, and all kernels of layers are [out, in]: qkv [(H + 2K)
    k, d], o [d, H k], gate_up [2f, d], down [d, f]; `ops.linear.packed_linear` reads them. A fused
    model's residual and MLP streams are filled up with zero channels, which change no result, its
    residual state is stored times `blocks.STATE_SCALE`, and the dims of its widened heads stand in
    `ops.rope.paired_order` in q and k. A family's biases of q, k, v become one, too.

    The kernels stay apart, and only stacked layers become subtrees, on a mesh (divided by
    `parallel.sharding.RULES`; side by side, a slice of one would lie where another's belongs), and
    of a fused model in float16, whose range is too small, or with adapters beside it; or of any
    with DoRA beside it, which reads the norms of single kernels.

    Args:
      model: a base or fused model; an already packed one is returned as it is.
      kind: of devices that the widths are for (`adapters.widths`): "cpu", "gpu" or "tpu". None:
        this process's.
      beside: the config of adapters that are to run beside the model.
    """
    if model.config.execution.packed:
        return model
    fused = model.config.widened or model.adapter is not None
    narrow = model.config.execution.dtype == "float16"
    if mesh_of(model.params) is not None or (fused and narrow) or apart_for(model, beside):
        if not model.config.execution.scan_layers:
            return model
        with mesh_in_use(model.params):
            params = _unstack(model.config, model.params)
        config = model.config.replace(scan_layers=False)
    else:
        config = packed_config(model.config, kind or this_kind(), model.adapter)
        params = _pack(config, model.params)
    return dataclasses.replace(model, config=config, params=params)


def apart_for(model: Model, beside: AdapterConfig | None) -> bool:
    """Whether adapters beside a model ask that its kernels stay apart; see `pack_for_decode`."""
    fused = model.config.widened or model.adapter is not None
    return beside is not None and (fused or beside.use_dora)


def packed_config(
    config: LlamaConfig, kind: str, adapter: AdapterConfig | None = None
) -> LlamaConfig:
    """The config of a model that `pack_for_decode` packs.

    Args:
      config: of the model, base or fused.
      kind: of devices, as there.
      adapter: that the model was fused from; None for a base.
    """
    config = config.replace(scan_layers=False, packed=True)
    if adapter is None or not METHODS[adapter.method].widens:
        return config
    wanted, base = multiples(kind), base_config(config, adapter)
    d, f = config.hidden_size, config.intermediate_size
    return config.replace(
        fill_residual=-d % wanted.residual if d > base.hidden_size else 0,
        fill_mlp=-f % wanted.mlp if f > base.intermediate_size else 0,
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


@partial(jax.jit, static_argnums=0)
def _pack(config: LlamaConfig, params: Tree) -> Tree:
    shapes = param_shapes(config.stored)
    tree = map_kernels(
        lambda kernel, name, leaf: _filled(
            _turned(config, name, _scaled(config, kernel, leaf)), shapes[name]
        ),
        trees.unstack_layers(params, config.num_layers),
    )
    for i in range(config.num_layers):
        layer = tree[f"layers_{i}"]

        def stacked(
            group_name: str, *kernels: str, axes: int = 1, layer: Tree = layer
        ) -> dict[str, Array]:
            """The kernels, whose first `axes` axes are their input's, below each other as [out,
            in].
            """
            parts = [layer[group_name][name] for name in kernels]
            leaves = [part["kernel"] for part in parts]
            found = {
                "kernel": jnp.concatenate(
                    [leaf.reshape(int(np.prod(leaf.shape[:axes])), -1).T for leaf in leaves]
                )
            }
            if "bias" in parts[0]:
                found["bias"] = jnp.concatenate([part["bias"].reshape(-1) for part in parts])
            return found

        attention = {"qkv": stacked("attn", *ATTENTION[:3]), "o": stacked("attn", "o", axes=2)}
        tree[f"layers_{i}"] = {
            "attn_norm": layer["attn_norm"],
            "mlp_norm": layer["mlp_norm"],
            "attn": attention | {n: layer["attn"][n] for n in QK_NORMS if n in layer["attn"]},
            "mlp": {"gate_up": stacked("mlp", *MLP[:2]), "down": stacked("mlp", "down")},
        }
    return tree


def _turned(config: LlamaConfig, name: str, leaf: Array) -> Array:
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
        scales = jnp.where(is_state, scale, 1.0).astype(leaf.dtype)
        leaf = leaf * scales.reshape((1,) * (leaf.ndim - 1) + scales.shape)
    return leaf[..., paired_order(config.rotary_dim, config.head_dim)]


def _scaled(config: LlamaConfig, kernel: str, leaf: Array) -> Array:
    """A kernel of one layer with its residual state times `STATE_SCALE`; other leaves as they
    are.
    """
    if not kernel or config.base_hidden_size is None:
        return leaf
    reads, writes = KERNELS[kernel]
    axis, scale = (0, 1 / STATE_SCALE) if reads == "residual" else (-1, STATE_SCALE)
    assert "residual" in (reads, writes)
    shape = [1] * leaf.ndim
    shape[axis] = -1
    is_state = (jnp.arange(config.hidden_size) >= config.norm_dim).reshape(shape)
    return leaf * jnp.where(is_state, scale, 1.0).astype(leaf.dtype)


def _filled(leaf: Array, shape: tuple[int, ...]) -> Array:
    """`leaf` with zeros behind it along every axis, up to `shape`."""
    pads = [(0, wide - width) for wide, width in zip(shape, leaf.shape, strict=True)]
    return jnp.pad(leaf, pads) if leaf.shape != shape else leaf


pack = pack_for_decode  # its public name of before
