"""Products with kernels, their gradients, and moves of numbers in arrays, in the form that XLA
compiles best.

Einsum legend: B batch, T positions, d residual width, V vocabulary, n tokens, i and j a block's or
kernel's axes, h halves of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array
F = TypeVar("F", bound=Callable[..., Any])


def at_precision(name: str) -> AbstractContextManager[Any]:
    """Where float32 products are traced at the matmul precision `name`; at "default" as jax is
    set.
    """
    return nullcontext() if name == "default" else jax.default_matmul_precision(name)


def at_config_precision(function: F) -> F:
    """`function(config, ...)` with its float32 products at config.execution.matmul_precision."""

    @wraps(function)
    def traced(config: Any, *args: Any, **kwargs: Any) -> Any:
        with at_precision(config.execution.matmul_precision):
            return function(config, *args, **kwargs)

    return cast(F, traced)


def whole_vectors(inputs: int) -> int:
    """How many inputs a packed kernel of `inputs` has: a multiple of 8, the float32 of a 256-bit
    vector. XLA's CPU compiler goes through the rest number by number: zflora-minimal of rank 12
    took 1.08 of the base's time with 588 inputs, 1.01 with 592 (SmolLM2-135M, batch 1, one run).
    """
    return -(-inputs // 8) * 8


SMALL = 2**21  # bytes of a kernel that XLA's CPU compiler leaves to one core, for one row


def packed_linear(x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    """x [B, T, i] against the rows of a kernel [j, i] -> [B, T, j] in `dtype` (None: of the
    operands).

    On a CPU multiplied from the right: for several rows XLA's compiler does that in two thirds of
    the time that x kernel^T takes. One row takes a SMALL kernel as two halves, for two cores
    (results/decode_variants.md: o). bfloat16 has a way of its own.
    """
    halved = x.shape[:2] == (1, 1) and kernel.nbytes < SMALL and len(kernel) % 2 == 0
    on_cpu = (
        bfloat16_product
        if x.dtype == jnp.bfloat16
        else product_in_halves
        if halved
        else product_from_the_right
    )
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(on_cpu, dtype=dtype), default=partial(plain_product, dtype=dtype)
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


def bfloat16_product(
    x: Array,
    kernel: Array,
    dtype: DTypeLike | None = None,
    product: Callable[..., Array] = plain_product,
) -> Array:
    """`packed_linear` of bfloat16 numbers (or another product), added up in float32.

    XLA's CPU compiler has products that read bfloat16 as it lies only for two rows or more and
    results in float32; for others it converts whole kernels first, so one row gets a second, of
    zeros. The barrier keeps a loop of tokens from being given kernels that were transposed, into
    copies, ahead of it (results/decode_variants.md).
    """
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    rows = jnp.pad(x, ((0, 1), (0, 0), (0, 0))) if x.shape[:2] == (1, 1) else x
    return product(rows, kernel, jnp.float32)[: len(x)].astype(dtype or x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def copy_bits(
    placed: Callable[..., Array], arrays: tuple[Array, ...], at: tuple[Array, ...] = ()
) -> Array:
    """placed(*arrays, *at) for a `placed` that only picks or places numbers of `arrays`, all of one
    dtype, or zeros, at integer positions `at`.

    bfloat16 goes by its bits on a CPU: XLA's compiler would convert the whole of `arrays` to
    float32 for it, and back. The bits are unsigned, so that what `jnp.take` gives for a position
    that does not exist, the largest integer, is the bits of a NaN.
    """
    if arrays[0].dtype != jnp.bfloat16:
        return placed(*arrays, *at)

    def by_bits(*given: Array) -> Array:
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in given[: len(arrays)])
        return jax.lax.bitcast_convert_type(placed(*bits, *given[len(arrays) :]), jnp.bfloat16)

    return jax.lax.platform_dependent(*arrays, *at, cpu=by_bits, default=placed)


@copy_bits.defjvp
def _move_jvp(
    placed: Callable[..., Array], primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    arrays, at = primals
    return copy_bits(placed, arrays, at), placed(*tangents[0], *at)


def project(x: Array, block: Array, axes: int = 1) -> Array:
    """The last `axes` axes of x [B, T, ...] against the first of an adapter block -> [B, T, *the
    block's other axes].
    """
    out = block.shape[axes:]
    flat = matmul(x.reshape(*x.shape[:-axes], -1), block.reshape(math.prod(block.shape[:axes]), -1))
    return flat.reshape(*x.shape[:-axes], *out)


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
    """x [..., i] @ w [i, j], with a gradient of w whose compiled form transposes the narrower of
    its two operands.

    XLA's CPU compiler transposes the left operand of a product over rows, and fuses what makes that
    operand into the transposition: with the wide gradient of an MLP or attention there, a LoRA step
    of SmolLM2-135M spent a third of its time in such loops.
    """
    return x @ w


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    rows, d_rows = x.reshape(-1, w.shape[0]), dy.reshape(-1, w.shape[1])
    dw = (
        jnp.einsum("ni,nj->ij", rows, d_rows)
        if w.shape[0] <= w.shape[1]
        else jnp.einsum("nj,ni->ji", d_rows, rows).T
    )
    return dy @ w.T, dw


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def head_logits(x: Array, kernel: Array, tied: bool) -> Array:
    """Logits of hidden states, added up and given in float32, with either head.

    Gradients are taken in the dtype of the operands: float32 cotangents times a bfloat16 kernel
    would run at float32 speed. One token a row, as in decode, takes `packed_linear` where the head
    is tied, whose results for float32 operands `greedy` reads as they lie; whole sequences take
    longer so (training of SmolLM2-135M on a CPU by 15%).

    Args:
      x: [B, T, d]. kernel: an embedding table [V, d] if tied, else [d, V]; of x's dtype.

    Returns:
      [B, T, V] float32.
    """
    one = x.shape[1] == 1
    if tied:
        return (
            packed_linear(x, kernel, jnp.float32) if one else plain_product(x, kernel, jnp.float32)
        )
    if one and x.dtype == jnp.bfloat16:
        on_cpu = partial(bfloat16_product, dtype=jnp.float32, product=column_product)
        default = partial(column_product, dtype=jnp.float32)
        return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=default)
    return column_product(x, kernel, jnp.float32)


def _head_logits_forward(x: Array, kernel: Array, tied: bool) -> tuple[Array, tuple[Array, Array]]:
    return head_logits(x, kernel, tied), (x, kernel)


def _head_logits_backward(
    tied: bool, saved: tuple[Array, Array], d_logits: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    d_logits = d_logits.astype(x.dtype)
    d_kernel = jnp.einsum("BTd,BTV->dV", x, d_logits)
    into_x = "BTV,Vd->BTd" if tied else "BTV,dV->BTd"
    return jnp.einsum(into_x, d_logits, kernel), d_kernel.T if tied else d_kernel


head_logits.defvjp(_head_logits_forward, _head_logits_backward)
