"""Layers of a model whose streams may be widened.

A stream is a pair (x, z): base channels and adapter channels, z = None where there are none. A
fused model carries everything in x. The same layers serve both: RMSNorm takes its mean over the
base channels, RoPE turns the base dims of a head, Dense adds the adapter's blocks to what the base
kernel computes (docs/method.md; this project's reconstruction of zFLoRA).

Shapes in names: B batch, T positions, d residual width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zflora_jax.adapters.methods import FROZEN
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.dora import column_norms
from zflora_jax.ops.kernels import frozen_product, output_logits, packed_product, table_rows
from zflora_jax.ops.linear import Array, project
from zflora_jax.ops.quantized import QuantizedArray, float_values
from zflora_jax.ops.remat import save_for_backward
from zflora_jax.ops.tiling import tile

Channels = tuple[Array, Array | None]  # (x, z) of a stream


class AdaptedModule(nn.Module):
    """A module that may have variables in the `adapters` collection."""

    def base_param(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
    ) -> Any:
        """The base parameter, or what replaces it whole in the adapters (method "full"); a
        `QuantizedArray` where the tree has one.
        """
        if self.has_variable("adapters", name):
            return self.get_variable("adapters", name)
        given: Any = self.get_variable("params", name)
        if isinstance(given, QuantizedArray):
            return given
        return self.param(name, init, shape, jnp.float32)

    def block(self, name: str) -> Array:
        """A leaf of the adapters; its products are in the dtype of what is multiplied by it."""
        value: Array | None = self.get_variable("adapters", name)
        if value is None:
            raise ValueError(
                f"the adapters lack {'/'.join((*self.path, name))}; make them with init_adapters"
                " for this config and adapter."
            )
        return value


def _low_rank(x: Array, a: Array, b: Array) -> Array:
    """x A B of x [B, T, in] and float32 factors, in x's dtype."""
    return project(save_for_backward(project(x, a), "low rank"), b)


class Dense(AdaptedModule):
    """y = x W + s z B and y_z = x A + z C, with the blocks that the adapter has for this kernel;
    low-rank factors are added to y.

    The inputs of lora_a drop out where `apply` is given a random stream "dropout".

    Attributes:
      in_axes: of the input, which the kernel sums over.
      out_axes: of the output.
      adapter: of the blocks; None without one.
      blocks: their names.
      bias: whether a bias is added to x W.
      flat: W is stored as `ops.linear.packed_linear` reads it, [out, in], both flattened; adapter
        blocks are not.
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    adapter: AdapterConfig | None = None
    blocks: tuple[str, ...] = ()
    bias: bool = False
    flat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        z: Array | None = None,
        y: Array | None = None,
        beside: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """The kernel's product and what the adapter adds.

        Args:
          x: [B, T, *in_axes].
          z: [B, T, *in_axes with the extra width], or None.
          y: x W where W is packed with other kernels; None to compute it here.
          beside: x for the adapter's products (`ops.linear.beside`); None: x itself.

        Returns:
          y [B, T, *out_axes], and y_z [B, T, *out_axes with the extra width] or None.
        """
        n = len(self.in_axes)
        y, y_z = self._product(x) if y is None else y, None
        if self.adapter is None or not self.blocks or self.is_initializing():
            return y, y_z
        beside = x if beside is None else beside
        block, scale = {name: self.block(name) for name in self.blocks}, self.adapter.scale
        if "lora_a" in block:
            return self._with_lora(x, beside, y, block), y_z
        if "forward" in block:
            y_z = project(beside, block["forward"], n)
        if z is not None and "backward" in block:
            y = y + scale * project(z, block["backward"], n)
        if z is not None and y_z is not None and "cross" in block:
            y_z = y_z + project(z, block["cross"], n)
        if "ffa_a" in block:
            y = y + scale * tile(
                project(beside.reshape(*x.shape[:-n], -1), block["ffa_a"]), math.prod(self.out_axes)
            ).reshape(y.shape)
        return y, y_z

    def _with_lora(self, x: Array, beside: Array, y: Array, block: dict[str, Array]) -> Array:
        """y and the low-rank product; with DoRA both times the trained norm over the kernel's."""
        assert self.adapter is not None
        flat = beside.reshape(*x.shape[: -len(self.in_axes)], -1)
        dropped, scale = self._dropped(flat), self.adapter.scale_of(self.name or "")
        a, b = (self.block(name).astype(jnp.float32) for name in ("lora_a", "lora_b"))
        if "start_a" in block:
            # A B - A0 B0 of factors near to A0 and B0, whose products would cancel in bfloat16.
            frozen = (self.block(name).astype(jnp.float32) for name in FROZEN)
            a0, b0 = map(jax.lax.stop_gradient, frozen)
            added = _low_rank(dropped, a - a0, b) + _low_rank(dropped, a0, b - b0)
            if dropped is not flat:  # what is taken off the base does not drop out
                added = added + _low_rank(dropped - flat, a0, b0)
            a, b = jnp.concatenate([a, a0], axis=1), jnp.concatenate([b, -b0])
        else:
            added = _low_rank(dropped, a, b)
        added = scale * added
        if "magnitude" not in block:
            return y + added.reshape(y.shape)
        kernel: Any = self.get_variable("params", "kernel")
        matrix = float_values(kernel).reshape(flat.shape[-1], -1)
        own = (y - self._bias(y)).reshape(added.shape)
        if dropped is not flat:
            own = project(dropped, matrix.astype(y.dtype))
        norms = jax.lax.stop_gradient(column_norms(matrix, a, b, scale))  # the paper's section 4.3
        some = norms > 0  # in the divisor too: of 0 / 0 the gradient is NaN though it is not chosen
        magnitude = self.block("magnitude").astype(jnp.float32)
        ratio = jnp.where(some, magnitude / jnp.where(some, norms, 1.0), 1.0)
        # = ratio (own + added) - own. In float32, and with the ratio read once: its gradient is a
        # sum over all tokens.
        adapted = (own + added).astype(jnp.float32)
        more = added + ((ratio.reshape(1, 1, -1) - 1) * adapted).astype(y.dtype)
        return y + more.reshape(y.shape)

    def _product(self, x: Array) -> Array:
        """x W and the bias: [B, T, *in_axes] -> [B, T, *out_axes]."""
        n, init = len(self.in_axes), nn.initializers.normal(0.02)
        if self.flat:
            flat = x.reshape(*x.shape[:-n], -1)
            shape = math.prod(self.out_axes), flat.shape[-1]
            kernel = self.base_param("kernel", init, shape)
            y = packed_product(flat, kernel).reshape(*x.shape[:-n], *self.out_axes)
        else:
            kernel = self.base_param("kernel", init, self.in_axes + self.out_axes)
            if self.has_variable("adapters", "kernel"):
                y = project(x, kernel, n)
            else:
                y = frozen_product(x, kernel, n)
        if not self.bias:
            return y
        self.base_param("bias", nn.initializers.zeros, self.out_axes)
        return y + self._bias(y)

    def _bias(self, y: Array) -> Any:
        """The bias as y [B, T, *out_axes] adds it; 0 without one."""
        if not self.bias:
            return 0
        own = "adapters" if self.has_variable("adapters", "bias") else "params"
        bias: Any = self.get_variable(own, "bias")
        return bias.astype(y.dtype)[(None,) * (y.ndim - bias.ndim)]

    def _dropped(self, x: Array) -> Array:
        """`x` with the adapter's dropout, where a random stream "dropout" is given: in training."""
        if self.adapter is None or not self.adapter.dropout or not self.has_rng("dropout"):
            return x
        share = 1 - self.adapter.dropout
        stays = jax.random.bernoulli(self.make_rng("dropout"), share, x.shape)
        return jnp.where(stays, x / share, jnp.zeros_like(x))


class RMSNorm(AdaptedModule):
    """x / rms * gain over the last axis, with the mean square over the base's channels; z is
    divided by the same rms, gain 1. Computed in float32. Of the residual stream, or of heads.

    Attributes:
      dim: channels of x.
      norm_dim: how many of them, the first, are the base's.
      eps: added to the mean square.
      tiny_state: x's other channels are so small (`adapters.blocks.STATE_SCALE`) that they do not
        count in a sum of squares over all.
    """

    dim: int
    norm_dim: int
    eps: float
    tiny_state: bool = False

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> tuple[Array, Array | None]:
        return _normalise(
            x,
            z,
            self.base_param("scale", nn.initializers.ones, (self.dim,)),
            self.norm_dim,
            self.eps,
            self.tiny_state,
        )


def _normalise(
    x: Array, z: Array | None, gain: Array, norm_dim: int, eps: float, tiny_state: bool
) -> tuple[Array, Array | None]:
    wide = x.astype(jnp.float32)
    counted = wide if tiny_state else wide[..., :norm_dim]
    mean = jnp.sum(jnp.square(counted), axis=-1, keepdims=True) / norm_dim
    inverse = jax.lax.rsqrt(mean + eps)
    gain = gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape)
    y = (wide * inverse * gain).astype(x.dtype)
    return y, None if z is None else (z.astype(jnp.float32) * inverse).astype(z.dtype)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up."""
    return nn.silu(save_for_backward(gate, "mlp")) * save_for_backward(up, "mlp")


class Embed(AdaptedModule):
    """Token embeddings [V, b], also the output head where it is tied; b is the base's d. Further
    channels of the stream, a fused adapter's state, start at zero.
    """

    config: LlamaConfig

    def setup(self) -> None:
        self.table = self.base_param(
            "embedding",
            nn.initializers.normal(0.02),
            (self.config.vocab_size, self.config.norm_dim),
        )

    def __call__(self, tokens: Array) -> Array:
        width, dtype = self.config.hidden_size, self.config.execution.dtype
        return table_rows(self.table, tokens, width, dtype)

    def attend(self, x: Array) -> Array:
        return output_logits(x, self.table, tied=True)


class Head(AdaptedModule):
    """The output head [b, V] of a model whose embeddings are not tied to it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.config.norm_dim, self.config.vocab_size)
        kernel = self.base_param("kernel", nn.initializers.normal(0.02), shape)
        return output_logits(x, kernel, tied=False)
