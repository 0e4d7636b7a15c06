"""Layers of a Llama whose streams may be widened.

A stream is a pair (x, z): base channels and adapter channels, z = None where there are none. A fused model carries everything in x. The same
layers serve both: RMSNorm takes its mean over the base channels, RoPE turns the base dims of a head, Dense adds the adapter's blocks to what the base
kernel computes (docs/method.md; this project's reconstruction of zFLoRA).

Einsum legend: B batch, T query positions, S key positions, H query heads, K key/value heads, G query heads of a key head, q their G*T queries,
k head dim.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from zflora_jax import products
from zflora_jax.config import AdapterConfig
from zflora_jax.devices import widest_head
from zflora_jax.model_config import LlamaConfig
from zflora_jax.products import Array, project, whole_vectors

# What the backward pass of a layer keeps, by name; the rest (norms, gates, softmax) it computes again from these, which costs little: for a LoRA step
# of SmolLM2-135M two thirds of the memory that keeping all takes. The names are the streams whose values are kept.
KEPT = ("residual", "heads", "mlp", "low rank")

# cuDNN's attention gives what its backward pass needs without a name: that kernel's results are kept too.
KEEP = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(*KEPT), lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd")
)


ROPE_ROWS = 8192  # of a table of rotations in a compiled program: at most 4 MB at head_dim 128, once for prefill and once for the loop


def kept(x: Array, name: str) -> Array:
    """`x`, kept for the backward pass. name: one of KEPT."""
    return checkpoint_name(x, name)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies of the base head dims, [k/2] float32, with Llama-3 scaling where the config has it (as transformers computes them)."""
    k = config.rotary_dim
    freq = (1.0 / np.float32(config.rope_theta) ** (np.arange(0, k, 2, dtype=np.float32) / np.float32(k))).astype(np.float32)
    if (s := config.rope_scaling) is None:
        return freq
    wavelength = 2 * np.pi / freq
    smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    # High frequencies stay (smooth >= 1), low ones are divided by the factor (smooth <= 0), the band between is interpolated.
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * freq / s.factor + smooth * freq).astype(np.float32)


def rope_tables(config: LlamaConfig, positions: Array, length: int) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, k/2] float32 of int32 positions [B, T] below `length`. Angles are float32 always: bfloat16 cannot tell position 257 from
    256.

    Up to ROPE_ROWS positions they are looked up in a constant: XLA's CPU compiler would compute them again in every layer, twice.
    """
    frequencies = rope_frequencies(config)
    if length <= ROPE_ROWS:
        table = np.arange(length, dtype=np.float32)[:, None, None] * frequencies
        cos, sin = (jnp.take(jnp.asarray(of(table)), positions, axis=0, mode="clip") for of in (np.cos, np.sin))
        return cos, sin
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the first k dims of heads x [B, T, heads, k or more]; pairs are (i, i + k/2). Dims beyond k carry no position and pass through."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


class AdaptedModule(nn.Module):
    """A module that may have variables in the `adapters` collection."""

    def base_param(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
        """The base parameter, or what replaces it whole in the adapters (method "full")."""
        if self.has_variable("adapters", name):
            return self.get_variable("adapters", name)
        return self.param(name, init, shape, jnp.float32)

    def block(self, name: str, dtype: jnp.dtype) -> Array:
        value: Array | None = self.get_variable("adapters", name)
        if value is None:
            raise ValueError(f"the adapters lack {'/'.join((*self.path, name))}; make them with init_adapters for this config and adapter.")
        return value.astype(dtype)


class Dense(AdaptedModule):
    """y = x W + s z B and y_z = x A + z C, with the blocks that the adapter has for this kernel; low-rank factors are added to y.

    x [B, T, *in_axes] and z [B, T, *in_axes with the extra width] or None -> (y [B, T, *out_axes], y_z [B, T, *out_axes with the extra width] or
    None). y: x W where W is packed with other kernels; None to compute it here. flat: W is stored as `products.row_products` reads it, [out, in],
    both flattened, in filled up to whole vectors, as in packed models; adapter blocks are not.
    The inputs of lora_a drop out where `apply` is given a random stream "dropout".
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    adapter: AdapterConfig | None = None
    blocks: tuple[str, ...] = ()
    flat: bool = False

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None, y: Array | None = None) -> tuple[Array, Array | None]:
        n, dtype = len(self.in_axes), x.dtype
        if y is None and self.flat:
            flat = x.reshape(*x.shape[:-n], -1)
            kernel = self.base_param("kernel", nn.initializers.normal(0.02), (math.prod(self.out_axes), whole_vectors(flat.shape[-1])))
            flat = jnp.pad(flat, ((0, 0), (0, 0), (0, kernel.shape[1] - flat.shape[-1])))
            y = products.row_products(flat, kernel.astype(dtype)).reshape(*x.shape[:-n], *self.out_axes)
        elif y is None:
            kernel = self.base_param("kernel", nn.initializers.normal(0.02), self.in_axes + self.out_axes)
            product = project if self.has_variable("adapters", "kernel") else jnp.tensordot  # a frozen kernel has no gradient to arrange
            y = product(x, kernel.astype(dtype), n)
        y_z: Array | None = None
        if self.adapter is None or not self.blocks or self.is_initializing():
            return y, y_z
        block, scale = {name: self.block(name, dtype) for name in self.blocks}, self.adapter.scale
        if "forward" in block:
            y_z = project(x, block["forward"], n)
        if z is not None and "backward" in block:
            y = y + scale * project(z, block["backward"], n)
        if z is not None and y_z is not None and "cross" in block:
            y_z = y_z + project(z, block["cross"], n)
        if "lora_a" in block:
            low = kept(project(self._dropped(x.reshape(*x.shape[:-n], -1)), block["lora_a"]), "low rank")
            y = y + scale * project(low, block["lora_b"]).reshape(y.shape)
        if "ffa_a" in block:
            y = y + scale * tile(project(x.reshape(*x.shape[:-n], -1), block["ffa_a"]), math.prod(self.out_axes)).reshape(y.shape)
        return y, y_z

    def _dropped(self, x: Array) -> Array:
        """`x` with the adapter's dropout, where a random stream "dropout" is given: in training."""
        if self.adapter is None or not self.adapter.dropout or not self.has_rng("dropout"):
            return x
        share = 1 - self.adapter.dropout
        stays = jax.random.bernoulli(self.make_rng("dropout"), share, x.shape)
        return jnp.where(stays, x / share, jnp.zeros_like(x))


def tile(h: Array, out: int) -> Array:
    """h R for FFA's fixed tiling R [r, out], R[i, j] = sqrt(r/out) where j mod r = i: h [..., r] -> [..., out]. Orthonormal rows when r
    divides out."""
    rank = h.shape[-1]
    return jnp.take(h, np.arange(out) % rank, axis=-1) * math.sqrt(rank / out)


class RMSNorm(AdaptedModule):
    """x / rms * gain, with the mean square over the first `base_dim` channels; z is divided by the same rms, gain 1. Computed in float32."""

    dim: int
    base_dim: int
    eps: float

    @nn.compact
    def __call__(self, x: Array, z: Array | None = None) -> tuple[Array, Array | None]:
        return _normalise(x, z, self.base_param("scale", nn.initializers.ones, (self.dim,)), self.base_dim, self.eps)


def _normalise(x: Array, z: Array | None, gain: Array, base_dim: int, eps: float) -> tuple[Array, Array | None]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide[..., :base_dim]), axis=-1, keepdims=True) + eps)
    y = (wide * inverse * gain.astype(jnp.float32)[None, None, :]).astype(x.dtype)
    return y, None if z is None else (z.astype(jnp.float32) * inverse).astype(z.dtype)


def gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up."""
    return nn.silu(kept(gate, "mlp")) * kept(up, "mlp")


def attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """Grouped-query attention: q [B, T, H, k], k [B, K, k, S], v [B, K, S, k], mask [B, 1, T, S] bool (True = attend) -> [B, T, H, k]. Softmax in
    float32.

    The queries of the G = H / K heads that share keys lie below each other, so that every product is one plain matrix product per row and key head.
    Long sequences go through in blocks of queries: T/n x S scores per head exist at one time, in both passes. On a
    GPU, cuDNN's kernel where it applies.
    """
    if cudnn_applies(q, k.shape[-1]):
        return fused_attention(q, k, v, mask, scale)
    (B, T, H, dim), K = q.shape, k.shape[1]
    out = _attention(q.reshape(B, T, K, H // K, dim).transpose(0, 2, 3, 1, 4), k, v, mask, scale)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def cudnn_applies(q: Array, slots: int) -> bool:
    """Whether cuDNN's attention takes queries q [B, T, H, k] and `slots` keys, in both passes: 16-bit numbers, even lengths, k a multiple of 8 and
    not wider than `devices.widest_head`. One query alone is left to the plain products, which read the cache as it lies."""
    even = q.shape[1] > 1 and q.shape[1] % 2 == 0 and slots % 2 == 0
    if not even or q.shape[3] % 8 != 0 or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return q.shape[3] <= widest_head()


def fused_attention(q: Array, k: Array, v: Array, mask: Array, scale: float, implementation: Literal["xla", "cudnn"] = "cudnn") -> Array:
    """The same as `attention`, by `jax.nn.dot_product_attention`."""
    return jax.nn.dot_product_attention(q, k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3), mask=mask, scale=scale, implementation=implementation)


def query_blocks(length: int) -> int:
    """Into how many equal blocks the queries of a sequence are cut: of at most 512 from 1025 tokens on, where the length has such a divisor."""
    if length <= 1024:
        return 1
    return next((n for n in range(2, length // 128 + 1) if length % n == 0 and length // n <= 512), 1)


def _cut(x: Array, blocks: int, axis: int) -> Array:
    """The blocks of `axis` on a new leading axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _probabilities(q: Array, k: Array, mask: Array, scale: float) -> Array:
    """[B, K, GT, S] float32 of q [B, K, G, T, k] and k [B, K, k, S]."""
    flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.einsum("BKqk,BKkS->BKqS", flat, k, preferred_element_type=jnp.float32) * scale
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[2:])
    return jax.nn.softmax(jnp.where(mask[:, :, None], grouped, jnp.finfo(jnp.float32).min).reshape(scores.shape), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    """[B, K, G, T, k] of q of that shape."""

    def attend(block: tuple[Array, Array]) -> Array:
        p = _probabilities(block[0], k, block[1], scale).astype(q.dtype)
        # In float32, as XLA's CPU compiler then reads bfloat16 values as they lie (`products.bfloat16_product`).
        out = jnp.einsum("BKqS,BKSk->BKqk", p, v, preferred_element_type=jnp.float32)
        return out.reshape(*block[0].shape[:-1], -1).astype(q.dtype)

    n = query_blocks(q.shape[3])
    return attend((q, mask)) if n == 1 else _join(jax.lax.map(attend, (_cut(q, n, 3), _cut(mask, n, 2))), 3)


def _attention_forward(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    out = kept(_attention(q, k, v, mask, scale), "heads")
    return out, (q, k, v, mask, out)


def _attention_backward(scale: float, saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    """As in FlashAttention (arXiv 2205.14135, section 3.1) the probabilities are computed again instead of kept: T x S numbers per head and layer.

    The products over queries have their narrow operand on the left; `products.matmul` says why.
    """
    q, k, v, mask, out = saved

    def block_gradients(q: Array, mask: Array, out: Array, d_out: Array) -> tuple[Array, Array, Array]:
        shape, p = q.shape, _probabilities(q, k, mask, scale)
        q, out, d_out = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, out, d_out))
        d_v = jnp.einsum("BKqk,BKqS->BKkS", d_out, p.astype(q.dtype), preferred_element_type=jnp.float32)
        d_p = jnp.einsum("BKqk,BKSk->BKqS", d_out, v, preferred_element_type=jnp.float32)
        mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = p * (d_p - mean) * scale
        grouped = d_scores.reshape(*d_scores.shape[:2], -1, *mask.shape[2:])
        # p is zero where nothing is attended to, but in a row that attends to nothing at all.
        d_scores = jnp.where(mask[:, :, None], grouped, 0.0).reshape(d_scores.shape).astype(q.dtype)
        d_k = jnp.einsum("BKqk,BKqS->BKkS", q, d_scores, preferred_element_type=jnp.float32)
        return jnp.einsum("BKqS,BKkS->BKqk", d_scores, k).reshape(shape), d_k, d_v

    n = query_blocks(q.shape[3])
    if n == 1:
        d_q, d_k, d_v = block_gradients(q, mask, out, d_out)
    else:

        def add(total: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            d_q, d_k, d_v = block_gradients(*block)
            return (total[0] + d_k, total[1] + d_v), d_q

        zero = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32))
        (d_k, d_v), d_q = jax.lax.scan(add, zero, tuple(_cut(x, n, axis) for x, axis in ((q, 3), (mask, 2), (out, 3), (d_out, 3))))
        d_q = _join(d_q, 3)
    return d_q, d_k.astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)
