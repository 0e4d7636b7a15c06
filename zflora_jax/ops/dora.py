"""The norms of an adapted kernel's columns, for DoRA (arXiv 2402.09353).

Letters: i and j a kernel's axes, r rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def column_norms(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """The norm of each column of W [i, j] + s A [i, r] B [r, j] without that matrix, float32 [j],
    equal to `plain_column_norms`.
    """
    # |w + s A b|^2 = |w|^2 + 2 s (A^T w) b + s^2 b^T (A^T A) b: products as those of r tokens,
    # where the matrix would be as large as the kernel, in every layer.
    w, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    cross = jnp.einsum("ir,ij->rj", a, w, precision="highest")
    own = jnp.einsum("ir,is->rs", a, a, precision="highest")
    beside = 2 * scale * cross + scale**2 * jnp.einsum("rs,sj->rj", own, b, precision="highest")
    square = jnp.sum(w * w, axis=0) + jnp.sum(beside * b, axis=0)
    return jnp.sqrt(jnp.maximum(square, 0))  # what cancels may end below 0


def plain_column_norms(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """`column_norms` by its formula."""
    w, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    return jnp.linalg.norm(w + scale * jnp.matmul(a, b, precision="highest"), axis=0)
