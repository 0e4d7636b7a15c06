"""Products with kernels and their gradients. The plain operations: `plain_product` for
`packed_linear`, `jnp.tensordot` for `project`, `jnp.matmul` for `matmul`.

Einsum legend: B batch, T positions, n tokens, i and j a kernel's axes, h halves of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


SMALL = 2**21  # bytes of a kernel that XLA's CPU compiler leaves to one core, for one row


def packed_linear(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x [B, T, i] against the rows of a packed kernel [j, i], in the fastest form for the device ->
    [B, T, j] in `dtype` (None for that of the operands), equal to `plain_product`.
    """
    # On a CPU from the right: for several rows two thirds of the time that x kernel^T takes; one
    # row takes a SMALL kernel in halves, for two cores.
    on_cpu = product_from_the_right
    if x.dtype == jnp.bfloat16:
        on_cpu = bfloat16_product
    elif x.shape[:2] == (1, 1) and kernel.nbytes < SMALL and len(kernel) % 2 == 0:
        on_cpu = product_in_halves
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(on_cpu, dtype=dtype),
        tpu=partial(product_of_eight_rows, dtype=dtype),
        default=partial(plain_product, dtype=dtype),
    )


def plain_product(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """`packed_linear` as x kernel^T, for the device's library to arrange."""
    return jnp.einsum("BTi,ji->BTj", x, kernel, preferred_element_type=dtype)


def column_product(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x [B, T, i] against the columns of a kernel [i, j] -> [B, T, j] in `dtype` (None: of the
    operands).
    """
    return jnp.einsum("BTi,ij->BTj", x, kernel, preferred_element_type=dtype)


def product_from_the_right(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """`packed_linear` as (kernel x^T)^T."""
    return jnp.einsum("ji,BTi->jBT", kernel, x, preferred_element_type=dtype).transpose(1, 2, 0)


def product_in_halves(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """`packed_linear` from the right, of the upper and the lower half of the kernel as a batch of
    two; j even.
    """
    halves, twice = kernel.reshape(2, -1, kernel.shape[1]), jnp.broadcast_to(x, (2, *x.shape))
    y = jnp.einsum("hji,hBTi->hjBT", halves, twice, preferred_element_type=dtype)
    return y.reshape(-1, *x.shape[:2]).transpose(1, 2, 0)


def product_of_eight_rows(
    x: Array,
    kernel: Array,
    dtype: DTypeLike | None = None,
    product: Callable[..., Array] = plain_product,
) -> Array:
    """`product` of x with rows of zeros up to eight."""
    # XLA's TPU compiler multiplies fewer rows on the vector unit, at four times the time that
    # reading the kernel takes by its own estimate.
    rows = x.shape[0] * x.shape[1]
    if rows >= 8:
        return product(x, kernel, dtype)
    flat = jnp.pad(x.reshape(1, rows, -1), ((0, 0), (0, 8 - rows), (0, 0)))
    return product(flat, kernel, dtype)[0, :rows].reshape(*x.shape[:2], -1)


def bfloat16_product(
    x: Array,
    kernel: Array,
    dtype: DTypeLike | None = None,
    product: Callable[..., Array] = plain_product,
) -> Array:
    """`product` of bfloat16 arrays, summed in float32."""
    # XLA's CPU compiler reads bfloat16 as it lies only for two rows or more and float32 results;
    # else it converts whole kernels first, so one row gets a second, of zeros. The barrier keeps
    # transposed copies of kernels out of a loop of tokens.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    rows = jnp.pad(x, ((0, 1), (0, 0), (0, 0))) if x.shape[:2] == (1, 1) else x
    return product(rows, kernel, jnp.float32)[: len(x)].astype(dtype or x.dtype)


def project(x: Array, block: Array, axes: int = 1) -> Array:
    """The last `axes` axes of x [B, T, ...] against the first of an adapter block of any dtype ->
    [B, T, *the block's other axes] in x's dtype.
    """
    out = block.shape[axes:]
    flat = matmul(x.reshape(*x.shape[:-axes], -1), block.reshape(math.prod(block.shape[:axes]), -1))
    return flat.reshape(*x.shape[:-axes], *out)


@jax.custom_vjp
def beside(x: Array) -> Array:
    """x, for the adapters' products of several kernels that read it."""
    # Gradients of x are summed in the order of its uses. Those of the base's products are partial
    # sums over tensor-parallel devices: XLA adds adjacent ones before one all-reduce, as
    # Megatron-LM does (arXiv 1909.08053). An adapter gradient in between would split the
    # all-reduce.
    return x


beside.defvjp(lambda x: (x, None), lambda _, dx: (dx,))


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """x [..., i] @ w [i, j] in x's dtype. The gradient of w has w's dtype: for a float32 w and
    bfloat16 x it is summed over rows, and over devices, in float32.
    """
    # The gradient's narrow operand is on the left: XLA's CPU compiler transposes that one, and with
    # the wide one there a LoRA step of SmolLM2-135M spent a third of its time so.
    return x @ w.astype(x.dtype)


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w.astype(x.dtype), (x, w)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, d_rows = x.reshape(-1, w.shape[0]), dy.reshape(-1, w.shape[1])
    product: Any = partial(jnp.einsum, preferred_element_type=w.dtype)
    dw = (
        product("ni,nj->ij", rows, d_rows)
        if w.shape[0] <= w.shape[1]
        else product("nj,ni->ji", d_rows, rows).T
    )
    return dy @ w.T.astype(dy.dtype), dw


matmul.defvjp(_matmul_forward, _matmul_backward)
