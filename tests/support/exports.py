"""Fused models of every form, to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from support.huggingface import LLAMA3, hf_model
from support.models import perturb, tiny_model
from zflora_jax import Model, fuse, init_adapters, load_model
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.families import FAMILIES

WIDENED = {
    name: AdapterConfig(
        name,
        rank=4,
        extra_head_dim=8 if row.heads else None,
        extra_mlp_units=6 if row.mlp else None,
    )
    for name, row in METHODS.items()
    if row.widens
} | {
    # 48 + 5 is no multiple of 4 heads: padded to 56.
    "zflora-minimal": AdapterConfig("zflora-minimal", rank=5, extra_mlp_units=6),
    "zflora-uniform": AdapterConfig("zflora-uniform", rank=8, extra_head_dim=4, extra_mlp_units=6),
    "zflora-uniform, values only": AdapterConfig(
        "zflora-uniform", rank=4, extra_head_dim=4, extra_mlp_units=6, head_scores=False
    ),
    "attention only": AdapterConfig(
        "zflora-uniform", rank=4, extra_head_dim=8, targets="attention"
    ),
}


def perturbed_adapters(base: Model, adapter: AdapterConfig, std: float = 0.05) -> trees.Tree:
    """Adapters with every leaf perturbed, so that no block is zero."""
    return perturb(init_adapters(jax.random.key(0), base, adapter), std=std)


def fused_model(base: Model, adapter: AdapterConfig) -> Model:
    """`base` fused with `perturbed_adapters`."""
    return fuse(base, adapter, perturbed_adapters(base, adapter))


def tiny_family(family: str, **changes: Any) -> Model:
    """A tiny model with all traits of its family."""
    traits = FAMILIES[family]
    window, nope = 5 if traits.window else None, (1,) if traits.nope else ()
    own = {"family": family, "rms_norm_eps": 1e-6, "sliding_window": window, "nope_layers": nope}
    return tiny_model(**(own | changes))


def saved_bases(folder: Path) -> dict[str, Model]:
    """ "plain": untied, GQA; "llama3": tied, Llama-3 RoPE scaling, head_dim other than d/H."""
    models = {}
    for name, changes in {
        "plain": {},
        "llama3": {
            "rope": LLAMA3 | {"rope_theta": 500_000.0},
            "tie_word_embeddings": True,
            "head_dim": 16,
        },
    }.items():
        path = folder / name
        hf_model(**changes).save_pretrained(path)
        models[name] = load_model(path)
    return models
