"""Tiny models of every kind of quantised kernel."""

from __future__ import annotations

import jax

from support.models import perturb, tiny_model
from zflora_jax import AdapterConfig, Model, init_adapters, quantize_model
from zflora_jax.core import trees
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.ops.quantized import KINDS

# Widths that are no multiple of a group, of extra inputs of every stream.
WIDENED = {
    "ffba": AdapterConfig("ffba", rank=6, alpha=9.0, extra_head_dim=16, extra_mlp_units=10),
    "zflora-minimal": AdapterConfig("zflora-minimal", rank=6, alpha=9.0, extra_mlp_units=10),
    "zflora-uniform": AdapterConfig(
        "zflora-uniform", rank=6, alpha=9.0, extra_head_dim=16, extra_mlp_units=10
    ),
    "values only": AdapterConfig("zflora-uniform", rank=6, alpha=9.0, head_scores=False),
}


def how(kind: str, group: int | None = None, **more: str) -> QuantizeConfig:
    """Kernels of `kind`, in groups that a tiny model's inputs divide into."""
    own = KINDS[kind].groups[0] if group is None else group
    return QuantizeConfig(kind, group=None if kind.startswith("q") else own, **more)


def quantized_tiny(kind: str, group: int | None = None, **changes: object) -> Model:
    """A tiny model of one layer, its embedding of the same kind as its kernels."""
    model = tiny_model(**({"head_dim": 32, "num_layers": 1} | changes))
    return quantize_model(model, how(kind, group, embedding=kind))


def moved(model: Model, adapter: AdapterConfig, seed: int = 1) -> trees.Tree:
    """Adapters that are not zero anywhere."""
    return perturb(init_adapters(jax.random.key(0), model, adapter), seed)
