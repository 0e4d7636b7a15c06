"""Fuse adapters into the base kernels, swap them for others, and take them out again.

A fused kernel is [[W, forward], [s backward, cross]]: its rows are the base and then the adapter
channels of the input stream, its columns those of the output stream (docs/method.md; this
project's reconstruction of zFLoRA).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.kernel_adapter import Widening
from zflora_jax.adapters.methods import base_config, check_adapters, fused_config, resolve_adapter
from zflora_jax.adapters.packing import head_order, state_scale
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import (
    KERNELS,
    QK_NORMS,
    group,
    kernel_shapes,
    packed_rows,
    param_shapes,
)
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.copies import write_divided, write_pieces
from zflora_jax.ops.quantized import (
    QuantizedArray,
    corner,
    each_part,
    filled,
    group_count,
    is_finite,
    padded,
    quantize_block,
    quantized_names,
    scaled_outputs,
    widen,
)
from zflora_jax.parallel.mesh import mesh_in_use, place_like, several_devices
from zflora_jax.parallel.sharding import constrain


def fuse(model: Model, adapter: AdapterConfig, adapters: Tree, *, donate: bool = False) -> Model:
    """Builds adapters into the kernels of a base model.

    Blocks are built in float32 and cast once to the base's dtype; a base block is copied, never
    recomputed. LoRA and FFA are added in float32 and cast once; "full" replaces the tree. On a mesh
    the fused model is divided as the base is.

    Args:
      model: The base, not packed; or a model that another adapter was merged into by addition,
        which `unfuse` then returns.
      adapter: Config of the adapters.
      adapters: Adapter tree from `init_adapters` or training, float32.
      donate: Whether to remove each leaf from `model.params` as it is fused, so that memory never
        holds both models. `model` cannot be used afterwards.

    Returns:
      A Model with plain parameters that computes what the adapted model computes.

    Raises:
      ConfigError: the method merges by addition, and the base is quantised.
      ValueError: leaves are missing, unexpected, misshapen or not finite, or a kernel would not be
        finite in the base's dtype.
    """
    require(
        isinstance(adapter, AdapterConfig),
        f"fuse(model, adapter, adapters): adapter is a {type(adapter).__name__}, no AdapterConfig.",
    )
    config, row = model.config, METHODS[adapter.method]
    if model.adapter is not None and METHODS[model.adapter.method].widens:
        raise ValueError(
            f"this model is already fused ({model.adapter.method}); unfuse it, or use swap to"
            " change its adapter."
        )
    if config.execution.packed:
        raise ValueError("this model is packed for decode; fuse first, then pack.")
    codes = quantized_names(model.params)
    require(
        row.keeps_codes or not codes,
        f"method {adapter.method!r} is merged by addition, and {codes[:1]} of this base is stored"
        " as codes, which would be rounded a second time. Keep the adapters unmerged"
        " (generate(model, ..., adapter=, adapters=)), or dequantise the base first"
        " (zf.dequantize_model).",
    )
    with mesh_in_use(model.params):
        adapters = place_like(model.params, adapters)
        check_adapters(adapters, config, adapter)
        run = _fuse_by_leaf if donate else _fuse
        params, finite = run(config, adapter, model.params, adapters)
        _require_finite(finite, params)
    # The files of the source are not those of a base that another adapter was merged into.
    source, base = (model.source, model.base) if model.adapter is None else (None, None)
    return Model(fused_config(config, adapter), params, model.tokenizer, source, adapter, base)


def _fuse_by_leaf(
    config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> tuple[Tree, Tree]:
    """`_fuse` with one program per leaf, each removed from `params`."""
    full, blocks = METHODS[adapter.method].in_place == "full", trees.flatten(adapters)
    fused, finite = dict[str, Any](), dict[str, Any]()
    for name, leaf in trees.taken(params):
        prefix = name if full else f"{name.rpartition('/')[0]}/"
        own = {block: x for block, x in blocks.items() if block.startswith(prefix)}
        part, flags = _fuse(config, adapter, trees.unflatten({name: leaf}), trees.unflatten(own))
        fused |= jax.block_until_ready(trees.flatten(part))
        finite |= flags
        del leaf, part
    return trees.unflatten(fused), finite


@partial(jax.jit, static_argnums=(0, 1))
def _fuse(
    config: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> tuple[Tree, Tree]:
    """(The fused parameters; name of each leaf that an adapter changes -> whether it is finite.)"""
    finite: dict[str, Any] = {}
    if METHODS[adapter.method].in_place == "full":
        fused = jax.tree.map(lambda new, old: new.astype(old.dtype), adapters, params)
        finite |= {name: is_finite(leaf) for name, leaf in trees.flatten(fused).items()}
        return constrain(fused, fused=True), finite
    flat, resolved = trees.flatten(adapters), resolve_adapter(config, adapter)

    def visit(name: str, leaf: Any) -> Any:
        module, parameter = name.split("/")[-2:]
        if module in KERNELS and parameter == "kernel":
            axis = -len(kernel_shapes(config)[module][1]) - 1
            wide = widen(leaf, axis, *resolved.extra(module))
            kernel_adapter = resolved.kernels.get(module)
            if kernel_adapter is None:
                return wide
            blocks = {b: flat[f"{name[:-6]}{b}"] for b in kernel_adapter.shapes}
            wide = kernel_adapter.fuse(wide, blocks)
            finite[name] = is_finite(wide)
            return wide
        if parameter == "bias":  # of heads, whose adapter dims have none
            return padded(leaf, {-1: resolved.heads})
        if parameter == "scale":
            extra = resolved.heads if module in QK_NORMS else resolved.residual
            return padded(leaf, {-1: extra}, value=1)
        # The state starts at zero and is dropped before the head, which both keep the base's width.
        return leaf

    return constrain(trees.map_with_names(visit, params), fused=True), finite


def _require_finite(finite: Tree, params: Tree) -> None:
    """Raises ValueError with the names that are not `finite`, and the dtypes of `params`."""
    known = {name: flag for name, flag in finite.items() if not isinstance(flag, jax.core.Tracer)}
    wrong = [name for name, flag in known.items() if not trees.gathered(flag)]
    if wrong:
        leaves = (leaf for name, leaf in trees.flatten(params).items() if name.endswith("/kernel"))
        dtypes = {str(getattr(leaf, "scales", leaf).dtype) for leaf in leaves}
        raise ValueError(
            f"{', '.join(wrong[:4])}: NaN or infinite as {', '.join(sorted(dtypes))}, because the"
            " adapter exceeds its range, or the base is damaged. Load the base in float32 or"
            " bfloat16, or train again with a smaller learning rate."
        )


def unfuse(fused: Model) -> tuple[Model, Tree]:
    """Takes the adapters out of a fused model.

    Args:
      fused: A model of `fuse` or `load_model`, not packed.

    Returns:
      (The base, bit for bit the one that was fused; the adapters in float32, equal up to the
      rounding of fuse's cast and of the division by s.)

    Raises:
      ValueError: the model is not fused, or its method merges by addition (lora, ffa, full).
    """
    adapter = _require_widened(fused, "unfuse")
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
    for kernel, kernel_adapter in _widenings(config, adapter).items():
        for name in (name for name in flat if name.endswith(f"/{kernel}/kernel")):
            blocks = kernel_adapter.unfuse(flat[name]).items()
            back |= {name.removesuffix("kernel") + block: value for block, value in blocks}
    return tuple(constrain(trees.unflatten(found), fused=True) for found in (base, back))  # type: ignore[return-value]


def _widenings(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, Widening]:
    """The adapters of a method that widens, by kernel."""
    kernels = resolve_adapter(config, adapter).kernels.items()
    return {
        kernel: kernel_adapter
        for kernel, kernel_adapter in kernels
        if isinstance(kernel_adapter, Widening)
    }


def _require_widened(fused: Model, verb: str) -> AdapterConfig:
    """The adapter of a fused model; ValueError unless it widens the model, as `verb` needs."""
    if fused.adapter is None:
        raise ValueError(f"cannot {verb}: this model is not fused (model.adapter is None).")
    if not METHODS[fused.adapter.method].widens:
        raise ValueError(
            f"cannot {verb}: method {fused.adapter.method!r} was merged into the base kernels by"
            " addition, which cannot be undone exactly; keep the base and the adapters."
        )
    return fused.adapter


def swap(fused: Model, adapters: Tree) -> Model:
    """Replaces the adapter blocks of a fused model.

    Only those blocks are written, O(adapter) bytes, with two exceptions: XLA copies each of their
    kernels in bfloat16 on a CPU, and on a mesh each kernel is written once. Kernels that
    `pack_for_decode` dequantised get float blocks.

    Args:
      fused: Fused model, packed or not. The buffers of its parameters are donated, so it cannot be
        used afterwards.
      adapters: Adapters of the same AdapterConfig, float32.

    Raises:
      ValueError: An error of `fuse`, or the method merges by addition; `fused` is unchanged.
    """
    adapter = _require_widened(fused, "swap")
    plain = fused.config.replace(packed=False, fill_residual=0, fill_mlp=0)
    base = base_config(plain, adapter)
    with mesh_in_use(fused.params):
        adapters = place_like(fused.params, adapters)
        given = base.replace(scan_layers="layers" in adapters)
        check_adapters(adapters, given, adapter, finite=False)
        finite = _in_range(fused.config, base, adapter, fused.params, adapters)
        _require_finite(finite, fused.params)
        params = _swap(fused.config, base, adapter, fused.params, adapters)
    return replace(fused, params=params)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _in_range(
    config: LlamaConfig, base: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> Tree:
    """Name of a block -> whether it is finite as `_swap` stores it."""
    flat, blocks, finite = trees.flatten(params), trees.flatten(adapters), dict[str, Any]()
    for kernel, kernel_adapter in _widenings(base, adapter).items():
        end = f"/{_leaf_of(config, kernel)}/kernel"
        like = next(leaf for name, leaf in flat.items() if name.endswith(end))
        for name in (name for name in blocks if f"/{kernel}/" in name):
            value = kernel_adapter.stored(name.rpartition("/")[2], blocks[name])
            finite[name] = is_finite(_stored_as(config, kernel, value, like))
    return finite


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _swap(
    config: LlamaConfig, base: LlamaConfig, adapter: AdapterConfig, params: Tree, adapters: Tree
) -> Tree:
    flat, execution = trees.flatten(params), config.execution
    arrange = trees.stack_layers if execution.scan_layers else trees.unstack_layers
    layers, divided = arrange(adapters, base.num_layers), several_devices()
    write = write_divided if divided else _write_in_place
    for kernel, kernel_adapter in _widenings(base, adapter).items():
        leaf = _leaf_of(config, kernel)
        for layer in layers:
            blocks, name = layers[layer][group(kernel)][kernel], f"{layer}/{leaf}/kernel"
            if execution.packed:
                flat[name] = _swap_packed(config, kernel, kernel_adapter, flat[name], blocks)
            else:
                flat[name] = kernel_adapter.fuse(flat[name], blocks, write)
    swapped = trees.unflatten(flat)
    return constrain(swapped, fused=True) if divided else swapped


def _leaf_of(config: LlamaConfig, kernel: str) -> str:
    """The name in a layer of the leaf that holds a kernel, without "/kernel"."""
    packed = config.execution.packed
    return packed_rows(config)[kernel][0] if packed else f"{group(kernel)}/{kernel}"


def _stored_as(config: LlamaConfig, kernel: str, value: jax.Array, leaf: Any) -> Any:
    """A block of a kernel as the leaf that holds it, packed or not, stores it."""
    if not isinstance(leaf, QuantizedArray):
        return value.astype(leaf.dtype)
    inputs, outputs = kernel_shapes(config)[kernel]
    return quantize_block(value, replace(leaf, reads=len(inputs), writes=len(outputs)))


def _write_in_place(x: jax.Array, value: jax.Array, spans: dict[int, slice]) -> jax.Array:
    """`ops.copies.write_divided` on one device, in place."""
    start = tuple((spans[axis].start or 0) if axis in spans else 0 for axis in range(-x.ndim, 0))
    return write_pieces(x, [value], [start])


def _swap_packed(
    config: LlamaConfig, kernel: str, kernel_adapter: Widening, leaf: Any, blocks: Tree
) -> Any:
    """A packed leaf (`packing.joined`) with the blocks of one of its kernels written in."""
    inputs, outputs = kernel_shapes(config)[kernel]
    _, start, _ = packed_rows(config)[kernel]
    order = head_order(config, kernel)
    place = np.arange(outputs[-1]) if order is None else np.argsort(order)
    heads = outputs[-1] * np.arange(math.prod(outputs[:-1]))
    for name, block in blocks.items():
        reads, writes = kernel_adapter.spans(name)
        rows = (start + heads[:, None] + place[writes]).reshape(-1)
        value = kernel_adapter.stored(name, block)
        if isinstance(leaf, QuantizedArray):
            value = filled(_stored_as(config, kernel, value, leaf), value.shape)
        if writes.start:
            scale = state_scale(config, kernel)
            value = scaled_outputs(value, jnp.full(value.shape[-1:], scale))
        write = partial(_write_rows, reads.start or 0, rows, len(inputs))
        leaf = each_part(write, leaf, value)
    return leaf


def _write_rows(
    first: int, rows: np.ndarray, reads: int, x: jax.Array, each: int, value: jax.Array
) -> jax.Array:
    """Writes value [*inputs, *outputs] in place into a packed array x, [out, in] or [groups, inputs
    of a group, out], at `rows` and from input `first` of each head on. Each run of consecutive rows
    and inputs is one piece (see `write_pieces`). reads: Number of input axes; each: Number of
    inputs that share one entry of x.
    """
    first = group_count(first, each)
    heads, count = math.prod(value.shape[: reads - 1]), value.shape[reads - 1]
    inner = x.shape[1]
    width = (inner if x.ndim == 2 else x.shape[0] * inner) // heads
    columns = (np.arange(heads)[:, None] * width + first + np.arange(count)).reshape(-1)
    flat = value.reshape(len(columns), len(rows)).T
    pieces, starts = [], []
    for at, row, height in _runs(rows):
        for to, column, size in _runs(columns):
            piece, start = flat[at : at + height, to : to + size], (row, column)
            if x.ndim == 3:
                piece, start = piece.T.reshape(-1, inner, height), (column // inner, 0, row)  # type: ignore[assignment]
            pieces.append(piece)
            starts.append(start)
    return write_pieces(x, pieces, starts)


def _runs(places: np.ndarray) -> list[tuple[int, int, int]]:
    """(Index, first place, count) of the runs of consecutive places."""
    ends = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    return [(start, int(places[start]), end - start) for start, end in pairwise(ends)]
