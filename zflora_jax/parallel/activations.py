"""How activations are divided over the mesh in use. Without a mesh they stay unchanged.

Shapes: B rows of a batch, T tokens, d residual width.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec as P

from zflora_jax.parallel.sharding import BATCH, batch_shards, own_mesh


def divide_embeddings(x: jax.Array, *, rows: bool) -> jax.Array:
    """Divides embeddings as the layers compute them.

    Rows are divided over fsdp in a second step, an all-to-all: in one step XLA would replicate the
    embeddings of the whole batch on meshes of several axes.

    Args:
      x: Rows of a table whose d is divided over fsdp, [B, T, d].
      rows: Whether to divide the rows over fsdp, as in training, where each layer gathers its
        kernels. Otherwise d stays divided: kernels stay in place and products are summed, which
        moves less data for few tokens, as in decode.
    """
    x = divide(x, "data", None, "fsdp")
    return divide_rows(x) if rows and x.shape[0] % batch_shards() == 0 else x


def divide_rows(x: jax.Array) -> jax.Array:
    """Divides x [B, ...] by rows over data and fsdp."""
    return divide(x, BATCH)


def divide(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Divides the first dimensions of an array over axes of the mesh in use, if the axes divide
    their sizes.

    Args:
      x: An array in a compiled function.
      axes: One axis, several, or None for each of the first dimensions.
    """
    if (mesh := own_mesh()) is None:
        return x

    def count(axis: str | tuple[str, ...] | None) -> int:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return math.prod(mesh.shape[name] for name in names)

    fits = (
        axis if size % count(axis) == 0 else None for axis, size in zip(axes, x.shape, strict=False)
    )
    return jax.lax.with_sharding_constraint(x, P(*fits))
