"""Layers of a model whose streams may be widened.

A stream is a pair (x, z): base channels and adapter channels (the adapter's state), z = None if
there are none. A fused model carries everything in x. RMSNorm averages over the base channels;
Dense adds the adapter's products to the base kernel's (docs/method.md; this project's
reconstruction of zFLoRA).

Shapes in names: B batch, T positions, d residual width, b the base's residual width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zflora_jax.adapters.kernel_adapter import Base, KernelAdapter
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.kernels import kernel_product, output_logits, table_rows
from zflora_jax.ops.linear import Array, project
from zflora_jax.ops.quantized import QuantizedArray

Channels = tuple[Array, Array | None]  # (x, z) of a stream


class AdaptedModule(nn.Module):
    """A module whose parameters method "full" replaces by those in the `adapters` collection."""

    def base_param(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
    ) -> Any:
        """The base parameter, float or quantised, or its replacement."""
        if self.has_variable("adapters", name):
            return self.get_variable("adapters", name)
        given: Any = self.get_variable("params", name)
        if isinstance(given, QuantizedArray):
            return given
        return self.param(name, init, shape, jnp.float32)


class Dense(AdaptedModule):
    """y = x W + s z B and y_z = x A + z C, or x W plus another adapter's products.

    Attributes:
      in_axes: Input axes, which the kernel sums over.
      out_axes: Output axes.
      adapter: Adapter of this kernel; None without one.
      bias: Whether a bias is added to x W.
      flat: Whether W is packed for decode, [out, in], both flattened; adapter blocks are not.
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    adapter: KernelAdapter | None = None
    bias: bool = False
    flat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None = None,
        y: Array | None = None,
        x_adapter: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Returns the kernel's product with the adapter's added.

        Args:
          x: Base channels of the input, [B, T, *in_axes].
          z: Its adapter channels, [B, T, *in_axes with the extra width], or None.
          y: x W if W is packed with other kernels; None to compute it here.
          x_adapter: x for the adapter's products (`ops.linear.adapter_input`); None for x itself.

        Returns:
          y [B, T, *out_axes], and y_z [B, T, *out_axes with the extra width] or None.
        """
        bias: Array | None = None
        if y is None:
            y = self._product(x)
            if self.bias:
                bias = self.base_param("bias", nn.initializers.zeros, self.out_axes)
                bias = bias.astype(y.dtype)[(None,) * (y.ndim - bias.ndim)]
                y = y + bias
        if self.adapter is None or self.is_initializing():
            return y, None
        x_adapter = x if x_adapter is None else x_adapter
        blocks: dict[str, Any] = {
            name: self.get_variable("adapters", name) for name in self.adapter.shapes
        }
        dropped = self._dropped(x_adapter, self.adapter.dropout)
        base = Base(self.get_variable("params", "kernel"), bias, dropped is not x_adapter)
        with jax.named_scope("adapter"):
            return self.adapter(blocks, dropped, z, y, base)

    def _product(self, x: Array) -> Array:
        """x W: [B, T, *in_axes] -> [B, T, *out_axes]."""
        n, shape = len(self.in_axes), self.in_axes + self.out_axes
        if self.flat:
            shape = math.prod(self.out_axes), math.prod(self.in_axes)
        kernel = self.base_param("kernel", nn.initializers.normal(0.02), shape)
        if self.has_variable("adapters", "kernel"):
            return project(x, kernel, n)
        return kernel_product(x, kernel, n, self.flat).reshape(*x.shape[:-n], *self.out_axes)

    def _dropped(self, x: Array, share: float) -> Array:
        """Drops a share of x's values if `apply` was given a random stream "dropout"."""
        if not share or not self.has_rng("dropout"):
            return x
        stays = jax.random.bernoulli(self.make_rng("dropout"), 1 - share, x.shape)
        return jnp.where(stays, x / (1 - share), jnp.zeros_like(x))


class RMSNorm(AdaptedModule):
    """x / rms * gain over the last axis, with the mean square over the base's channels; z is
    divided by the same rms, gain 1. Computed in float32. For the residual stream and for heads.

    Attributes:
      dim: Channels of x.
      base_width: Channels of the base, the first of them.
      eps: Added to the mean square.
      tiny_state: Whether x's other channels are too small to count in a sum of squares over all
        (`adapters.packing.STATE_SCALE`).
    """

    dim: int
    base_width: int
    eps: float
    tiny_state: bool = False

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> tuple[Array, Array | None]:
        gain = self.base_param("scale", nn.initializers.ones, (self.dim,)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        counted = wide if self.tiny_state else wide[..., : self.base_width]
        mean = jnp.sum(jnp.square(counted), axis=-1, keepdims=True) / self.base_width
        inverse = jax.lax.rsqrt(mean + self.eps)
        y = (wide * inverse * gain.reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)
        return y, None if z is None else (z.astype(jnp.float32) * inverse).astype(z.dtype)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up."""
    return nn.silu(checkpoint_name(gate, "mlp")) * checkpoint_name(up, "mlp")


class Embed(AdaptedModule):
    """Token embeddings [V, b], also a tied output head. The other channels of the stream, a fused
    adapter's state, start at zero.
    """

    config: LlamaConfig

    def setup(self) -> None:
        self.table = self.base_param(
            "embedding",
            nn.initializers.normal(0.02),
            (self.config.vocab_size, self.config.base_width),
        )

    def __call__(self, tokens: Array) -> Array:
        return table_rows(self.table, tokens, self.config.hidden_size, self.config.execution.dtype)

    def attend(self, x: Array) -> Array:
        return output_logits(x, self.table, tied=True)


class Head(AdaptedModule):
    """The output head [b, V] of a model whose embeddings are not tied to it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.config.base_width, self.config.vocab_size)
        kernel = self.base_param("kernel", nn.initializers.normal(0.02), shape)
        return output_logits(x, kernel, tied=False)
