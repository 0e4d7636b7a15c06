"""One layer of a model: attention and a gated MLP, each behind a norm and added to the residual
stream.

Shapes in names: B batch, T query positions, S key positions, H query heads, K key/value heads, d
residual width, k head dim; r, e the channels an adapter adds to d, k.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from zflora_jax.adapters.methods import ResolvedAdapter, resolve_adapter
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import has_bias, kernel_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.nn.kv_cache import KVCache, LayerCache
from zflora_jax.nn.layers import Channels, Dense, RMSNorm, swiglu
from zflora_jax.nn.positions import Context
from zflora_jax.ops.attention import attention
from zflora_jax.ops.linear import Array, beside
from zflora_jax.ops.remat import save_for_backward
from zflora_jax.ops.rope import apply_rope


class Attention(nn.Module):
    """(x, z) -> (y, y_z), each [B, T, width]; and the layer's updated cache."""

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c, adapter = self.config, self.adapter
        self.extra = resolved(c, adapter).heads
        if c.execution.packed:
            width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
            self.qkv = Dense((c.hidden_size,), (width,), bias=has_bias(c, "q"), flat=True)
        self.q, self.k, self.v = (dense(c, adapter, name) for name in "qkv")
        self.o = dense(c, adapter, "o")
        if c.traits.qk_norm:
            joint = c.execution.packed or c.execution.joint_head_norms
            self.q_norm, self.k_norm = (
                RMSNorm(c.head_dim, c.rotary_dim, c.rms_norm_eps, joint) for _ in "qk"
            )

    def __call__(
        self, h: Channels, context: Context, cache: LayerCache | None, turned: Array | None = None
    ) -> tuple[Channels, LayerCache | None]:
        q, k, v = self.project(h)
        q, k = (apply_rope(x, context.cos, context.sin, turned) for x in (q, k))
        alone = context.mask.same_tokens
        past, cache = KVCache.update(cache, k, v, context.index, alone)
        out = attention(q, past.keys, past.values, context.mask, self.config.rotary_dim**-0.5)
        return self.merge(out), cache

    def project(self, h: Channels) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, k+e], keys and values [B, T, K, k+e]."""
        packed: Sequence[Array | None] = (None, None, None)
        if self.config.execution.packed:
            packed = split_heads(self.qkv(h[0])[0], self.config)
        x = beside(h[0])
        q, k, v = (
            kernel(*h, base, x)
            for kernel, base in zip((self.q, self.k, self.v), packed, strict=True)
        )
        if self.config.traits.qk_norm:
            q, k = self.q_norm(*q), self.k_norm(*k)
        return self._widened(*q), self._widened(*k), self._widened(*v)

    def merge(self, out: Array) -> Channels:
        """What the heads [B, T, H, k+e] write to the residual stream."""
        k = self.config.head_dim
        return self.o(out[..., :k], out[..., k:]) if self.extra else self.o(out)

    def _widened(self, base: Array, extra: Array | None) -> Array:
        """Base and adapter dims of heads side by side; heads that the adapter leaves alone
        (head_scores=False) get zeros.
        """
        if not self.extra:
            return base
        if extra is None:
            extra = jnp.zeros((*base.shape[:-1], self.extra), base.dtype)
        return jnp.concatenate([base, extra], axis=-1)


def split_heads(qkv: Array, config: LlamaConfig) -> list[Array]:
    """q, k, v [B, T, heads, k] of the packed product [B, T, (H + 2K) k]."""
    heads = qkv.reshape(*qkv.shape[:2], -1, config.head_dim)
    return jnp.split(heads, (config.num_heads, config.num_heads + config.num_kv_heads), axis=2)


class MLP(nn.Module):
    """down(silu(gate(h)) * up(h)), the same for adapter units."""

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        if c.execution.packed:
            self.gate_up = Dense((c.hidden_size,), (2 * c.intermediate_size,), flat=True)
        self.gate, self.up, self.down = (
            dense(c, self.adapter, name) for name in ("gate", "up", "down")
        )

    def __call__(self, h: Channels) -> Channels:
        packed: Sequence[Array | None] = (None, None)
        if self.config.execution.packed:
            packed = jnp.split(self.gate_up(h[0])[0], 2, axis=-1)
        x = beside(h[0])
        (gate, gate_z), (up, up_z) = self.gate(*h, packed[0], x), self.up(*h, packed[1], x)
        units = None if gate_z is None or up_z is None else swiglu(gate_z, up_z)
        return self.down(swiglu(gate, up), units)


class Block(nn.Module):
    """One layer. The carry is the residual stream; `turned` says whether the layer has RoPE, None
    of a model whose layers all do.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        self.attn_norm, self.mlp_norm = (
            RMSNorm(c.hidden_size, c.norm_dim, c.rms_norm_eps, c.execution.packed) for _ in range(2)
        )
        self.attn, self.mlp = Attention(c, self.adapter), MLP(c, self.adapter)

    def __call__(
        self,
        carry: Channels,
        cache: LayerCache | None,
        turned: Array | None,
        context: Context,
    ) -> tuple[Channels, LayerCache | None]:
        update, cache = self.attn(self.attn_norm(*carry), context, cache, turned)
        carry = jax.tree.map(lambda x: save_for_backward(x, "residual"), add(carry, update))
        return add(carry, self.mlp(self.mlp_norm(*carry))), cache


def resolved(config: LlamaConfig, adapter: AdapterConfig | None) -> ResolvedAdapter:
    """What the adapter widens, nothing without one."""
    return resolve_adapter(config, adapter) if adapter else ResolvedAdapter()


def dense(config: LlamaConfig, adapter: AdapterConfig | None, kernel: str) -> Dense:
    """The layer of a kernel, with the blocks that the adapter has for it."""
    axes_in, axes_out = kernel_shapes(config)[kernel]
    blocks = resolved(config, adapter).blocks.get(kernel, ())
    bias = has_bias(config, kernel)
    return Dense(axes_in, axes_out, adapter, blocks, bias, config.execution.packed)


def add(stream: Channels, update: Channels) -> Channels:
    """Both parts of a stream; an update without adapter channels leaves them as they are."""
    (x, z), (dx, dz) = stream, update
    return (x + dx, z if z is None or dz is None else z + dz)
