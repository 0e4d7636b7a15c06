"""Fuse adapters into the base kernels, take them out again, swap them, pack kernels for decode: transforms of parameter trees.

A fused kernel is [[W, forward], [s backward, cross]]: rows are the input stream's base then adapter channels, columns the output stream's. It is an
ordinary kernel of a Llama with wider streams (docs/method.md; this project's reconstruction of zFLoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax import trees
from zflora_jax.adapters.init import adapter_shapes
from zflora_jax.adapters.methods import ATTENTION, KERNELS, MLP, Plan, base_config, fused_config, group, kernel_shapes, plan
from zflora_jax.config import METHODS, AdapterConfig
from zflora_jax.layers import tile
from zflora_jax.mesh import beside, mesh_in_use, mesh_of, several_devices
from zflora_jax.model import Model, param_shapes
from zflora_jax.model_config import LlamaConfig
from zflora_jax.products import move, whole_vectors
from zflora_jax.sharding import constrain
from zflora_jax.trees import Tree

Array = jax.Array
Piece = tuple[Array, tuple[int, ...]]  # what is written into a kernel, and the indices where it begins


def _check(adapters: Tree, config: LlamaConfig, adapter: AdapterConfig) -> None:
    expected = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in adapter_shapes(config, adapter).items()}
    trees.check_like(adapters, trees.unflatten(expected), f"adapters of method {adapter.method!r}")


def _layer_map(fn: Callable[[str, str, Any], Any], params: Tree) -> Tree:
    """fn(kernel, name, leaf) at the kernels of KERNELS; other leaves (norms, embeddings, head) are kernel ""."""

    def visit(name: str, leaf: Any) -> Any:
        parts = name.split("/")
        return fn(parts[-2] if parts[0].startswith("layers") and parts[-2] in KERNELS else "", name, leaf)

    return trees.map_with_names(visit, params)


def _in_axis(config: LlamaConfig, kernel: str) -> int:
    """The axis of a kernel (stacked or not) that runs over its input stream; the output stream's is always the last."""
    return -len(kernel_shapes(config)[kernel][1]) - 1


def fuse(model: Model, adapter: AdapterConfig, adapters: Tree) -> Model:
    """`model` with the adapters built into its kernels: a Model with the wider config, plain params and no adapters, computing what the adapted
    model computes.

    Blocks are built in float32 and cast once to the base's dtype; a base block is copied, never recomputed. LoRA and FFA are added in float32 and
    cast once; full
    replaces the tree. On a mesh the fused model is divided as the base is, and no device holds a whole kernel meanwhile (but see `sharding.spec` of
    widths that it does not divide). Raises ValueError for leaves that are missing, unexpected, misshapen or not finite.
    """
    config = model.config
    if model.adapter is not None:
        raise ValueError(f"this model is already fused ({model.adapter.method}); unfuse it, or use swap to change its adapter.")
    if config.packed:
        raise ValueError("this model is packed for decode; fuse first, then pack.")
    with mesh_in_use(model.params):
        adapters = beside(model.params, adapters)
        _check(adapters, config, adapter)
        params = _fuse(config, adapter, model.params, adapters)
    return Model(fused_config(config, adapter), params, model.tokenizer, model.source, adapter)


@partial(jax.jit, static_argnums=(0, 1))
def _fuse(config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree) -> Tree:
    return constrain(_fused(config, adapter, params, adapters), fused=True)


def _fused(config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree) -> Tree:
    in_place = METHODS[adapter.method].in_place
    if in_place == "full":
        return jax.tree.map(lambda new, old: new.astype(old.dtype), adapters, params)
    flat, p = trees.flatten(adapters), plan(config, adapter)

    def visit(kernel: str, name: str, leaf: Array) -> Array:
        names = p.blocks.get(kernel, ())
        blocks = {b: flat[name.removesuffix("kernel") + b] for b in names}
        if in_place != "none":
            if not names:
                return leaf
            if in_place == "lora":
                product = jnp.matmul(blocks["lora_a"], blocks["lora_b"], precision="highest")
            else:
                product = tile(blocks["ffa_a"], int(np.prod(kernel_shapes(config)[kernel][1])))
            return (leaf.astype(jnp.float32) + adapter.scale * product.reshape(leaf.shape)).astype(leaf.dtype)
        if kernel:
            return _widen_kernel(leaf, blocks, kernel, config, adapter, p)
        if p.residual and name == "embed/embedding":
            return _pad(leaf, -1, p.residual, 0)
        if p.residual and name == "lm_head/kernel":
            return _pad(leaf, -2, p.residual, 0)
        return _pad(leaf, -1, p.residual, 1)  # norm gains

    return _layer_map(visit, params)


def _pad(leaf: Array, axis: int, width: int, value: float) -> Array:
    pads = [(0, 0)] * leaf.ndim
    pads[axis] = (0, width)
    return jnp.pad(leaf, pads, constant_values=value)


def _widen_kernel(leaf: Array, blocks: dict[str, Array], kernel: str, config: LlamaConfig, adapter: AdapterConfig, p: Plan) -> Array:
    axis = _in_axis(config, kernel)
    reads, writes = KERNELS[kernel]
    wide = _pad(_pad(leaf, axis, getattr(p, reads), 0), -1, getattr(p, writes), 0)
    for name, block in blocks.items():
        wide = _with_block(wide, _stored(name, block, adapter), name, axis, leaf.shape[axis], leaf.shape[-1])
    return wide


def _with_block(wide: Array, value: Array, block: str, axis: int, base_in: int, base_out: int) -> Array:
    """A wide kernel with `value` where `block` belongs, chosen number by number: that is divided over devices as the kernel is, whereas XLA gathers
    the whole of a divided kernel to write into a part of it."""
    region, pads, inside = _region(block, axis, base_in, base_out), [(0, 0)] * wide.ndim, jnp.ones((1,) * wide.ndim, bool)
    for at, part in ((axis, region[1]), (-1, region[-1])):
        start, stop, _ = part.indices(wide.shape[at])
        pads[at] = start, wide.shape[at] - stop
        place = jnp.arange(wide.shape[at]).reshape([-1 if i == wide.ndim + at else 1 for i in range(wide.ndim)])
        inside = inside & (place >= start) & (place < stop)
    return jnp.where(inside, jnp.pad(value.astype(wide.dtype), pads), wide)


def _region(block: str, axis: int, base_in: int, base_out: int) -> tuple[Any, ...]:
    """The index of a block in a wide kernel: forward is top right, backward bottom left, cross bottom right."""
    rows = slice(0, base_in) if block == "forward" else slice(base_in, None)
    columns = slice(0, base_out) if block == "backward" else slice(base_out, None)
    return (..., rows, *[slice(None)] * (-axis - 2), columns)


def _stored(name: str, block: Array, adapter: AdapterConfig) -> Array:
    return block * adapter.scale if name == "backward" else block


def _require_widened(fused: Model, verb: str) -> AdapterConfig:
    if fused.adapter is None:
        raise ValueError(f"cannot {verb}: this model is not fused (model.adapter is None).")
    if METHODS[fused.adapter.method].in_place != "none":
        raise ValueError(
            f"cannot {verb}: method {fused.adapter.method!r} was merged into the base kernels by addition, which cannot be undone exactly; "
            f"keep the base and the adapters."
        )
    return fused.adapter


def unfuse(fused: Model) -> tuple[Model, Tree]:
    """The base model, bit-identical to the one that was fused, and the adapters (float32; equal up to the rounding of fuse's cast and of dividing
    by s).

    ValueError for a model that is not fused, or whose method merged by addition (lora, ffa, full).
    """
    adapter = _require_widened(fused, "unfuse")
    if fused.config.packed:
        raise ValueError("cannot unfuse a packed model; unfuse the model it was packed from.")
    config = base_config(fused.config, adapter)
    with mesh_in_use(fused.params):
        params, adapters = _unfuse(config, adapter, fused.params)
    return Model(config, params, fused.tokenizer, fused.source), adapters


@partial(jax.jit, static_argnums=(0, 1))
def _unfuse(config: LlamaConfig, adapter: AdapterConfig, params: Tree) -> tuple[Tree, Tree]:
    p, flat, shapes, back = plan(config, adapter), trees.flatten(params), param_shapes(config), {}
    for name, leaf in flat.items():
        kernel = name.split("/")[-2]
        for block in p.blocks.get(kernel, ()) if name.startswith("layers") else ():
            axis = _in_axis(config, kernel)
            value = leaf[_region(block, axis, shapes[name][axis], shapes[name][-1])].astype(jnp.float32)
            back[name.removesuffix("kernel") + block] = value / adapter.scale if block == "backward" else value
    base = {name: leaf[tuple(slice(0, n) for n in shapes[name])] for name, leaf in flat.items()}
    return constrain(trees.unflatten(base), fused=True), constrain(trees.unflatten(back), fused=True)


def swap(fused: Model, adapters: Tree) -> Model:
    """`fused` (packed or not) with its adapter blocks replaced by `adapters` of the same AdapterConfig. Only those blocks are written: O(adapter)
    bytes, but for bfloat16 on a CPU, where XLA copies each kernel that they are part of, and on a mesh, where each kernel is gone through once.

    The buffers of `fused.params` are donated: use the returned model, not the old one. ValueError as for `fuse`.
    """
    adapter = _require_widened(fused, "swap")
    base = base_config(fused.config.replace(packed=False), adapter)
    given = base.replace(scan_layers="layers" in adapters)
    with mesh_in_use(fused.params):
        adapters = beside(fused.params, adapters)
        _check(adapters, given, adapter)
        params = _swap(fused.config, base, adapter, fused.params, adapters)
    return Model(fused.config, params, fused.tokenizer, fused.source, adapter)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _swap(config: LlamaConfig, base: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree) -> Tree:
    flat = trees.flatten(params)
    adapters = (trees.stack_layers if config.scan_layers else trees.unstack_layers)(adapters, base.num_layers)
    pieces: dict[str, list[Piece]] = {}  # of each leaf: what is written, and where it begins
    for name, block in trees.flatten(adapters).items():
        layer, _, kernel, block_name = name.split("/")
        axis, shape = _in_axis(base, kernel), kernel_shapes(base)[kernel]
        region = _region(block_name, axis, shape[0][-1], shape[1][-1])
        value = _stored(block_name, block, adapter)
        if several_devices():
            at = f"{layer}/{group(kernel)}/{kernel}/kernel"
            flat[at] = _with_block(flat[at], value, block_name, axis, shape[0][-1], shape[1][-1])
            continue
        if config.packed:
            leaf_name, first = _place(config, kernel)
            found = _packed_pieces(value, kernel_shapes(config)[kernel], first, region[1], region[-1])
        else:
            leaf_name = f"{group(kernel)}/{kernel}/kernel"
            found = [(value, (0,) * (value.ndim - len(region) + 1) + tuple(part.start or 0 for part in region[1:]))]
        pieces.setdefault(f"{layer}/{leaf_name}", []).extend(found)
    written = {name: _write(flat[name], *zip(*found, strict=True)) for name, found in pieces.items()}
    return constrain(trees.unflatten(flat | written), fused=True) if several_devices() else trees.unflatten(flat | written)


def _write(leaf: Array, pieces: Sequence[Array], starts: Sequence[tuple[int, ...]]) -> Array:
    """`pieces` into `leaf`, each from its indices on."""

    def update(leaf: Array, *pieces: Array) -> Array:
        for piece, start in zip(pieces, starts, strict=True):
            leaf = jax.lax.dynamic_update_slice(leaf, piece, start)
        return leaf

    return move(update, (leaf, *(piece.astype(leaf.dtype) for piece in pieces)))


def _place(config: LlamaConfig, kernel: str) -> tuple[str, int]:
    """The packed leaf that holds a kernel, and the first of its rows there."""
    heads = {"q": 0, "k": config.num_heads, "v": config.num_heads + config.num_kv_heads}
    if kernel in heads:
        return "attn/qkv/kernel", heads[kernel] * config.head_dim
    if kernel in ("gate", "up"):
        return "mlp/gate_up/kernel", 0 if kernel == "gate" else config.intermediate_size
    return f"{group(kernel)}/{kernel}/kernel", 0


def _packed_pieces(value: Array, shape: Any, first: int, reads: slice, writes: slice) -> list[Piece]:
    """A block, value [*in, *out], as pieces of a leaf [out, in] whose rows from `first` on are a kernel of `shape`; with where each begins.

    One per head where heads are wider than the base's: XLA writes those in place, and copied the leaf where the same was written through a view of
    its heads.
    """
    inputs, outputs = _spans(shape[0], reads), _spans(shape[1], writes)
    flat = value.reshape(sum(count for _, count in inputs), -1).T
    found: list[Piece] = []
    at_in = 0
    for column, width in inputs:
        at_out = 0
        for row, height in outputs:
            found.append((flat[at_out : at_out + height, at_in : at_in + width], (first + row, column)))
            at_out += height
        at_in += width
    return found


def _spans(axes: tuple[int, ...], part: slice) -> list[tuple[int, int]]:
    """Where `part` of the last of `axes` lies in all of them flattened: (start, count), one if that is in one piece."""
    start, stop, _ = part.indices(axes[-1])
    heads = int(np.prod(axes[:-1]))
    if stop - start == axes[-1]:
        return [(0, heads * axes[-1])]
    return [(head * axes[-1] + start, stop - start) for head in range(heads)]


def pack(model: Model) -> Model:
    """`model` in the layout for decode: one subtree per layer, q|k|v in one kernel and gate|up in one, and all kernels of layers as [out, in]:
    qkv [(H + 2K) k, d], o [d, H k], gate_up [2f, d], down [d, f], with zeros as inputs up to `products.whole_vectors`. For any Llama, fused or not.
    The layout is what `products.row_products` reads. On a mesh the kernels stay apart, as sharding.RULES divide them (side by side, a part of one
    would lie where another's belongs): only layers that are stacked get a subtree each.
    """
    if model.config.packed:
        return model
    if mesh_of(model.params) is not None:
        if not model.config.scan_layers:
            return model
        with mesh_in_use(model.params):
            params = _unstack(model.config, model.params)
        return Model(model.config.replace(scan_layers=False, remat=False), params, model.tokenizer, model.source, model.adapter)
    config = model.config.replace(scan_layers=False, packed=True, remat=False)
    return Model(config, _pack(model.config, model.params), model.tokenizer, model.source, model.adapter)


@partial(jax.jit, static_argnums=0)
def _unstack(config: LlamaConfig, params: Tree) -> Tree:
    return constrain(trees.unstack_layers(params, config.num_layers), fused=True)


@partial(jax.jit, static_argnums=0)
def _pack(config: LlamaConfig, params: Tree) -> Tree:
    tree = trees.unstack_layers(params, config.num_layers)
    for i in range(config.num_layers):
        layer = tree[f"layers_{i}"]

        def stacked(group_name: str, *kernels: str, axes: int = 1, layer: Tree = layer) -> dict[str, Array]:
            """The kernels, whose first `axes` axes are their input's, below each other as [out, in]."""
            leaves = [layer[group_name][name]["kernel"] for name in kernels]
            kernel = jnp.concatenate([leaf.reshape(int(np.prod(leaf.shape[:axes])), -1).T for leaf in leaves])
            return {"kernel": _pad(kernel, -1, whole_vectors(kernel.shape[-1]) - kernel.shape[-1], 0)}

        tree[f"layers_{i}"] = {
            "attn_norm": layer["attn_norm"],
            "mlp_norm": layer["mlp_norm"],
            "attn": {"qkv": stacked("attn", *ATTENTION[:3]), "o": stacked("attn", "o", axes=2)},
            "mlp": {"gate_up": stacked("mlp", *MLP[:2]), "down": stacked("mlp", "down")},
        }
    return tree
