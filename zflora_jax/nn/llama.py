"""The forward of all families: one for base, adapted, fused and packed trees, with or without a
key/value cache.

Shapes in names: B batch, T tokens, S cache slots, d residual width, V vocabulary; r the channels
that an adapter adds to d.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from zflora_jax.adapters.methods import check_collection, resolve_adapter
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree
from zflora_jax.nn.blocks import Block, Context, positions_and_mask
from zflora_jax.nn.kv_cache import KVCache
from zflora_jax.nn.layers import Channels, Embed, Head, RMSNorm
from zflora_jax.ops.linear import Array
from zflora_jax.ops.remat import POLICIES
from zflora_jax.ops.rope import rope_tables
from zflora_jax.parallel.mesh import has_values_here, mesh_in_use, place_like
from zflora_jax.parallel.sharding import batch_shards, divide_embeddings


class Llama(nn.Module):
    """A Llama-style decoder, of any of `core.families.FAMILIES`.

    Attributes:
      config: Shape and execution.
      adapter: Config of the `adapters` collection; None for a base, fused or packed tree.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None

    def setup(self) -> None:
        c, execution, adapter = self.config.stored, self.config.execution, self.adapter
        if execution.packed and adapter is not None:
            require(
                METHODS[adapter.method].in_place != "full",
                "method 'full' replaces kernels, which decode packs: use zf.fuse(model, adapter,"
                " adapters) first.",
            )
            reads = adapter.use_dora or METHODS[adapter.method].kernel
            require(not reads, "Adapters that read the kernels need unpacked ones.")
            wide = c.widened or execution.fill_mlp
            require(not wide, "Adapters need the unpacked fused model.")
        self.embed = Embed(c)
        policy = POLICIES[execution.remat]
        block: Any = nn.remat(Block, prevent_cse=not execution.scan_layers, policy=policy)
        if execution.scan_layers:
            self.layers = nn.scan(
                block,
                {"params": 0, "adapters": 0},
                split_rngs={"params": True, "dropout": True},  # each layer draws for itself
                in_axes=(0, 0, nn.broadcast),
                out_axes=0,
                check_constancy_invariants=False,  # else the layer is traced twice
                length=c.num_layers,
            )(c, adapter)
        else:
            self.layers = [block(c, adapter) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.hidden_size, c.base_width, c.rms_norm_eps, execution.packed)
        if not c.tie_word_embeddings:
            self.lm_head = Head(c)

    def __call__(
        self,
        tokens: Array,
        padding_mask: Array | None = None,
        cache: KVCache | None = None,
        segment_ids: Array | None = None,
    ) -> Any:
        """Computes the logits of tokens.

        Args:
          tokens: Token ids [B, T] int32.
          padding_mask: [B, T] bool, True at real tokens, False at padding (left or right); None if
            all are real. Padding is never attended to and takes no position.
          cache: Keys and values of earlier positions. The T tokens go to its slots index .. index +
            T - 1 and attend to all valid slots before them.
          segment_ids: Segments of packed rows, [B, T] int32, in place of padding_mask. Each id is
            one run of tokens (0: padding) that attend to each other; positions start at 0 in it.

        Returns:
          Logits [B, T, V] float32; with a cache, (logits, updated cache).
        """
        x, cache = self.hidden(tokens, padding_mask, cache, segment_ids)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def hidden(
        self,
        tokens: Array,
        padding_mask: Array | None = None,
        cache: KVCache | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Returns hidden states after the final norm, [B, T, d of the base] in the activation
        dtype, and the updated cache (None without one). Its arguments are those of a call.
        """
        if not self.is_initializing():
            check_collection(self.config, self.adapter, self.variables.get("adapters"))
        positions, mask, slots = positions_and_mask(tokens.shape, padding_mask, segment_ids, cache)
        mask = mask.within(self.config.sliding_window, slots.shape[1])
        cos, sin = rope_tables(self.config, positions, slots.shape[1])
        # Outside a scan, XLA would gather all kernels of a fused model ahead of the first layer.
        rows = cache is None and (self.config.execution.scan_layers or self.adapter is not None)
        rows = rows and len(tokens) % batch_shards() == 0
        context = Context(cos, sin, mask, None if cache is None else cache.index, rows)
        x = divide_embeddings(self.embed(tokens), rows=rows)
        width = resolve_adapter(self.config, self.adapter).residual
        carry: Channels = (x, jnp.zeros((*x.shape[:2], width), x.dtype) if width else None)
        carry, layers = self._run_layers(carry, None if cache is None else cache.layers, context)
        x = self.final_norm(*carry)[0][..., : self.config.base_width]  # the head reads no state
        if cache is None:
            return x, None
        return x, KVCache(layers, slots, cache.index + tokens.shape[1])

    def logits(self, x: Array) -> Array:
        """Hidden states [B, T, d] -> logits [B, T, V] float32."""
        return self.embed.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def _run_layers(self, carry: Channels, caches: Any, context: Context) -> tuple[Channels, Any]:
        c = self.config
        use_rope = jnp.asarray([i not in c.nope_layers for i in range(c.num_layers)])
        if c.execution.scan_layers:
            return self.layers(carry, caches, use_rope if c.nope_layers else None, context)
        updated = []
        for i, layer in enumerate(self.layers):
            here = use_rope[i] if i in c.nope_layers else None
            carry, cache = layer(carry, None if caches is None else caches[i], here, context)
            updated.append(cache)
        return carry, updated


def random_model(config: LlamaConfig, key: Array) -> Model:
    """A Model of random float32 kernels, standard deviation 0.02, for tests, latency and training
    from scratch.

    Args:
      config: Shape of the model.
      key: A jax random key.
    """
    variables = jax.jit(Llama(config).init)(key, jnp.zeros((1, 1), jnp.int32))
    return Model(config, variables["params"])


def forward(
    model: Model,
    tokens: ArrayLike,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    padding_mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> Array:
    """Computes logits [B, T, V] float32 of a model, with adapters if given. It is compiled once per
    shape and config.

    Products are exact to the model's dtype on every device (by default GPUs and TPUs round float32
    products to fewer bits).

    Args:
      model: Base, fused or packed model.
      tokens: Token ids [B, T] int32.
      adapter: Config of `adapters`.
      adapters: Parameters of an unmerged adapter.
      padding_mask: [B, T] bool, True at real tokens.
      segment_ids: [B, T] int32, see `Llama.__call__`.

    Raises:
      ConfigError: tokens have another shape, or ids without a row in the embedding (traced tokens
        are not checked).
    """
    # Lists become arrays; traced values stay as they are.
    arrays: Any = tokens, padding_mask, segment_ids
    ids, padding_mask, segment_ids = (
        x if x is None or hasattr(x, "shape") else np.asarray(x) for x in arrays
    )
    require(
        len(ids.shape) == 2 and ids.shape[1] > 0,
        f"tokens of shape {ids.shape}: must be [B, T], at least one in each row.",
    )
    if has_values_here(ids):
        check_ids(ids, model.config.vocab_size, "tokens", model.tokenizer)
    variables = {"params": model.params}
    if adapters is not None:
        variables["adapters"] = place_like(model.params, adapters)
    with mesh_in_use(model.params), jax.default_matmul_precision("highest"):
        return _forward(model.config, adapter, variables, ids, padding_mask, segment_ids)


@jax.jit(static_argnums=(0, 1))
def _forward(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    tokens: Array,
    padding_mask: Array | None,
    segment_ids: Array | None,
) -> Array:
    logits: Any = Llama(config, adapter).apply(variables, tokens, padding_mask, None, segment_ids)
    return logits
