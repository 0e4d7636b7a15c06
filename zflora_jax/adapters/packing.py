"""The layout for decode: one subtree per layer, kernels that read the same input side by side."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.blocks import Array, pad_axis
from zflora_jax.core import trees
from zflora_jax.core.architecture import ATTENTION, MLP
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.linear import whole_vectors
from zflora_jax.parallel.mesh import mesh_in_use, mesh_of
from zflora_jax.parallel.sharding import constrain


def pack_for_decode(model: Model) -> Model:
    """Bring a Llama, fused or not, into the layout for decode.

    q|k|v are one kernel and gate|up another, and all kernels of layers are [out, in]: qkv [(H + 2K)
    k, d], o [d, H k], gate_up [2f, d], down [d, f], with zeros as inputs up to
    `ops.linear.whole_vectors`; `ops.linear.packed_linear` reads them. On a mesh the kernels stay
    apart, divided by `parallel.sharding.RULES` (side by side, a slice of one would lie where
    another's belongs), and only stacked layers become subtrees.

    Args:
      model: a base or fused model; an already packed one is returned as it is.
    """
    if model.config.execution.packed:
        return model
    if mesh_of(model.params) is not None:
        if not model.config.execution.scan_layers:
            return model
        with mesh_in_use(model.params):
            params = _unstack(model.config, model.params)
        config = model.config.replace(scan_layers=False, remat=False)
    else:
        params = _pack(model.config, model.params)
        config = model.config.replace(scan_layers=False, packed=True, remat=False)
    return dataclasses.replace(model, config=config, params=params)


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
    tree = trees.unstack_layers(params, config.num_layers)
    for i in range(config.num_layers):
        layer = tree[f"layers_{i}"]

        def stacked(
            group_name: str, *kernels: str, axes: int = 1, layer: Tree = layer
        ) -> dict[str, Array]:
            """The kernels, whose first `axes` axes are their input's, below each other as [out,
            in].
            """
            leaves = [layer[group_name][name]["kernel"] for name in kernels]
            kernel = jnp.concatenate(
                [leaf.reshape(int(np.prod(leaf.shape[:axes])), -1).T for leaf in leaves]
            )
            return {
                "kernel": pad_axis(
                    kernel, -1, whole_vectors(kernel.shape[-1]) - kernel.shape[-1], 0
                )
            }

        tree[f"layers_{i}"] = {
            "attn_norm": layer["attn_norm"],
            "mlp_norm": layer["mlp_norm"],
            "attn": {"qkv": stacked("attn", *ATTENTION[:3]), "o": stacked("attn", "o", axes=2)},
            "mlp": {"gate_up": stacked("mlp", *MLP[:2]), "down": stacked("mlp", "down")},
        }
    return tree


pack = pack_for_decode  # its public name of before
