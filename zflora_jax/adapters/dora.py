"""DoRA (arXiv 2402.09353): LoRA whose adapted columns have trained norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.adapters.kernel_adapter import Base, Blocks, LowRank
from zflora_jax.ops.dora import column_norms
from zflora_jax.ops.linear import project
from zflora_jax.ops.quantized import float_values

Array = jax.Array


@dataclass(frozen=True)
class DoRA(LowRank):
    """y = x V, where V is W + s A B with every column divided by its norm and multiplied by the
    trained `magnitude`, which starts as the norm of W's column.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes, "magnitude": (math.prod(self.outputs),)}

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        x = self.flat(x)
        added = self.added(blocks, x)
        matrix = self.matrix(base.kernel)
        own = (y if base.bias is None else y - base.bias).reshape(added.shape)
        if base.dropped:
            own = project(x, matrix.astype(y.dtype))
        # Without a gradient, as in the paper's section 4.3.
        norms = column_norms(matrix, blocks["lora_a"], blocks["lora_b"], self.scale)
        norms = jax.lax.stop_gradient(norms)
        some = norms > 0  # in the divisor too: the gradient of 0 / 0 is NaN even if not chosen
        magnitude = blocks["magnitude"].astype(jnp.float32)
        ratio = jnp.where(some, magnitude / jnp.where(some, norms, 1.0), 1.0)
        # = ratio (own + added) - own. In float32, and with the ratio read once: its gradient is a
        # sum over all tokens.
        adapted = (own + added).astype(jnp.float32)
        more = added + ((ratio.reshape(1, 1, -1) - 1) * adapted).astype(y.dtype)
        return y + more.reshape(y.shape), None

    def matrix(self, kernel: Any) -> Array:
        """W of one layer as floats [in, out]."""
        return float_values(kernel).reshape(math.prod(self.inputs), -1)

    def start(self, kernel: Any) -> Array:
        """The first magnitudes [out] of a kernel of one layer, float32."""
        return jnp.linalg.norm(self.matrix(kernel).astype(jnp.float32), axis=0)

    def fuse(self, kernel: Any, blocks: Blocks) -> Any:
        wide = self.sum(kernel, blocks)
        norms = jnp.linalg.norm(wide, axis=-2, keepdims=True)
        ratio = blocks["magnitude"][..., None, :] / norms
        wide = wide * jnp.where(norms > 0, ratio, 1.0)
        return wide.reshape(kernel.shape).astype(kernel.dtype)
