"""FFA's fixed tiling."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from zflora_jax.ops.linear import Array


def tile(h: Array, out: int) -> Array:
    """h R for FFA's fixed tiling R [r, out], R[i, j] = sqrt(r/out) where j mod r = i: h [..., r] ->
    [..., out]. Orthonormal rows when r divides out.
    """
    rank = h.shape[-1]
    # A gather moves out numbers where the product with R multiplies r x out, most of them by zero.
    return jnp.take(h, np.arange(out) % rank, axis=-1) * math.sqrt(rank / out)


def plain_tile(h: Array, out: int) -> Array:
    """`tile` as the product h R."""
    rank = h.shape[-1]
    tiling = np.arange(out) % rank == np.arange(rank)[:, None]
    return h @ jnp.asarray(tiling * math.sqrt(rank / out), h.dtype)
