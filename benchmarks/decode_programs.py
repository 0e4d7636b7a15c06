"""The token loop of a model compiled for devices that are absent: kernels, copies, memory, cycles.

Nothing runs: shapes are compiled, and the compiled text is read (`program_text`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from program_text import Program, async_bytes, kernels

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.methods import adapter_shapes, fused_config
from zflora_jax.adapters.packing import group_multiple, pack_for_decode, packed_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.nn.kv_cache import cache_slots, init_cache
from zflora_jax.nn.llama import Llama
from zflora_jax.nn.quantize_model import quantized_shapes
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.sharding import AXES
from zflora_jax.parallel.targets import Target

KINDS = {"cuda": "gpu", "tpu": "tpu"}  # platform of a target -> key of `adapters.widths`
DTYPE = "bfloat16"


@dataclass(frozen=True)
class DecodeCase:
    """One token loop to compile, on one device.

    LoRA runs unmerged; the methods that widen are fused and packed.

    Attributes:
      config: The base's config.
      adapter: The adapter; None for the base.
      batch: Number of rows.
      prompt: Tokens of each prompt.
      new_tokens: Tokens generated after it.
      quantize: How the base is quantised; None: float weights.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    batch: int = 1
    prompt: int = 128
    new_tokens: int = 128
    quantize: QuantizeConfig | None = None

    @property
    def unmerged(self) -> AdapterConfig | None:
        """The adapter, if it runs unmerged."""
        return None if self.adapter is None or METHODS[self.adapter.method].widens else self.adapter

    @property
    def fused(self) -> AdapterConfig | None:
        """The adapter, if it is fused."""
        return None if self.unmerged else self.adapter

    def packed(self, where: Target) -> LlamaConfig:
        """Returns the config of the packed model for a target."""
        config = fused_config(self.config, self.fused) if self.fused else self.config
        config, kind = config.replace(dtype=DTYPE), KINDS[where.platform]
        return packed_config(config, kind, self.fused, group_multiple(self._base(), kind))

    def _base(self) -> trees.Tree:
        """The stacked base as ShapeDtypeStructs, quantised if it is."""
        config = self.config.replace(scan_layers=True)
        base = _shapes(param_shapes(config), DTYPE)
        return quantized_shapes(config, self.quantize or QuantizeConfig(), base)

    def _quantized(self, where: Target) -> trees.Tree:
        """The packed parameters of a quantised base, fused with the adapter if that is fused."""
        config = self.config.replace(scan_layers=True, dtype=DTYPE)
        blocks = _shapes(adapter_shapes(config, self.fused) if self.fused else {}, "float32")

        def packed(base: trees.Tree, adapters: trees.Tree) -> trees.Tree:
            model = Model(config, base)
            model = fuse(model, self.fused, adapters) if self.fused else model
            return pack_for_decode(model, KINDS[where.platform]).params

        return jax.eval_shape(packed, self._base(), blocks)

    def variables(self, where: Target) -> trees.Tree:
        """Returns the model's parameters, and unmerged adapters, as ShapeDtypeStructs."""
        if self.quantize:
            params = self._quantized(where)
        else:
            model, tokens = Llama(self.packed(where)), jnp.zeros((1, 1), jnp.int32)
            made: Any = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
            params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPE), made)
        if not self.unmerged:
            return {"params": params}
        config = self.config.replace(scan_layers=False)
        return {"params": params, "adapters": _shapes(adapter_shapes(config, self.unmerged), DTYPE)}

    def compile(self, where: Target) -> Any:
        """Compiles prefill and token loop for the first device of a target."""
        device = np.asarray(where.devices()[:1]).reshape(1, 1, 1)
        mesh = Mesh(device, AXES, axis_types=(AxisType.Auto,) * 3)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        shape, here = (self.batch, self.prompt), NamedSharding(mesh, P())
        prompts = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool)]
        given = (self.variables(where), *prompts, keys)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        placed = jax.tree.map(place, given)
        program = DecodeProgram(self.packed(where), self.unmerged)
        with jax.set_mesh(mesh), no_compile_cache():
            return DecodeProgram.decode.lower(program, *placed, self.new_tokens).compile()


def _shapes(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> trees.Tree:
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}
    return trees.unflatten(leaves)


def loop_row(case: DecodeCase, where: Target) -> dict[str, Any]:
    """Compiles a case and reads its token loop.

    Returns:
      kernels: Operations of a token that run a kernel (on a TPU, a bundle of instructions).
      copies: Those of them that rewrite a whole kernel, table or cache.
      call_copies: The same for the rest of the program, which runs once per call.
      arguments, temporaries: Bytes that the compiler plans for the whole program.
      read_bytes: Bytes that a token has to read, with a half-filled cache.
      cycles, async_bytes (TPU): The compiler's estimate of a token's cycles, and the bytes of
        copies that it starts ahead, which the estimate leaves out.
      floor_share (TPU): Those cycles, plus the bytes at the published bandwidth, over the time to
        read read_bytes.
      prefill_cycles, prefill_share (TPU): The same for the rest of the program, over the time to
        read the layers or, if that is longer, to multiply the prompts by them at the published
        rate, and to read the head.
    """
    compiled, variables = case.compile(where), case.variables(where)
    program, memory, chip = Program(compiled.as_text()), compiled.memory_analysis(), where.chip
    loop = program.loop("decode_until)/while")
    config = case.packed(where)
    slots = cache_slots(case.prompt + case.new_tokens)
    cache = jax.eval_shape(lambda: init_cache(config, case.batch, slots, case.unmerged))
    # A quantised leaf has the shape of its floats, which a dequantised kernel would have.
    leaves = trees.flatten(variables["params"]).values()
    matrices = [x.shape for x in leaves if len(x.shape) > 1]
    in_loop = {op.name for op in loop}
    rest = [(op, times) for op, times in program.runs() if op.name not in in_loop]
    once = [op for op, _ in rest]
    caches = [x.shape for x in jax.tree.leaves(cache.layers)]
    row: dict[str, Any] = {
        "kernels": len(kernels(loop)),
        "copies": len(program.whole_copies(loop, matrices, caches)),
        "call_copies": len(program.whole_copies(once, [], [*matrices, *caches])),
        "arguments": int(memory.argument_size_in_bytes),
        "temporaries": int(memory.temp_size_in_bytes),
        "read_bytes": read_bytes(variables, config, case.batch, case.prompt + case.new_tokens // 2),
    }
    if chip.clock:
        row["cycles"] = sum(op.cycles for op in kernels(loop))
        row["async_bytes"] = async_bytes(loop)
        per_byte = chip.clock / chip.bandwidth
        spent = row["cycles"] + row["async_bytes"] * per_byte
        row["floor_share"] = spent / (row["read_bytes"] * per_byte)
        row["prefill_cycles"] = sum(times * op.cycles for op, times in rest if kernels([op]))
        layers = [x for name, x in variables["params"].items() if name.startswith("layers_")]
        weights = sum(x.size for x in jax.tree.leaves(layers))
        operations = 2 * weights * case.batch * case.prompt
        head = read_bytes(variables, config, case.batch, 0) - 2 * weights  # for the last position
        least = max(2 * weights / chip.bandwidth, operations / chip.flops) + head / chip.bandwidth
        row["prefill_share"] = (row["prefill_cycles"] + async_bytes(once) * per_byte) / (
            least * chip.clock
        )
    return row


def read_bytes(variables: trees.Tree, config: LlamaConfig, batch: int, slots: int) -> int:
    """Returns the bytes that one decode step has to read.

    Args:
      variables: "params" and, if there are any, "adapters", as arrays or ShapeDtypeStructs.
      config: The model's config.
      batch: Number of sequences.
      slots: Positions of the cache that are read.

    Returns:
      The bytes of every weight, without an untied embedding (a few rows are looked up), and of the
      keys and values at `slots` positions.
    """
    table = variables["params"]["embed"]["embedding"]
    weights = sum(bytes_of(leaf) for leaf in jax.tree.leaves(variables))
    if not config.tie_word_embeddings:
        weights -= bytes_of(table)
    width = config.num_kv_heads * config.head_dim * jnp.dtype(config.execution.dtype).itemsize
    return int(weights + 2 * batch * slots * config.num_layers * width)
