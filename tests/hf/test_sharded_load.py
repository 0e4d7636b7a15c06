"""Loading onto a mesh: each process reads the slices that its devices hold, once, and the model is
the one that a whole load gives.
"""

import jax
import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.models import perturb, tiny_model

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.hf.keys import hf_table, slices_shape
from zflora_jax.hf.load import load_model
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.shards import Shards
from zflora_jax.parallel.sharding import make_mesh, spec


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_load_reads_each_number_once_and_gives_the_same_model(
    scan_layers, tied, tmp_path, monkeypatch
):
    model = tiny_model(num_kv_heads=4, vocab_size=264, tie_word_embeddings=tied)
    save_hf(tmp_path / "model", model)
    (tmp_path / "model" / "zflora.json").unlink()  # a stock directory
    whole = load_model(str(tmp_path / "model"), scan_layers=scan_layers)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    read: list[int] = []
    original = Shards.read

    def counted(self, name, part=None):
        value = original(self, name, part)
        assert part is not None
        read.append(value.size)
        return value

    monkeypatch.setattr(Shards, "read", counted)
    divided = load_model(str(tmp_path / "model"), scan_layers=scan_layers, mesh=mesh)
    assert_trees_equal(divided.params, whole.params)
    # Every slice once, although data=2 holds each twice.
    assert sum(read) == trees.size(whole.params)
    for name, leaf in trees.flatten(divided.params).items():
        assert leaf.sharding.spec == spec(name, leaf.shape, mesh), name
    largest = max(read)
    assert largest <= 264 * 64 // 4  # no tensor was read whole that the mesh divides


@pytest.mark.parametrize("method", ["zflora-minimal", "zflora-uniform", "lora"])
def test_a_sharded_load_of_an_export(method, tmp_path, monkeypatch):
    model, adapter = tiny_model(num_kv_heads=4, vocab_size=264), AdapterConfig(method, rank=8)
    save_hf(
        tmp_path / "out",
        fuse(model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter))),
    )
    whole = load_model(str(tmp_path / "out"))
    read: list[int] = []
    original = Shards.read

    def counted(self, name, part=None):
        value = original(self, name, part)
        read.append(value.size)
        return value

    monkeypatch.setattr(Shards, "read", counted)
    divided = load_model(str(tmp_path / "out"), mesh=make_mesh(MeshConfig(fsdp=4)))
    assert_trees_equal(divided.params, whole.params)
    # Stock form pads and reorders, and still every number is read once.
    # And the channels of the tables behind the base's, which have to be zero.
    behind = whole.config.hidden_size - whole.config.norm_dim
    tables = 1 if whole.config.tie_word_embeddings else 2
    assert sum(read) == trees.size(whole.params) + tables * whole.config.vocab_size * behind
    assert max(read) <= 264 * (64 + 8) // 4
    read.clear()
    stock = load_stock(tmp_path / "out", mesh=make_mesh(MeshConfig(fsdp=4)))
    assert_trees_equal(stock.params, load_stock(tmp_path / "out").params)
    assert max(read[: len(read) // 2]) <= 264 * (64 + 8) // 4


def test_the_block_around_a_part_of_a_tensor():
    """What Hugging Face flattens is widened to whole inner axes; the part is found in it again."""
    for name, place in hf_table(preset("tiny")).items():
        array = np.arange(np.prod(place.shape)).reshape(place.shape)
        stored = place.to_hf(array)
        part = tuple(slice(n // 4, n // 2) for n in place.shape)
        outer, inner = place.block(part)
        block = place.to_native(stored[place.hf_slices(outer)], slices_shape(outer))
        np.testing.assert_array_equal(block[inner], array[part], err_msg=name)
        assert place.in_axes or outer == part, name


def test_parts_that_are_no_block_of_a_tensor_are_refused():
    place = hf_table(tiny_model().config)["model.layers.0.self_attn.q_proj.weight"]
    assert place.hf_slices((slice(8, 16), slice(1, 3), slice(0, 16))) == (
        slice(16, 48),
        slice(8, 16),
    )
    with pytest.raises(ValueError, match="no block of rows and columns"):
        place.hf_slices((slice(0, 64), slice(0, 4), slice(0, 8)))
