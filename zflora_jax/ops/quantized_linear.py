"""Products with quantised kernels and tables. The plain operation of each is the product with
`ops.quantized.dequantize`.

Einsum legend: B batch, T positions, n rows (tokens), i inputs, j outputs, G groups of inputs, g
inputs of a group, p base's or adapter's inputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from zflora_jax.ops.linear import column_product, plain_product
from zflora_jax.ops.quantized import (
    KINDS,
    QuantizedArray,
    base_inputs,
    code_values,
    dequantize,
    unpair,
)

Array = jax.Array

# Tokens up to which a product reads codes; for more a kernel is dequantised first. On CPUs, whose
# sums over groups are slow, more than one is enough.
FEW_ROWS, FEW_ON_CPU = 8, 1


@jax.custom_vjp
def quantized_tensordot(x: Array, w: QuantizedArray) -> Array:
    """x [B, T, *inputs] against a kernel [*inputs, *outputs] -> [B, T, *outputs].

    The kernel gets no gradient. The backward pass dequantises it anew: kept from the forward pass,
    the numbers of all layers would be in memory together.
    """
    return jnp.tensordot(x, dequantize(w, x.dtype), w.reads)


def _tensordot_forward(x: Array, w: QuantizedArray) -> tuple[Array, QuantizedArray]:
    return quantized_tensordot(x, w), w


def _tensordot_backward(w: QuantizedArray, dy: Array) -> tuple[Array, Any]:
    kernel = dequantize(w, dy.dtype)
    outputs = tuple(range(w.reads, w.ndim))
    dx = jnp.tensordot(dy, kernel, (tuple(range(dy.ndim - w.writes, dy.ndim)), outputs))
    return dx, jax.tree.map(_no_gradient, w)


def _no_gradient(part: Array) -> Any:
    if jnp.issubdtype(part.dtype, jnp.floating):
        return jnp.zeros_like(part)
    return np.zeros(part.shape, jax.dtypes.float0)


quantized_tensordot.defvjp(_tensordot_forward, _tensordot_backward)


def quantized_rows(table: QuantizedArray, rows: Array, width: int, dtype: DTypeLike) -> Array:
    """Rows of a table [V, d] in `dtype`, zeros from d up to `width`; NaN for a row that does not
    exist.
    """
    parts = jax.tree.map(lambda part: jnp.take(part, rows, axis=0, mode="clip"), table)
    x = dequantize(parts)
    x = jnp.pad(x, [(0, 0)] * rows.ndim + [(0, width - x.shape[-1])])
    exist = (rows >= 0) & (rows < len(table.codes))
    return jnp.where(exist[..., None], x, jnp.nan).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_linear(x: Array, w: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """x [B, T, i] against a packed kernel or a head, in the form for the device.

    Args:
      x: inputs.
      w: as `adapters.packing_quantized.joined` lays it out, or a head [i, j]; it gets no gradient.
      dtype: of the result; None: x's.

    Returns:
      [B, T, j], equal to `plain_quantized_linear`; on a CPU up to the rounding of x to 15 bits
      where the codes are int8 in one group.
    """
    dtype = x.dtype if dtype is None else dtype
    plain = partial(plain_quantized_linear, dtype=dtype)
    in_turn = partial(product_in_turn, dtype=dtype)
    count = x.shape[0] * x.shape[1]
    if count > FEW_ROWS:
        return jax.lax.platform_dependent(x, w, cpu=in_turn, default=plain)
    by_rows = not w.writes
    whole = not w.group and KINDS[w.kind].table is None and not w.paired

    def flat(product: Any, x: Array, w: QuantizedArray) -> Array:
        rows = _filled(x, w).reshape(-1, w.inputs)
        return product(rows, w).reshape(*x.shape[:2], -1).astype(dtype)

    def from_codes(x: Array, w: QuantizedArray) -> Array:
        # The barrier keeps XLA's CPU compiler from computing what codes stand for once, ahead of a
        # loop of tokens. Of an adapter's few inputs it may.
        few = partial(int8_product, beside=adapter_codes(w)) if whole else None
        cpu = few or (paired_product if w.paired else multiply_and_sum)
        return flat(cpu, *jax.lax.optimization_barrier((x, w)))

    on_cpu = by_rows and (whole or (count <= FEW_ON_CPU and KINDS[w.kind].table is None))
    tpu = eight_rows_product if whole or w.reads == 2 else None
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=from_codes if on_cpu else in_turn,
        tpu=partial(flat, tpu) if tpu else plain,
        default=partial(flat, multiply_and_sum) if by_rows else plain,
    )


def _filled(x: Array, w: QuantizedArray) -> Array:
    """x [B, T, i] with zeros behind the dims of each head, where groups have filled those up."""
    if x.shape[-1] == w.inputs:
        return x
    heads = w.inputs // w.inner
    apart = x.reshape(*x.shape[:-1], heads, -1)
    pads = ((0, 0), (0, 0), (0, 0), (0, w.inner - apart.shape[-1]))
    return jnp.pad(apart, pads).reshape(*x.shape[:-1], w.inputs)


def _linear_forward(
    x: Array, w: QuantizedArray, dtype: DTypeLike | None
) -> tuple[Array, tuple[QuantizedArray, Array]]:
    return quantized_linear(x, w, dtype), (w, jnp.zeros(x.shape[-1], x.dtype))


def _linear_backward(
    dtype: DTypeLike | None, saved: tuple[QuantizedArray, Array], dy: Array
) -> tuple[Array, Any]:
    w, like = saved
    x = jax.ShapeDtypeStruct((*dy.shape[:-1], len(like)), like.dtype)
    plain = partial(plain_quantized_linear, w=w, dtype=dtype)
    (dx,) = jax.linear_transpose(plain, x)(dy)
    return dx, jax.tree.map(_no_gradient, w)


quantized_linear.defvjp(_linear_forward, _linear_backward)


def plain_quantized_linear(x: Array, w: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """`quantized_linear` with the dequantised kernel."""
    x, kernel = _filled(x, w), dequantize(w, x.dtype)
    if w.reads == 2:
        grouped = x.reshape(*x.shape[:-1], *kernel.shape[:2])
        return jnp.einsum("BTGg,Ggj->BTj", grouped, kernel, preferred_element_type=dtype)
    return (column_product if w.writes else plain_product)(x, kernel, dtype)


def product_in_turn(x: Array, w: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """`plain_quantized_linear`, whose kernel XLA dequantises when x is there."""
    # Its CPU compiler else dequantises the kernels of all layers ahead of the first product, and
    # takes barriers away before it plans that. No number is above infinity.
    never = x[(0,) * x.ndim] > jnp.asarray(jnp.inf, x.dtype)
    codes = jnp.where(never, jnp.zeros_like(w.codes), w.codes)
    return plain_quantized_linear(x, replace(w, codes=codes), dtype)


def _parts(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] as [n, p, i]: the base's inputs and zeros, and zeros and the adapter's."""
    width = x.shape[-1]
    if w.base == (w.inner or width):
        return x[:, None]
    is_base = base_inputs(w)[None]
    zero = jnp.zeros_like(x)
    return jnp.stack([jnp.where(is_base, x, zero), jnp.where(is_base, zero, x)], axis=1)


def adapter_codes(w: QuantizedArray) -> Array | None:
    """The codes of an adapter's inputs of a packed kernel [j, i], as float32 [j, those]; None
    where there are none.
    """
    width = w.inner or w.shape[-1]
    if w.base == width:
        return None
    codes = w.codes.reshape(len(w.codes), -1, width)[..., w.base :]
    return codes.reshape(len(w.codes), -1).astype(jnp.float32)


def int8_product(x: Array, w: QuantizedArray, beside: Array | None) -> Array:
    """x [n, i] against int8 codes [j, i] with one scale for the base's inputs of an output and one
    for an adapter's -> [n, j] float32. x is rounded to 15 bits. beside: `adapter_codes`.
    """
    # XLA's CPU compiler multiplies int8 with int8 as it lies only for two rows or more, and
    # converts whole kernels to multiply with float. So x goes as two rows of 8 bits, the second of
    # which is what the first has rounded away (docs/quantised-bases.md).
    x, scales = x.astype(jnp.float32), w.scales.astype(jnp.float32).T[None]
    base = _parts(x, w)[:, 0]
    scale = jnp.maximum(jnp.max(jnp.abs(base), -1, keepdims=True), 1e-30) / 127
    high = jnp.round(base / scale)
    low = jnp.round((base / scale - high) * 254)
    rows = jax.lax.optimization_barrier(jnp.concatenate([high, low]).astype(jnp.int8))
    y = jnp.einsum("ni,ji->nj", rows, w.codes, preferred_element_type=jnp.int32)
    y = y.astype(jnp.float32).reshape(2, len(x), -1)
    y = (y[0] + y[1] / 254) * scale * scales[:, 0]
    if beside is None:
        return y
    # The adapter's few inputs in float32: two more rows would take as long as the base's.
    extra = x.reshape(len(x), -1, w.inner or x.shape[-1])[..., w.base :].reshape(len(x), -1)
    return y + jnp.einsum("ni,ji->nj", extra, beside) * scales[:, 1]


def multiply_and_sum(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] against codes [j, i] -> [n, j] float32, one sum over the inputs of each output."""
    # XLA's GPU compiler makes one kernel of it that reads the codes; as a product it writes the
    # dequantised kernel to memory first (docs/quantised-bases.md).
    x, w = x.astype(jnp.float32), unpair(w)
    if not w.group:
        return jnp.sum(x[:, None] * dequantize(w)[None], axis=-1)
    groups = x.reshape(len(x), 1, -1, w.group)
    values = code_values(w.kind, w.codes).reshape(len(w.codes), -1, w.group)
    values = values * w.scales.astype(jnp.float32)[..., None]
    if w.mins is not None:
        values = values + w.mins.astype(jnp.float32)[..., None]
    return jnp.sum(groups * values[None], axis=(-2, -1))


def paired_product(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] against codes of 4 bits in pairs [j, i/2] -> [n, j] float32."""
    # By arithmetic in float32: XLA's CPU compiler makes one kernel of it, and with operations on
    # bits writes codes to memory first (docs/quantised-bases.md).
    x = x.astype(jnp.float32).reshape(len(x), 1, -1, 2, w.group // 2)
    low, high = x[..., 0, :], x[..., 1, :]
    both = w.codes.astype(jnp.float32).reshape(len(w.codes), -1, w.group // 2)[None]
    top = jnp.floor(both * (1 / 16))
    scales = w.scales.astype(jnp.float32)[None, ..., None]
    shift = scales * float(jnp.iinfo(KINDS[w.kind].codes).min)
    if w.mins is not None:
        shift = shift + w.mins.astype(jnp.float32)[None, ..., None]
    terms = (low * both + (high - 16 * low) * top) * scales + (low + high) * shift
    return jnp.sum(terms, axis=(-2, -1))


def eight_rows_product(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] against codes, as a product of at least eight rows -> [n, j] float32."""
    # XLA's TPU compiler multiplies fewer rows on the vector unit; it reads codes [G, g, j], scales
    # on an axis of their own, inside the product (docs/quantised-bases.md).
    parts = _parts(x, w) if not w.group else x[:, None]
    rows = parts.reshape(-1, x.shape[-1])
    rows = jnp.pad(rows, ((0, max(0, 8 - len(rows))), (0, 0)))
    f32 = jnp.float32
    if w.group:
        return plain_quantized_linear(rows[:, None], w, f32)[: len(x), 0]
    into = "ni,ij->nj" if w.writes else "ni,ji->nj"
    y = jnp.einsum(into, rows, w.codes.astype(x.dtype), preferred_element_type=f32)
    y = y[: parts.shape[0] * parts.shape[1]].reshape(*parts.shape[:2], -1)
    scales = w.scales.astype(f32) if w.writes else w.scales.astype(f32).T
    return jnp.sum(y * scales[None], axis=1)
