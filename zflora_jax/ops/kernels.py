"""Products of frozen kernels and tables: float, quantised, or packed for decode. Products of codes
equal those of the floats of `ops.quantized.dequantize`.

Einsum legend: B batch, T positions, n rows (tokens), i inputs, j outputs, G groups of inputs, g
inputs of a group, p base's or adapter's inputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from zflora_jax.ops.copies import take_rows
from zflora_jax.ops.linear import column_product, head_logits, packed_linear, plain_product
from zflora_jax.ops.quantized import QuantizedArray, base_inputs, code_values, dequantize

Array = jax.Array


def kernel_product(x: Array, kernel: Any, axes: int, packed: bool = False) -> Array:
    """x [B, T, *inputs] W, in x's dtype; codes get no gradient. W is [*inputs, *outputs], or,
    packed for decode, [outputs, inputs], both flattened. axes: Number of input axes.
    """
    if packed:
        x = x.reshape(*x.shape[:-axes], -1)
    if isinstance(kernel, QuantizedArray):
        return quantized_linear(x, kernel) if packed else quantized_tensordot(x, kernel)
    kernel = kernel.astype(x.dtype)
    return packed_linear(x, kernel) if packed else jnp.tensordot(x, kernel, axes)


def output_logits(x: Array, kernel: Any, tied: bool) -> Array:
    """Logits [B, T, V] float32 of x [B, T, d]; kernel and tied: see `ops.linear.head_logits`."""
    if isinstance(kernel, QuantizedArray):
        return quantized_linear(x, kernel, jnp.float32)
    return head_logits(x, kernel.astype(x.dtype), tied)


def table_rows(table: Any, rows: Array, width: int, dtype: DTypeLike) -> Array:
    """Rows of a table [V, d] in `dtype`, zeros from d up to `width`; NaN for a missing row."""
    if not isinstance(table, QuantizedArray):
        return take_rows(table, rows, width).astype(dtype)
    x = dequantize(jax.tree.map(lambda part: jnp.take(part, rows, axis=0, mode="clip"), table))
    x = jnp.pad(x, [(0, 0)] * rows.ndim + [(0, width - x.shape[-1])])
    exist = (rows >= 0) & (rows < len(table.codes))
    return jnp.where(exist[..., None], x, jnp.nan).astype(dtype)


FEW_ROWS = 8  # tokens up to which a product reads codes; for more the kernel is dequantised first


@jax.custom_vjp
def quantized_tensordot(x: Array, w: QuantizedArray) -> Array:
    """x [B, T, *inputs] against a kernel [*inputs, *outputs], which gets no gradient."""
    # The backward pass dequantises again: otherwise it would keep the floats of all layers.
    return jnp.tensordot(x, dequantize(w, x.dtype), w.reads)


def _tensordot_backward(w: QuantizedArray, dy: Array) -> tuple[Array, None]:
    kernel = dequantize(w, dy.dtype)
    outputs = tuple(range(w.reads, w.ndim))
    dx = jnp.tensordot(dy, kernel, (tuple(range(dy.ndim - w.writes, dy.ndim)), outputs))
    return dx, None


quantized_tensordot.defvjp(lambda x, w: (quantized_tensordot(x, w), w), _tensordot_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_linear(x: Array, w: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """`plain_quantized_linear` in the fastest form for the device: x [B, T, i] against a packed
    kernel or a head [i, j] -> [B, T, j] in `dtype` (None: x's). On a CPU, int8 in one group rounds
    x to 15 bits.
    """
    dtype = x.dtype if dtype is None else dtype
    plain = partial(plain_quantized_linear, dtype=dtype)
    in_turn = partial(product_in_turn, dtype=dtype)
    if x.shape[0] * x.shape[1] > FEW_ROWS:
        return jax.lax.platform_dependent(x, w, cpu=in_turn, default=plain)

    def flat(product: Any, x: Array, w: QuantizedArray) -> Array:
        rows = _filled(x, w).reshape(-1, w.inputs)
        return product(rows, w).reshape(*x.shape[:2], -1).astype(dtype)

    by_rows = not w.writes
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=partial(flat, int8_product) if by_rows and w.one_scale else in_turn,
        tpu=partial(flat, eight_rows_product) if w.one_scale or w.reads == 2 else plain,
        default=partial(flat, multiply_and_sum) if by_rows else plain,
    )


def _filled(x: Array, w: QuantizedArray) -> Array:
    """x [B, T, i] with zeros behind the dims of each head, up to whole groups."""
    if x.shape[-1] == w.inputs:
        return x
    heads = x.reshape(*x.shape[:-1], w.inputs // w.inner, -1)
    pads = ((0, 0), (0, 0), (0, 0), (0, w.inner - heads.shape[-1]))
    return jnp.pad(heads, pads).reshape(*x.shape[:-1], w.inputs)


def _linear_backward(
    dtype: DTypeLike | None, saved: tuple[QuantizedArray, Array], dy: Array
) -> tuple[Array, None]:
    w, like = saved
    x = jax.ShapeDtypeStruct((*dy.shape[:-1], len(like)), like.dtype)
    plain = partial(plain_quantized_linear, w=w, dtype=dtype)
    return *jax.linear_transpose(plain, x)(dy), None


quantized_linear.defvjp(
    lambda x, w, dtype: (quantized_linear(x, w, dtype), (w, jnp.zeros(x.shape[-1], x.dtype))),
    _linear_backward,
)


def plain_quantized_linear(x: Array, w: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """`quantized_linear` with the dequantised kernel."""
    x, kernel = _filled(x, w), dequantize(w, x.dtype)
    if w.reads == 2:
        grouped = x.reshape(*x.shape[:-1], *kernel.shape[:2])
        return jnp.einsum("BTGg,Ggj->BTj", grouped, kernel, preferred_element_type=dtype)
    return (column_product if w.writes else plain_product)(x, kernel, dtype)


def product_in_turn(x: Array, w: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """`plain_quantized_linear`, for which XLA dequantises the kernel after it has x."""
    # XLA's CPU compiler would dequantise the kernels of all layers ahead of the first product, and
    # it removes barriers before it plans that. No value is above infinity.
    never = x[(0,) * x.ndim] > jnp.asarray(jnp.inf, x.dtype)
    codes = jnp.where(never, jnp.zeros_like(w.codes), w.codes)
    return plain_quantized_linear(x, replace(w, codes=codes), dtype)


def _parts(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] as [n, p, i]: the base's inputs then zeros, and zeros then the adapter's inputs."""
    if w.base == (w.inner or x.shape[-1]):
        return x[:, None]
    is_base = base_inputs(w)[None]
    zero = jnp.zeros_like(x)
    return jnp.stack([jnp.where(is_base, x, zero), jnp.where(is_base, zero, x)], axis=1)


def int8_product(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] against int8 codes [j, i] with one scale per output for the base's inputs and one
    for an adapter's -> [n, j] float32. x is rounded to 15 bits.
    """
    # XLA's CPU compiler multiplies int8 with int8 in place only for two rows or more, and converts
    # whole kernels to multiply with float. So x becomes two rows of 8 bits; the second is the
    # rounding error of the first.
    x, scales = x.astype(jnp.float32), w.scales.astype(jnp.float32).T[None]
    base = _parts(x, w)[:, 0]
    scale = jnp.maximum(jnp.max(jnp.abs(base), -1, keepdims=True), 1e-30) / 127
    high = jnp.round(base / scale)
    low = jnp.round((base / scale - high) * 254)
    rows = jax.lax.optimization_barrier(jnp.concatenate([high, low]).astype(jnp.int8))
    y = jnp.einsum("ni,ji->nj", rows, w.codes, preferred_element_type=jnp.int32)
    y = y.astype(jnp.float32).reshape(2, len(x), -1)
    y = (y[0] + y[1] / 254) * scale * scales[:, 0]
    width = w.inner or x.shape[-1]
    if w.base == width:
        return y
    # The adapter's few inputs in float32: two more rows would take as long as the base's.
    x, codes = (
        part.reshape(len(part), -1, width)[..., w.base :].reshape(len(part), -1)
        for part in (x, w.codes)
    )
    return y + jnp.einsum("ni,ji->nj", x, codes.astype(jnp.float32)) * scales[:, 1]


def multiply_and_sum(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] against codes [j, i] -> [n, j] float32, one sum over the inputs of each output."""
    # XLA's GPU compiler makes one kernel of this, which reads the codes; for a product it writes
    # the dequantised kernel to memory first.
    x = x.astype(jnp.float32)
    if not w.group:
        return jnp.sum(x[:, None] * dequantize(w)[None], axis=-1)
    groups = x.reshape(len(x), 1, -1, w.group)
    values = code_values(w.kind, w.codes).reshape(len(w.codes), -1, w.group)
    values = values * w.scales.astype(jnp.float32)[..., None]
    if w.mins is not None:
        values = values + w.mins.astype(jnp.float32)[..., None]
    return jnp.sum(groups * values[None], axis=(-2, -1))


def eight_rows_product(x: Array, w: QuantizedArray) -> Array:
    """x [n, i] against codes, as a product of at least eight rows -> [n, j] float32."""
    # XLA's TPU compiler multiplies fewer rows on the vector unit; it reads codes [G, g, j] with
    # scales [G, 1, j] inside the product.
    parts, f32 = _parts(x, w) if not w.group else x[:, None], jnp.float32
    rows = parts.reshape(-1, x.shape[-1])
    rows = jnp.pad(rows, ((0, max(0, 8 - len(rows))), (0, 0)))
    if w.group:
        return plain_quantized_linear(rows[:, None], w, f32)[: len(x), 0]
    into = "ni,ij->nj" if w.writes else "ni,ji->nj"
    y = jnp.einsum(into, rows, w.codes.astype(x.dtype), preferred_element_type=f32)
    y = y[: parts.shape[0] * parts.shape[1]].reshape(*parts.shape[:2], -1)
    scales = w.scales.astype(f32) if w.writes else w.scales.astype(f32).T
    return jnp.sum(y * scales[None], axis=1)
