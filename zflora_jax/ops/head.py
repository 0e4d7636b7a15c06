"""The output head. The plain operation is `plain_logits`.

Einsum legend: B batch, T positions, d residual width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from zflora_jax.ops.linear import (
    bfloat16_product,
    column_product,
    packed_linear,
    plain_product,
    product_of_eight_rows,
)

Array = jax.Array


def plain_logits(x: Array, kernel: Array, tied: bool) -> Array:
    """`head_logits` as one product, for the compiler to differentiate and arrange."""
    return (plain_product if tied else column_product)(x, kernel, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def head_logits(x: Array, kernel: Array, tied: bool) -> Array:
    """Logits [B, T, V] of hidden states x [B, T, d], summed in float32, equal to `plain_logits`.

    Gradients are taken in the dtype of the operands: float32 cotangents times a bfloat16 kernel
    would run at float32 speed. kernel: an embedding table [V, d] if tied, else [d, V]; of x's
    dtype.
    """
    if x.shape[1] > 1:
        return plain_logits(x, kernel, tied)
    # One token a row, as in decode: `packed_linear` gives a tied head's logits as `greedy` reads
    # them; a training step takes 15% longer with it.
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
