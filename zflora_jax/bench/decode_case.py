"""A token loop to compile for a device that is absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.packing import pack_for_decode, packed_config
from zflora_jax.adapters.packing_quantized import group_multiple
from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.bench.contenders import packed_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.nn.quantize_model import quantized_shapes
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.sharding import AXES
from zflora_jax.parallel.targets import Target

KINDS = {"cuda": "gpu", "tpu": "tpu"}  # of `adapters.widths`, by the platform of a target
DTYPE = "bfloat16"


@dataclass(frozen=True)
class DecodeCase:
    """One token loop to compile, on one device.

    Attributes:
      config: of the base.
      adapter: None for the base alone.
      batch: rows.
      prompt: tokens of each prompt.
      new_tokens: generated after it.
      quantize: how the base is stored; None: as numbers.

    LoRA runs beside the base; the methods that widen are fused and packed.
    """

    config: LlamaConfig
    adapter: AdapterConfig | None = None
    batch: int = 1
    prompt: int = 128
    new_tokens: int = 128
    quantize: QuantizeConfig | None = None

    @property
    def beside(self) -> AdapterConfig | None:
        """The adapter that runs beside the base; None where it is fused."""
        return None if self.adapter is None or METHODS[self.adapter.method].widens else self.adapter

    def packed(self, where: Target) -> LlamaConfig:
        """The config of the packed model for a target."""
        fused = None if self.beside else self.adapter
        config = fused_config(self.config, fused) if fused else self.config
        config, kind = config.replace(dtype=DTYPE), KINDS[where.platform]
        return packed_config(config, kind, fused, group_multiple(self._base()))

    def _base(self) -> trees.Tree:
        """The base as ShapeDtypeStructs, stacked, as it is stored."""
        config = self.config.replace(scan_layers=True)
        shapes = param_shapes(config).items()
        leaves = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(DTYPE)) for name, shape in shapes}
        return quantized_shapes(config, self.quantize or QuantizeConfig(), trees.unflatten(leaves))

    def _quantized(self, where: Target) -> trees.Tree:
        """The packed parameters of a quantised base, fused with the adapter if that is fused."""
        config = self.config.replace(scan_layers=True, dtype=DTYPE)
        fused = None if self.beside else self.adapter
        shapes = adapter_shapes(config, fused) if fused else {}
        blocks = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

        def packed(base: trees.Tree, adapters: trees.Tree) -> trees.Tree:
            model = Model(config, base)
            model = fuse(model, fused, adapters) if fused else model
            return pack_for_decode(model, KINDS[where.platform]).params

        return jax.eval_shape(packed, self._base(), trees.unflatten(blocks))

    def variables(self, where: Target) -> trees.Tree:
        """The model's parameters, and adapters beside it, as ShapeDtypeStructs in `DTYPE`."""
        found = {
            "params": self._quantized(where)
            if self.quantize
            else _cast(packed_shapes(self.packed(where)))
        }
        if self.beside:
            shapes = adapter_shapes(self.config.replace(scan_layers=False), self.beside)
            leaves = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
            found["adapters"] = _cast(trees.unflatten(leaves))
        return found

    def compile(self, where: Target) -> Any:
        """Compile prefill and token loop for the first device of a target."""
        device = np.asarray(where.devices()[:1]).reshape(1, 1, 1)
        mesh = Mesh(device, AXES, axis_types=(AxisType.Auto,) * 3)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))
        shape = (self.batch, self.prompt)
        given = (
            self.variables(where),
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, bool),
            keys,
        )
        here = NamedSharding(mesh, P())
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), given
        )
        program = DecodeProgram(self.packed(where), self.beside)
        with jax.set_mesh(mesh), no_compile_cache():
            return DecodeProgram.decode.lower(program, *placed, self.new_tokens).compile()


def _cast(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(DTYPE)), tree)
