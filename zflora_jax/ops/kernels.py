"""What a layer does with a frozen kernel or table, whether it is float or quantised."""

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


def frozen_product(x: Array, kernel: Any, axes: int) -> Array:
    """The last `axes` axes of x [B, T, ...] against the first of a kernel, which gets no gradient
    if it is quantised.
    """
    if isinstance(kernel, QuantizedArray):
        return quantized_tensordot(x, kernel)
    return jnp.tensordot(x, kernel.astype(x.dtype), axes)  # no gradient to arrange


def packed_product(x: Array, kernel: Any) -> Array:
    """x [B, T, i] against a kernel packed for decode -> [B, T, j]."""
    if isinstance(kernel, QuantizedArray):
        return quantized_linear(x, kernel)
    return packed_linear(x, kernel.astype(x.dtype))


def output_logits(x: Array, kernel: Any, tied: bool) -> Array:
    """Logits [B, T, V] float32 of x [B, T, d]; kernel and tied as `ops.head.head_logits` has
    them.
    """
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
