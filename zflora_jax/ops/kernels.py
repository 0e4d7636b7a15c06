"""The products of a frozen kernel or table: float, quantised, or packed for decode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from zflora_jax.ops.copies import take_rows
from zflora_jax.ops.head import head_logits
from zflora_jax.ops.linear import packed_linear
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.ops.quantized_linear import quantized_linear, quantized_rows, quantized_tensordot

Array = jax.Array


def kernel_product(x: Array, kernel: Any, axes: int, packed: bool = False) -> Array:
    """x W of a frozen kernel.

    Args:
      x: Inputs [B, T, *inputs].
      kernel: W [*inputs, *outputs], or packed for decode [outputs, inputs], both flattened; float
        or quantised. A quantised one gets no gradient.
      axes: Number of input axes.
      packed: Whether the kernel is packed.

    Returns:
      [B, T, *outputs] in x's dtype.
    """
    quantised = isinstance(kernel, QuantizedArray)
    if packed:
        flat = x.reshape(*x.shape[:-axes], -1)
        if quantised:
            return quantized_linear(flat, kernel)
        return packed_linear(flat, kernel.astype(x.dtype))
    if quantised:
        return quantized_tensordot(x, kernel)
    return jnp.tensordot(x, kernel.astype(x.dtype), axes)  # no gradient to arrange


def output_logits(x: Array, kernel: Any, tied: bool) -> Array:
    """Logits [B, T, V] float32 of x [B, T, d]; kernel and tied as for `ops.head.head_logits`."""
    if isinstance(kernel, QuantizedArray):
        return quantized_linear(x, kernel, jnp.float32)
    return head_logits(x, kernel.astype(x.dtype), tied)


def table_rows(table: Any, rows: Array, width: int, dtype: DTypeLike) -> Array:
    """Rows of a table [V, d] in `dtype`, zeros from d up to `width`; NaN for a row that does not
    exist.
    """
    if isinstance(table, QuantizedArray):
        return quantized_rows(table, rows, width, dtype)
    return take_rows(table, rows, width).astype(dtype)
