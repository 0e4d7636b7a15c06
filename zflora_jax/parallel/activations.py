"""How activations are divided over the mesh in use.

Shapes: B rows of a batch, T tokens, d residual width.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec as P

from zflora_jax.parallel.sharding import BATCH, batch_shards, own_mesh


def divide_embeddings(x: jax.Array, *, rows: bool) -> jax.Array:
    """Divide embeddings as the layers compute them; without a mesh they stay as they are.

    The rows are divided in a second step, an all-to-all along fsdp: asked for them in one step, XLA
    replicates the embeddings of the whole batch on meshes of several axes.

    Args:
      x: [B, T, d], from a lookup in a table whose d is divided over fsdp.
      rows: divide the rows over fsdp too, as in training, where each layer gathers its kernels.
        Else d stays divided over fsdp: kernels stay in place and products are summed, which moves
        less data for few tokens, as in decode.
    """
    x = divide(x, "data", None, "fsdp")
    return divide_rows(x) if rows and x.shape[0] % batch_shards() == 0 else x


def divide_rows(x: jax.Array) -> jax.Array:
    """Divide x [B, ...] by rows over data and fsdp; without a mesh it stays as it is."""
    return divide(x, BATCH)


def divide(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Divide the first dimensions of an array over axes of the mesh in use, where the axes divide
    them.

    Args:
      x: an array in a compiled function.
      axes: for each of the first dimensions one axis, several, or None; the dimensions that follow
        are not divided.

    Returns:
      x; without a mesh it stays as it is.
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
