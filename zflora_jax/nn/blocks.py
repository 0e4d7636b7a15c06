"""Attention and a gated MLP in a layer, each behind a norm and added to the residual stream, and
the positions and mask that layers share.

Shapes in names: B batch, T query positions, S key positions, H query heads, K key/value heads, d
residual width, k head dim; r, e the channels an adapter adds to d, k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import PACKED, has_bias, kernel_shapes, packed_rows
from zflora_jax.core.fields import require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.nn.kv_cache import KVCache, LayerCache
from zflora_jax.nn.layers import Channels, Dense, RMSNorm, swiglu
from zflora_jax.ops.attention import attention
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.ops.linear import Array, adapter_input
from zflora_jax.ops.rope import apply_rope
from zflora_jax.parallel.mesh import has_values_here
from zflora_jax.parallel.sharding import gather_fsdp


class Attention(nn.Module):
    """Maps a stream h = (x, z) to (y, y_z), each [B, T, width], and returns the updated cache."""

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c, adapter = self.config, self.adapter
        self.extra = resolve_adapter(c, adapter).heads
        self.qkv = packed_dense(c, "attn/qkv")
        self.q, self.k, self.v, self.o = (dense(c, adapter, name) for name in "qkvo")
        if c.traits.qk_norm:
            # Packing scales the adapter's dims down: a sum over all dims equals the base's.
            tiny = c.execution.packed or c.execution.joint_head_norms
            self.q_norm, self.k_norm = (
                RMSNorm(c.head_dim, c.base_head_width, c.rms_norm_eps, tiny_state=tiny)
                for _ in "qk"
            )

    def __call__(
        self, h: Channels, context: Context, cache: LayerCache | None, use_rope: Array | None = None
    ) -> tuple[Channels, LayerCache | None]:
        heads = products(self.config, "attn/qkv", self.qkv, (self.q, self.k, self.v), h)
        if self.config.traits.qk_norm:
            heads[:2] = self.q_norm(*heads[0]), self.k_norm(*heads[1])
        q, k, v = (self._widened(*pair) for pair in heads)
        q, k = (apply_rope(x, context.cos, context.sin, use_rope) for x in (q, k))
        empty = context.mask.first is None  # the tokens attend to each other only
        seen, cache = KVCache.update(cache, k, v, context.index, empty)
        out = attention(q, seen.keys, seen.values, context.mask, self.config.base_head_width**-0.5)
        base = self.config.head_dim
        return self.o(out[..., :base], out[..., base:]) if self.extra else self.o(out), cache

    def _widened(self, base: Array, extra: Array | None) -> Array:
        """Joins base and adapter dims of heads; without head_scores q and k get zeros."""
        if not self.extra:
            return base
        if extra is None:
            extra = jnp.zeros((*base.shape[:-1], self.extra), base.dtype)
        return jnp.concatenate([base, extra], axis=-1)


class MLP(nn.Module):
    """down(silu(gate(h)) * up(h)), the same for adapter units."""

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        self.gate_up = packed_dense(c, "mlp/gate_up")
        self.gate, self.up, self.down = (
            dense(c, self.adapter, name) for name in ("gate", "up", "down")
        )

    def __call__(self, h: Channels) -> Channels:
        kernels = self.gate, self.up
        (gate, gate_z), (up, up_z) = products(self.config, "mlp/gate_up", self.gate_up, kernels, h)
        units = None if gate_z is None or up_z is None else swiglu(gate_z, up_z)
        return self.down(swiglu(gate, up), units)


class Block(nn.Module):
    """One layer, whose carry is the residual stream. `use_rope` is False in a layer without RoPE,
    None where all layers have it.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        self.attn_norm, self.mlp_norm = (
            RMSNorm(c.hidden_size, c.base_width, c.rms_norm_eps, tiny_state=c.execution.packed)
            for _ in range(2)
        )
        self.attn, self.mlp = Attention(c, self.adapter), MLP(c, self.adapter)

    def __call__(
        self, carry: Channels, cache: LayerCache | None, use_rope: Array | None, context: Context
    ) -> tuple[Channels, LayerCache | None]:
        layer = Block._layer
        if context.gather and not self.is_initializing():
            layer = nn.map_variables(layer, ("params", "adapters"), gather_fsdp)
        return layer(self, carry, cache, use_rope, context)

    def _layer(
        self, carry: Channels, cache: LayerCache | None, use_rope: Array | None, context: Context
    ) -> tuple[Channels, LayerCache | None]:
        update, cache = self.attn(self.attn_norm(*carry), context, cache, use_rope)
        carry = jax.tree.map(lambda x: checkpoint_name(x, "residual"), add(carry, update))
        return add(carry, self.mlp(self.mlp_norm(*carry))), cache


def dense(config: LlamaConfig, adapter: AdapterConfig | None, kernel: str) -> Dense:
    """The layer of a kernel, with its adapter."""
    axes = kernel_shapes(config)[kernel]
    kernel_adapter = resolve_adapter(config, adapter).kernels.get(kernel)
    return Dense(*axes, kernel_adapter, has_bias(config, kernel), config.execution.packed)


def packed_dense(config: LlamaConfig, leaf: str) -> Dense | None:
    """The layer of kernels that are packed in one leaf; None in a model that is not packed."""
    if not config.execution.packed:
        return None
    kernel, width = PACKED[leaf][0], packed_rows(config)[PACKED[leaf][-1]][2]
    inputs, _ = kernel_shapes(config)[kernel]
    return Dense(inputs, (width,), bias=has_bias(config, kernel), flat=True)


def products(
    config: LlamaConfig, leaf: str, packed: Dense | None, kernels: Sequence[Dense], h: Channels
) -> list[Channels]:
    """The outputs of kernels that read the same stream. `packed`: Layer that holds them all, with
    kernel `leaf`; None if they are separate.
    """
    x, z = h
    parts: Sequence[Array | None] = [None] * len(kernels)
    if packed is not None:
        rows, (_, *head) = packed_rows(config), kernel_shapes(config)[PACKED[leaf][0]][1]
        # Split by heads: compilers make more kernels of flat parts that are reshaped.
        heads = packed(x)[0].reshape(*x.shape[:2], -1, *head)
        ends = [rows[kernel][2] // math.prod(head) for kernel in PACKED[leaf]]
        parts = jnp.split(heads, ends[:-1], axis=2)
    x_adapter = adapter_input(x)
    return [kernel(x, z, y, x_adapter) for kernel, y in zip(kernels, parts, strict=True)]


def add(stream: Channels, update: Channels) -> Channels:
    """Adds both parts of a stream; without adapter channels in the update they stay."""
    (x, z), (dx, dz) = stream, update
    return (x + dx, z if z is None or dz is None else z + dz)


@flax.struct.dataclass
class Context:
    """Inputs that all layers share.

    Attributes:
      cos: Cosines of the rotary embedding, [B, T, 1, k/2] float32.
      sin: Its sines, in the same shape.
      mask: Slots that each token attends to.
      index: int32, the cache slot of the first token; None without a cache.
      gather: Whether layers gather their parameters along fsdp.
    """

    cos: Array
    sin: Array
    mask: AttentionMask
    index: Array | None
    gather: bool = flax.struct.field(pytree_node=False)


def positions_and_mask(
    shape: tuple[int, ...],
    padding_mask: Array | None,
    segment_ids: Array | None,
    cache: KVCache | None,
) -> tuple[Array, AttentionMask, Array]:
    """Returns positions [B, T] int32, the attention mask, and True for slots that now hold a real
    token, [B, S] bool; without a cache the T tokens are the slots. shape: (B, T). The other
    arguments are those of `Llama.__call__`.

    Raises:
      ConfigError: masks or ids have a wrong shape or dtype, or exclude each other; or the cache has
        no room for the tokens (if its index is traced, the last slots are overwritten instead).
    """
    for name, given in (("padding_mask", padding_mask), ("segment_ids", segment_ids)):
        require(
            given is None or given.shape == shape,
            f"{name} must have the tokens' shape {shape}; got {getattr(given, 'shape', None)}.",
        )
    require(
        padding_mask is None or padding_mask.dtype == bool,
        "padding_mask must be bool, True at real tokens; ids of packed rows go to segment_ids.",
    )
    require(
        segment_ids is None or padding_mask is None,
        "segment_ids mark padding (0) too: give them or padding_mask, not both.",
    )
    require(
        segment_ids is None or cache is None,
        "packed rows (segment_ids) cannot be continued from a cache: give padding_mask.",
    )
    real = jnp.ones(shape, bool) if padding_mask is None else padding_mask
    if segment_ids is not None:
        return segment_positions(segment_ids), AttentionMask(segment_ids, segment_ids), real
    positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    if cache is None:
        return positions, AttentionMask(padding_mask, padding_mask), real
    room = cache.valid.shape[1]
    require(
        not has_values_here(cache.index) or int(cache.index) + shape[1] <= room,
        f"a cache of {room} slots has no room for {shape[1]} more tokens: make a larger one.",
    )
    slots = jax.lax.dynamic_update_slice_in_dim(cache.valid, real, cache.index, axis=1)
    if cache.empty:  # attention reads the tokens, not the cache
        return positions, AttentionMask(padding_mask, padding_mask), slots
    before = jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
    return before + positions, AttentionMask(padding_mask, slots, cache.index), slots


def segment_positions(segment_ids: Array) -> Array:
    """The position of each token within its segment, int32 [B, T]."""
    slot = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return slot - jax.lax.cummax(jnp.where(starts, slot, 0), axis=1)
