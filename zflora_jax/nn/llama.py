"""The Llama forward: one for base, adapted, fused and packed trees, with or without a key/value
cache.

Einsum legend: B batch, T query positions, S cache slots, H query heads, K key/value heads, d
residual width, k head dim, f MLP units, V vocabulary, L layers; r, e, m the channels an adapter
adds to d, k, f. Parameter names and shapes: `model.param_shapes`; adapters:
`adapters.methods.block_shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zflora_jax.adapters.init import adapter_shapes
from zflora_jax.adapters.methods import ResolvedAdapter, resolve_adapter
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree, difference, flatten
from zflora_jax.nn.kv_cache import KEY_SLOTS, VALUE_SLOTS, KVCache
from zflora_jax.nn.layers import AdaptedModule, Dense, RMSNorm, swiglu
from zflora_jax.ops.attention import attention
from zflora_jax.ops.products import Array, copy_bits, head_logits
from zflora_jax.ops.remat import REMAT_POLICY, save_for_backward
from zflora_jax.ops.rope import apply_rope, rope_tables
from zflora_jax.parallel.mesh import beside, mesh_in_use
from zflora_jax.parallel.sharding import divide_embeddings

Stream = tuple[Array, Array | None]


def _dense(
    config: LlamaConfig, adapter: AdapterConfig | None, p: ResolvedAdapter, kernel: str
) -> Dense:
    axes_in, axes_out = kernel_shapes(config)[kernel]
    return Dense(axes_in, axes_out, adapter, p.blocks.get(kernel, ()), config.packed)


class Attention(nn.Module):
    """(x, z) -> (y, y_z), each [B, T, width]; and the layer's updated (keys, values)."""

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        self.plan = resolve_adapter(c, self.adapter) if self.adapter else ResolvedAdapter()
        if c.packed:
            self.qkv = Dense(
                (c.hidden_size,), ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim,), flat=True
            )
        self.q, self.k, self.v = (_dense(c, self.adapter, self.plan, name) for name in "qkv")
        self.o = _dense(c, self.adapter, self.plan, "o")

    def __call__(
        self,
        h: Stream,
        cos: Array,
        sin: Array,
        mask: Array,
        cache: tuple[Array, Array] | None,
        index: Array | None,
    ) -> tuple[Stream, Any]:
        c = self.config
        base: Sequence[Array | None] = (None,) * 3
        if c.packed:
            flat, _ = self.qkv(h[0])
            base = jnp.split(
                flat.reshape(*flat.shape[:2], -1, c.head_dim),
                (c.num_heads, c.num_heads + c.num_kv_heads),
                axis=2,
            )
        q, k, v = (
            self._join(*project(*h, y))
            for project, y in zip((self.q, self.k, self.v), base, strict=True)
        )
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        if cache is not None and index is not None:
            rows = keys.shape[:2]  # the cache may lack axes of one
            keys, values = (
                x.reshape(*old.shape[:-2], *x.shape[2:])
                for x, old in zip((keys, values), cache, strict=True)
            )
            keys = copy_bits(
                partial(jax.lax.dynamic_update_slice_in_dim, axis=KEY_SLOTS),
                (cache[0], keys),
                (index,),
            )
            values = copy_bits(
                partial(jax.lax.dynamic_update_slice_in_dim, axis=VALUE_SLOTS),
                (cache[1], values),
                (index,),
            )
            cache = keys, values
            keys, values = (x.reshape(*rows, *x.shape[-2:]) for x in cache)
        out = attention(
            save_for_backward(q, "heads"),
            save_for_backward(keys, "heads"),
            save_for_backward(values, "heads"),
            mask,
            c.rotary_dim**-0.5,
        )
        extra = self.plan.heads
        y, y_z = self.o(out[..., : c.head_dim], out[..., c.head_dim :]) if extra else self.o(out)
        return (y, y_z), cache

    def _join(self, base: Array, extra: Array | None) -> Array:
        """Base and adapter dims of heads side by side; heads that the adapter leaves alone
        (head_scores=False) get zeros.
        """
        if not self.plan.heads:
            return base
        if extra is None:
            extra = jnp.zeros((*base.shape[:-1], self.plan.heads), base.dtype)
        return jnp.concatenate([base, extra], axis=-1)


class MLP(nn.Module):
    """down(silu(gate(h)) * up(h)), the same for adapter units."""

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        p = resolve_adapter(c, self.adapter) if self.adapter else ResolvedAdapter()
        if c.packed:
            self.gate_up = Dense((c.hidden_size,), (2 * c.intermediate_size,), flat=True)
        self.gate, self.up = (_dense(c, self.adapter, p, name) for name in ("gate", "up"))
        self.down = _dense(c, self.adapter, p, "down")

    def __call__(self, h: Stream) -> Stream:
        base: Sequence[Array | None] = (
            jnp.split(self.gate_up(h[0])[0], 2, axis=-1) if self.config.packed else (None, None)
        )
        (gate, gate_z), (up, up_z) = self.gate(*h, base[0]), self.up(*h, base[1])
        units = None if gate_z is None or up_z is None else swiglu(gate_z, up_z)
        return self.down(swiglu(gate, up), units)


class Block(nn.Module):
    """One layer. The carry is the residual stream; `cache` is this layer's (keys, values)
    or None.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None

    def setup(self) -> None:
        c = self.config
        self.attn_norm, self.mlp_norm = (
            RMSNorm(c.hidden_size, c.norm_dim, c.rms_norm_eps) for _ in range(2)
        )
        self.attn, self.mlp = Attention(c, self.adapter), MLP(c, self.adapter)

    def __call__(
        self, carry: Stream, cache: Any, cos: Array, sin: Array, mask: Array, index: Array | None
    ) -> tuple[Stream, Any]:
        update, cache = self.attn(self.attn_norm(*carry), cos, sin, mask, cache, index)
        carry = jax.tree.map(lambda x: save_for_backward(x, "residual"), _add(carry, update))
        return _add(carry, self.mlp(self.mlp_norm(*carry))), cache


def segment_positions(segments: Array) -> Array:
    """Segment ids [B, T] int32 -> the position of each token within its segment, [B, T] int32."""
    slot = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    return slot - jax.lax.cummax(jnp.where(starts, slot, 0), axis=1)


def _add(stream: Stream, update: Stream) -> Stream:
    (x, z), (dx, dz) = stream, update
    return (x + dx, z if z is None or dz is None else z + dz)


class Embed(AdaptedModule):
    """Token embeddings [V, d], also the output head where it is tied."""

    config: LlamaConfig

    def setup(self) -> None:
        self.table = self.base_param(
            "embedding",
            nn.initializers.normal(0.02),
            (self.config.vocab_size, self.config.hidden_size),
        )

    def __call__(self, tokens: Array) -> Array:
        return copy_bits(partial(jnp.take, axis=0), (self.table,), (tokens,)).astype(
            self.config.dtype
        )

    def attend(self, x: Array) -> Array:
        return head_logits(x, self.table.astype(x.dtype), True)


class Head(AdaptedModule):
    """The output head [d, V] of a model whose embeddings are not tied to it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.config.hidden_size, self.config.vocab_size)
        kernel = self.base_param("kernel", nn.initializers.normal(0.02), shape)
        return head_logits(x, kernel.astype(x.dtype), False)


class Llama(nn.Module):
    """A Llama-style decoder.

    config: shape and numerics. adapter: None for a base, fused or packed tree; else the
    AdapterConfig of the `adapters` collection.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None

    def setup(self) -> None:
        c = self.config
        if (
            c.packed
            and self.adapter is not None
            and METHODS[self.adapter.method].in_place == "full"
        ):
            raise ValueError(
                "a packed model cannot have its kernels replaced (method 'full'): fuse first, then"
                " pack."
            )
        self.embed = Embed(c)
        policy = None if c.remat else REMAT_POLICY
        block: Any = nn.remat(Block, prevent_cse=not c.scan_layers, policy=policy)
        if c.scan_layers:
            axes: Any = {"params": 0, "adapters": 0}
            split: Any = {"params": True, "dropout": True}  # each layer draws for itself
            scanned = nn.scan(
                block,
                axes,
                split_rngs=split,
                in_axes=(0, *[nn.broadcast] * 4),
                out_axes=0,
                length=c.num_layers,
            )
            self.layers = scanned(c, self.adapter)
        else:
            self.layers = [block(c, self.adapter) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.hidden_size, c.norm_dim, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Head(c)

    def __call__(
        self, tokens: Array, valid: Array | None = None, cache: KVCache | None = None
    ) -> Any:
        """Logits [B, T, V] float32 of int32 tokens [B, T]; with a cache, (logits, updated cache).

        valid: [B, T] bool, False at padding (left or right); None means all real. Padding is never
        attended to and takes no position. Or int32 segment ids of packed rows, each id one run of
        tokens (0: padding): a token attends to its own segment, positions start anew there. With a
        cache the T tokens go to slots index .. index + T - 1 and attend to all valid slots before
        them.
        """
        x, cache = self.hidden(tokens, valid, cache)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def hidden(
        self, tokens: Array, valid: Array | None = None, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        """Final-norm hidden states [B, T, d] in the activation dtype, and the updated cache (None
        without one).
        """
        self._check_collections()
        c, (batch, length) = self.config, tokens.shape
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        if cache is None:
            slots, index, first = valid, None, jnp.zeros((), jnp.int32)
            before = jnp.zeros((batch, 1), jnp.int32)
        else:
            require(
                valid.dtype == bool,
                "packed rows (segment ids) cannot be continued from a cache: give valid as bool.",
            )
            index, first = cache.index, cache.index
            before = jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
            slots = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, index, axis=1)
        causal = jnp.arange(slots.shape[1])[None, :] <= first + jnp.arange(length)[:, None]
        if valid.dtype == bool:
            positions = before + jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
            mask = causal[None, None, :, :] & slots[:, None, None, :]
        else:
            positions = segment_positions(valid)
            # Equality alone: padding then attends to padding, and no row of the softmax is empty.
            mask = causal[None, None, :, :] & (valid[:, None, :, None] == valid[:, None, None, :])
        cos, sin = rope_tables(c, positions, slots.shape[1])

        x = divide_embeddings(self.embed(tokens), rows=cache is None)
        width = resolve_adapter(c, self.adapter).residual if self.adapter else 0
        carry: Stream = (x, jnp.zeros((*x.shape[:2], width), x.dtype) if width else None)
        layers = None if cache is None else cache.layers
        if c.scan_layers:
            carry, layers = self.layers(carry, layers, cos, sin, mask, index)
        else:
            updated = []
            for i, layer in enumerate(self.layers):
                carry, pair = layer(
                    carry, None if layers is None else layers[i], cos, sin, mask, index
                )
                updated.append(pair)
            layers = updated
        x, _ = self.final_norm(*carry)  # the state is dropped here: the head has no rows for it
        return x, None if cache is None else KVCache(layers, slots, cache.index + length)

    def logits(self, x: Array) -> Array:
        """Hidden states [B, T, d] -> logits [B, T, V] float32."""
        if self.config.tie_word_embeddings:
            return self.embed.attend(x)
        return self.lm_head(x)

    def _check_collections(self) -> None:
        if self.is_initializing():
            return
        present = "adapters" in self.variables
        if self.adapter is not None and not present:
            raise ValueError(
                f"Llama has adapter method {self.adapter.method!r} but no `adapters` collection:"
                " apply({'params': ..., 'adapters': ...}, tokens)."
            )
        if self.adapter is not None:
            given = {name: leaf.shape for name, leaf in flatten(self.variables["adapters"]).items()}
            expected = adapter_shapes(self.config, self.adapter)
            if diff := difference(expected, given):
                raise ValueError(f"the adapters are not those of {self.adapter}:\n{diff}")
            if wrong := [n for n in expected if given[n] != expected[n]]:
                raise ValueError(
                    f"the adapters are not those of {self.adapter}: {wrong[0]} has shape"
                    f" {given[wrong[0]]}, expected {expected[wrong[0]]}."
                )
        if self.adapter is None and present:
            raise ValueError(
                "an `adapters` collection was given to a Llama without an adapter: pass"
                " Llama(config, adapter), or leave the collection out."
            )


def random_model(config: LlamaConfig, key: Array) -> Model:
    """A Model with random weights (normal, std 0.02), float32: for tests, latency (which does not
    depend on values) and training from scratch.
    """
    variables = jax.jit(Llama(config).init)(key, jnp.zeros((1, 1), jnp.int32))
    return Model(config, variables["params"])


def hidden_states(
    llama: Llama, variables: Tree, tokens: Array, valid: Array | None, cache: KVCache | None
) -> tuple[Array, Any]:
    """`Llama.hidden` of `variables`: {"params": ...} and, for a model with an adapter, {"adapters":
    ...}, or {"row_adapters": leaves [B, ...]}: those of each row of the batch
    (`adapters.tasks.rows_of` gathers them). Base products are then still one for the whole batch.
    """
    if "row_adapters" not in variables:
        return llama.apply(variables, tokens, valid, cache, method="hidden")  # type: ignore[return-value]
    given = len(jax.tree.leaves(variables["row_adapters"])[0])
    require(
        given == len(tokens),
        f"row_adapters of {given} rows and tokens of {len(tokens)}: give one for each row, as"
        " `adapters.tasks.rows_of` does.",
    )
    if given == 1:
        only = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), variables["row_adapters"])
        return hidden_states(
            llama, {"params": variables["params"], "adapters": only}, tokens, valid, cache
        )
    # The axis of a cache's rows.
    layers = (
        None
        if cache is None
        else jax.tree.map(lambda _: int(llama.config.scan_layers), cache.layers)
    )
    rows = None if cache is None else KVCache(layers, 0, None)  # type: ignore[arg-type]

    def one(
        adapters: Tree, tokens: Array, valid: Array | None, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        """A batch of one row; its cache has no axis for it."""
        if cache is not None:
            cache = replace(cache, valid=cache.valid[None])
        given = {"params": variables["params"], "adapters": adapters}
        valid = None if valid is None else valid[None]
        x, cache = llama.apply(given, tokens[None], valid, cache, method="hidden")  # type: ignore
        if cache is not None:
            cache = replace(cache, valid=cache.valid[0])
        return x[0], cache

    axes = (0, 0, None if valid is None else 0, rows)
    return jax.vmap(one, in_axes=axes, out_axes=(0, rows))(
        variables["row_adapters"], tokens, valid, cache
    )


def forward(
    model: Model,
    tokens: ArrayLike,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    valid: ArrayLike | None = None,
    row_adapters: Tree | None = None,
) -> Array:
    """Logits [B, T, V] float32 of a model, with adapters if given; compiled once per shape and
    config.

    adapters: of all rows; row_adapters: of each row, leaves [B, ...] (`adapters.tasks.rows_of`).
    Products are exact to the model's dtype on every device (GPUs and TPUs round float32 products to
    fewer bits unless told not to). Raises ConfigError for token ids that the embedding has no row
    for (not of traced tokens, whose values are not known yet).
    """
    if getattr(tokens, "is_fully_addressable", not isinstance(tokens, jax.core.Tracer)):
        check_ids(tokens, model.config.vocab_size, "tokens", model.tokenizer)
    require(
        adapters is None or row_adapters is None,
        "adapters are of all rows, row_adapters of each: give one of them.",
    )
    given = {"adapters": adapters, "row_adapters": row_adapters}
    variables = {
        name: beside(model.params, tree) for name, tree in given.items() if tree is not None
    }
    variables["params"] = model.params
    with mesh_in_use(model.params), jax.default_matmul_precision("highest"):
        return _forward(model.config, adapter, variables, tokens, valid)


@jax.jit(static_argnums=(0, 1))
def _forward(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    tokens: Array,
    valid: Array | None,
) -> Array:
    llama = Llama(config, adapter)
    hidden, _ = hidden_states(llama, variables, tokens, valid, None)
    shared = {name: tree for name, tree in variables.items() if name != "row_adapters"}
    return llama.apply(shared, hidden, method="logits")  # type: ignore[return-value]
