"""The contenders of the latency table: the base, LoRA beside it, and fused models, compiled."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.packing import pack_for_decode, packed_config
from zflora_jax.adapters.widths import this_kind
from zflora_jax.bench.timing import Contender
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.inference.generation_config import GREEDY, Sampler
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.nn.llama import Llama
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.mesh import mesh_in_use

BASE, UNMERGED, IDLE = "base", "lora un-merged", "zflora-minimal idle"
FUSED = tuple(method for method in METHODS if method != "full")


def contender(
    model: Model,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    adapter: AdapterConfig | None = None,
    adapters: trees.Tree | None = None,
    sampler: Sampler | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Contender:
    """Compile the decode of a model for 1 and for `new_tokens` tokens.

    Args:
      model: in the layout that is measured, packed or not.
      batch: number of prompts; their tokens are random.
      prompt_length: tokens of a prompt.
      new_tokens: tokens of the longer of the two programs.
      adapter: of `adapters`.
      adapters: computed beside the base; None: the model is a base or fused.
      sampler: None: greedy.
      compiler_options: XLA's.

    Returns:
      The contender. Its extra values are compile_s, seconds for both programs, and memory_mb, the
      weights, cache and other allocations of the longer one (where the backend reports them).
    """
    config = model.config
    tokens = (
        np.random.default_rng(0)
        .integers(0, config.vocab_size, (batch, prompt_length))
        .astype(np.int32)
    )
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    given = (
        variables,
        jnp.asarray(tokens),
        jnp.ones(tokens.shape, bool),
        jax.random.split(jax.random.key(0), batch),
    )
    program = DecodeProgram(config, adapter, sampler or GREEDY)
    options = dict(compiler_options or {})
    start = time.perf_counter()
    with mesh_in_use(model.params):
        compiled = {
            n: DecodeProgram.decode.lower(program, *given, n).compile(options)
            for n in (1, new_tokens)
        }
    extra = {"compile_s": time.perf_counter() - start}
    memory = compiled[new_tokens].memory_analysis()
    if memory is not None:  # not every backend says
        extra["memory_mb"] = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        ) / 1e6

    def generate(count: int) -> object:
        return jax.block_until_ready(compiled[count](*given))

    return Contender(
        generate, read_bytes(variables, config, batch, prompt_length + new_tokens // 2), extra
    )


def read_bytes(variables: trees.Tree, config: LlamaConfig, batch: int, slots: int) -> int:
    """Bytes that one decode step has to read.

    Args:
      variables: "params" and, if there are any, "adapters", as arrays or ShapeDtypeStructs.
      config: of the model.
      batch: number of sequences.
      slots: positions of the cache that are read.

    Returns:
      The bytes of every weight, without an untied embedding (a few rows are looked up), and of the
      keys and values at `slots` positions.
    """
    table = variables["params"]["embed"]["embedding"]
    weights = sum(bytes_of(leaf) for leaf in jax.tree.leaves(variables))
    if not config.tie_word_embeddings:
        weights -= bytes_of(table)
    cache = (
        2
        * batch
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * slots
        * jnp.dtype(config.execution.dtype).itemsize
    )
    return int(weights + cache)


def packed_shapes(config: LlamaConfig) -> trees.Tree:
    """The parameters of a packed model as ShapeDtypeStructs, float32."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes: Any = jax.eval_shape(Llama(config).init, jax.random.key(0), tokens)
    return shapes["params"]  # type: ignore[no-any-return]


def random_packed(
    config: LlamaConfig, dtype: str, adapter: AdapterConfig | None = None, seed: int = 0
) -> Model:
    """Make a packed model with random weights, for which latency is the same as for trained ones.

    Args:
      config: the shape.
      dtype: in which the weights are drawn, so no float32 copy has to fit.
      adapter: that `config` is fused from; None for a base.
      seed: of the weights.
    """
    config = packed_config(config.replace(dtype=dtype), this_kind(), adapter)
    shapes = packed_shapes(config)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))
    return Model(
        config,
        jax.tree.map(
            lambda s: 0.02 * jax.random.normal(next(keys), s.shape, jnp.dtype(dtype)), shapes
        ),
    )


def contenders(
    source: Model | LlamaConfig,
    base: Model,
    rank: int,
    methods: Sequence[str],
    shape: tuple[int, int, int],
) -> dict[str, Contender]:
    """Make the contenders of one case: the base, LoRA beside it, and each method fused.

    A merge by addition (lora, ffa) keeps the base's shapes, so the base decodes again under those
    labels, which shows the noise. "Idle" is a zflora-minimal model whose blocks are zero.

    Args:
      source: a base model, or a shape for random weights.
      base: the base, packed.
      rank: of every adapter.
      methods: of `FUSED`.
      shape: (batch, prompt_length, new_tokens).

    Returns:
      Label -> contender.
    """
    lora = AdapterConfig("lora", rank=rank)
    config = base.config.replace(packed=False, scan_layers=True)
    beside = trees.unstack_layers(
        init_adapters(jax.random.key(1), Model(config, {}), lora), config.num_layers
    )
    beside = jax.tree.map(lambda leaf: leaf.astype(config.execution.dtype), beside)
    found = {BASE: contender(base, *shape), UNMERGED: contender(base, *shape, lora, beside)}
    for method in methods:
        adapter = AdapterConfig(method, rank=rank)
        if not METHODS[method].widens:
            found[f"{method} merged"] = found[BASE]
            continue
        found[method] = contender(_fused(source, adapter, base.config.execution.dtype, 1.0), *shape)
        if method == "zflora-minimal":
            zero = isinstance(source, Model)
            found[IDLE] = (
                contender(_fused(source, adapter, base.config.execution.dtype, 0.0), *shape)
                if zero
                else found[method]
            )
    return found


def _fused(source: Model | LlamaConfig, adapter: AdapterConfig, dtype: str, scale: float) -> Model:
    if isinstance(source, LlamaConfig):
        return random_packed(fused_config(source, adapter), dtype, adapter)
    adapters = jax.tree.map(
        lambda leaf: scale * jnp.ones_like(leaf), init_adapters(jax.random.key(1), source, adapter)
    )
    return pack_for_decode(fuse(source, adapter, adapters))
