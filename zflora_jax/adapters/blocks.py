"""Where an adapter's blocks lie in a fused kernel, and what is stored there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, kernel_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import Tree
from zflora_jax.ops.copies import write_divided
from zflora_jax.ops.quantized import QuantizedArray, dequantize
from zflora_jax.ops.quantized_blocks import cut, paste, quantize_block

Array = jax.Array


# What is written into a kernel, and the indices where it begins.
Piece = tuple[Array, tuple[int, ...]]


def map_kernels(fn: Callable[[str, str, Any], Any], params: Tree) -> Tree:
    """Map over the leaves of a parameter tree.

    Args:
      fn: (kernel, leaf name, leaf) -> new leaf; kernel is "" for norms, biases, embedding and
        head.
      params: the tree.
    """

    def visit(name: str, leaf: Any) -> Any:
        module, parameter = name.split("/")[-2:]
        return fn(module if module in KERNELS and parameter == "kernel" else "", name, leaf)

    return trees.map_with_names(visit, params)


def in_axis(config: LlamaConfig, kernel: str) -> int:
    """The axis of a kernel, stacked or not, that is its input stream; the output stream is the
    last.
    """
    return -len(kernel_shapes(config)[kernel][1]) - 1


def pad_axis(leaf: Array, axis: int, width: int, value: float) -> Array:
    """Pad an axis of a leaf at its end to `width` with `value`."""
    pads = [(0, 0)] * leaf.ndim
    pads[axis] = (0, width)
    return jnp.pad(leaf, pads, constant_values=value)


def with_block(
    wide: Array, value: Array, block: str, axis: int, base_in: int, base_out: int
) -> Array:
    """Write a block into a wide kernel, which stays divided over devices as it is.

    Args:
      wide: the fused kernel.
      value: the block.
      block: "forward", "backward" or "cross".
      axis: of the kernel's input stream, see `in_axis`.
      base_in: width of the base's input stream.
      base_out: width of the base's output stream.
    """
    region = block_region(block, axis, base_in, base_out)
    return write_divided(wide, value, {axis: region[1], -1: region[-1]})


def block_region(block: str, axis: int, base_in: int, base_out: int) -> tuple[Any, ...]:
    """The index of a block in a wide kernel: forward is top right, backward bottom left, cross
    bottom right.

    Args:
      block: "forward", "backward" or "cross".
      axis: of the kernel's input stream, see `in_axis`.
      base_in: width of the base's input stream.
      base_out: width of the base's output stream.
    """
    rows = slice(0, base_in) if block == "forward" else slice(base_in, None)
    columns = slice(0, base_out) if block == "backward" else slice(base_out, None)
    return (..., rows, *[slice(None)] * (-axis - 2), columns)


def with_codes(
    wide: QuantizedArray, value: Array, block: str, base_out: int, write: Callable[..., Array]
) -> QuantizedArray:
    """Quantise a block as a wide kernel is, and write it there.

    Args:
      wide: the fused kernel.
      value: the block, float32.
      block: "forward", "backward" or "cross".
      base_out: width of the base's output stream.
      write: as in `ops.quantized_blocks.paste`.
    """
    outputs = slice(0, base_out) if block == "backward" else slice(base_out, None)
    codes = quantize_block(value, wide)
    return paste(wide, codes, write, extra=block != "forward", outputs=outputs)


def block_values(wide: Any, block: str, axis: int, base: tuple[int, ...]) -> Array:
    """The numbers of a block of a wide kernel, float32.

    Args:
      wide: the fused kernel, float or quantised.
      block: "forward", "backward" or "cross".
      axis: of the kernel's input stream, see `in_axis`.
      base: shape of the base's kernel.
    """
    region = block_region(block, axis, base[axis], base[-1])
    if isinstance(wide, QuantizedArray):
        return dequantize(cut(wide, extra=block != "forward", outputs=region[-1]))
    found: Array = wide[region].astype(jnp.float32)
    return found


# What packed kernels multiply the residual state by. Its square, 2^-48, is below the rounding of
# float32, so RMSNorm may sum over all channels, as a base's does: compilers make one kernel of that
# and two of a sum over a part. A power of two changes no product.
STATE_SCALE = 2.0**-24


def stored_values(
    kernel: str,
    name: str,
    block: Array,
    adapter: AdapterConfig,
    packed: bool = False,
    qk_norm: bool = False,
) -> Array:
    """The values of a block as a fused kernel stores them: backward times the scale.

    Args:
      kernel: that the block belongs to.
      name: of the block.
      block: float32.
      adapter: of the block.
      packed: whether the kernel is packed for decode, see `STATE_SCALE`.
      qk_norm: whether the heads of q and k are normed; their adapter dims are then scaled too.
    """
    values = block * adapter.scale if name == "backward" else block
    return values * packed_scale(kernel, name, qk_norm) if packed else values


def packed_scale(kernel: str, name: str, qk_norm: bool) -> float:
    """What packed kernels store a block times: `STATE_SCALE` where it writes what a norm follows.

    Args:
      kernel: that the block belongs to.
      name: of the block.
      qk_norm: whether the heads of q and k are normed.
    """
    normed = KERNELS[kernel][1] == "residual" or (qk_norm and kernel in ("q", "k"))
    return STATE_SCALE if normed and name != "backward" else 1.0


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
