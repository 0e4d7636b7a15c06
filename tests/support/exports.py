"""Fused models of every form, to be exported."""

from __future__ import annotations

from pathlib import Path

import jax

from support.huggingface import LLAMA3, hf_model
from support.models import perturb
from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.hf.load import load_model

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


def fused_model(base: Model, adapter: AdapterConfig) -> Model:
    """Fused with every adapter leaf perturbed, so that no block is zero."""
    return fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter), std=0.05))


def saved_bases(folder: Path) -> dict[str, Model]:
    """ "plain": untied, GQA; "llama3": tied, Llama-3 RoPE scaling, head_dim other than d/H."""
    models = {}
    for name, changes in {
        "plain": {},
        "llama3": {"rope": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    }.items():
        path = folder / name
        hf_model(**changes).save_pretrained(path)
        models[name] = load_model(path)
    return models
