"""A tiny model on one device and divided over a mesh."""

from __future__ import annotations

import dataclasses

import jax

from support.byte_tokenizer import byte_tokenizer
from support.models import perturb, tiny_model
from zflora_jax.adapters.init import init_adapters
from zflora_jax.config import AdapterConfig, MeshConfig
from zflora_jax.core import trees
from zflora_jax.parallel.sharding import make_mesh, shard

MESH = MeshConfig(fsdp=2, tensor=2)
PROMPTS = [[5, 9, 77, 30, 2, 61], [8, 200, 31], [100, 101, 102, 103, 7]]


def model_for_meshes(**changes):
    """A tiny model whose every width 4 divides, of answers that vary."""
    changes = {"num_layers": 2} | changes
    model = tiny_model(
        num_heads=4,
        num_kv_heads=4,
        vocab_size=264,
        tie_word_embeddings=False,
        max_position_embeddings=768,
        **changes,
    )
    model.tokenizer = byte_tokenizer()
    return model


def adapter_of(method):
    """Widths that 2 and 4 divide beside the base's."""
    return AdapterConfig(method, rank=8, alpha=12.0, extra_mlp_units=8 if "zf" in method else None)


def both(method, mesh_config=MESH, **changes):
    """(adapter, base, adapters) on one device, and the same two on a mesh."""
    model, adapter = model_for_meshes(**changes), adapter_of(method)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter), std=0.05)
    mesh = make_mesh(mesh_config)
    divided = dataclasses.replace(model, params=shard(model.params, mesh))
    return adapter, (model, adapters), (divided, shard(adapters, mesh))


def assert_divided(params, parts=4):
    """Every device holds one of `parts` parts of every kernel and table."""
    for name, leaf in trees.flatten(params).items():
        if not name.endswith("scale"):
            sizes = {shard.data.size for shard in leaf.addressable_shards}
            assert sizes == {leaf.size // parts}, (name, leaf.shape, leaf.sharding)
