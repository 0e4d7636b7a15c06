"""Products with float kernels and their gradients, each equal to a plain one.

Einsum legend: B batch, T positions, n tokens, i and j a kernel's axes, h halves of a kernel, r
rank, d residual width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array


SMALL = 2**21  # bytes of a kernel that XLA's CPU compiler leaves to one core, for one row


def packed_linear(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x [B, T, i] against the rows of a packed kernel [j, i], in the fastest form for the device ->
    [B, T, j] in `dtype` (None: the operands'), equal to `plain_product`.
    """
    # On a CPU from the right, which takes two thirds of the time of x kernel^T for several rows.
    # For one row a SMALL kernel is halved, for two cores.
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
    """x [B, T, i] against the columns of a kernel [i, j] -> [B, T, j]."""
    return jnp.einsum("BTi,ij->BTj", x, kernel, preferred_element_type=dtype)


def product_from_the_right(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """`packed_linear` as (kernel x^T)^T."""
    return jnp.einsum("ji,BTi->jBT", kernel, x, preferred_element_type=dtype).transpose(1, 2, 0)


def product_in_halves(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """`product_from_the_right` with the halves of the kernel as a batch of two; j is even."""
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
    # XLA's CPU compiler reads bfloat16 in place only for two rows or more and float32 results, and
    # otherwise converts whole kernels first. So one row gets a second, of zeros. The barrier keeps
    # transposed copies of kernels out of a loop of tokens.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    rows = jnp.pad(x, ((0, 1), (0, 0), (0, 0))) if x.shape[:2] == (1, 1) else x
    return product(rows, kernel, jnp.float32)[: len(x)].astype(dtype or x.dtype)


def project(x: Array, block: Array, axes: int = 1) -> Array:
    """Multiplies x by an adapter's block, whose gradient has the block's dtype.

    Args:
      x: Activations [B, T, ...].
      block: Block whose first axes are the last ones of x.
      axes: Number of those axes.

    Returns:
      [B, T, *the other axes of the block] in x's dtype.
    """
    out = block.shape[axes:]
    flat = matmul(x.reshape(*x.shape[:-axes], -1), block.reshape(math.prod(block.shape[:axes]), -1))
    return flat.reshape(*x.shape[:-axes], *out)


@jax.custom_vjp
def adapter_input(x: Array) -> Array:
    """Returns x, for the adapters' products of several kernels that read it."""
    # Gradients of x are summed in the order of its uses. XLA adds adjacent partial sums over
    # tensor-parallel devices before one all-reduce, as Megatron-LM does (arXiv 1909.08053). An
    # adapter gradient in between would split it.
    return x


adapter_input.defvjp(lambda x: (x, None), lambda _, dx: (dx,))


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """x [..., i] @ w [i, j] in x's dtype. The gradient of w has w's dtype: a float32 w next to a
    bfloat16 x gets sums over rows and devices in float32.
    """
    return x @ w.astype(x.dtype)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, d_rows = x.reshape(-1, w.shape[0]), dy.reshape(-1, w.shape[1])
    # The narrow operand is on the left, which XLA's CPU compiler transposes: transposing the wide
    # one took a third of a LoRA step of SmolLM2-135M.
    product: Any = partial(jnp.einsum, preferred_element_type=w.dtype)
    wide = w.shape[0] <= w.shape[1]
    dw = product("ni,nj->ij", rows, d_rows) if wide else product("nj,ni->ji", d_rows, rows).T
    return dy @ w.T.astype(dy.dtype), dw


matmul.defvjp(lambda x, w: (x @ w.astype(x.dtype), (x, w)), _matmul_backward)


def plain_logits(x: Array, kernel: Array, tied: bool) -> Array:
    """`head_logits` as one product, for the compiler to differentiate and arrange."""
    return (plain_product if tied else column_product)(x, kernel, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def head_logits(x: Array, kernel: Array, tied: bool) -> Array:
    """Logits [B, T, V] float32 of hidden states x [B, T, d], equal to `plain_logits`. kernel: an
    embedding table [V, d] if tied, else [d, V]; of x's dtype.
    """
    if x.shape[1] > 1:
        return plain_logits(x, kernel, tied)
    # One token a row, as in decode: `packed_linear` gives a tied head's logits in the layout that
    # `greedy` reads; a training step takes 15% longer with it.
    if tied:
        return packed_linear(x, kernel, jnp.float32)
    by_columns = {"dtype": jnp.float32, "product": column_product}
    default = partial(column_product, dtype=jnp.float32)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(bfloat16_product, **by_columns) if x.dtype == jnp.bfloat16 else default,
        tpu=partial(product_of_eight_rows, **by_columns),
        default=default,
    )


def _head_logits_backward(
    tied: bool, saved: tuple[Array, Array], d_logits: Array
) -> tuple[Array, Array]:
    # In the operands' dtype: float32 cotangents with a bfloat16 kernel would run at float32 speed.
    x, kernel = saved
    d_logits = d_logits.astype(x.dtype)
    d_kernel = jnp.einsum("BTd,BTV->dV", x, d_logits)
    into_x = "BTV,Vd->BTd" if tied else "BTV,dV->BTd"
    return jnp.einsum(into_x, d_logits, kernel), d_kernel.T if tied else d_kernel


head_logits.defvjp(
    lambda x, kernel, tied: (head_logits(x, kernel, tied), (x, kernel)), _head_logits_backward
)


def column_norms(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """DoRA's norm (arXiv 2402.09353) of each column of W [i, j] + s A [i, r] B [r, j], float32 [j],
    without that matrix.
    """
    # |w + s A b|^2 = |w|^2 + 2 s (A^T w) b + s^2 b^T (A^T A) b: products as those of r tokens.
    w, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    cross = jnp.einsum("ir,ij->rj", a, w, precision="highest")
    own = jnp.einsum("ir,is->rs", a, a, precision="highest")
    change = 2 * scale * cross + scale**2 * jnp.einsum("rs,sj->rj", own, b, precision="highest")
    square = jnp.sum(w * w, axis=0) + jnp.sum(change * b, axis=0)
    return jnp.sqrt(jnp.maximum(square, 0))  # cancellation may end below 0


def tile(h: Array, out: int) -> Array:
    """h [..., r] R -> [..., out] with FFA's fixed tiling R [r, out]: R[i, j] = sqrt(r/out) if j mod
    r = i, else 0. Its rows are orthonormal when r divides out.
    """
    rank = h.shape[-1]
    return jnp.take(h, np.arange(out) % rank, axis=-1) * math.sqrt(rank / out)
