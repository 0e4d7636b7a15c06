"""The table of Hugging Face names covers the native tree, its layouts are inverses, and blocks of
its tensors are found; loading onto a mesh reads each value once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.exports import fused_model, tiny_family
from support.models import tiny_model

from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.hf.keys import hf_shapes, hf_table, slices_shape
from zflora_jax.hf.load import load_model
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.shards import Shards
from zflora_jax.parallel.sharding import make_mesh, spec


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_table_covers_the_native_tree(family: str, scan_layers: bool) -> None:
    config = tiny_family(family, tie_word_embeddings=False, head_dim=6).config
    config = config.replace(num_layers=3, scan_layers=scan_layers)
    table = hf_table(config)
    assert {place.leaf for place in table.values()} == set(param_shapes(config))
    rng, stored = np.random.default_rng(0), {}
    native = {name: rng.normal(size=place.shape) for name, place in table.items()}
    for name, place in table.items():
        rows = place.to_hf(native[name])
        assert rows.shape == place.hf_shape
        np.testing.assert_array_equal(place.to_native(rows), native[name])
        before = stored.get(place.tensor, rows[:0])
        assert len(before) == place.row
        stored[place.tensor] = np.concatenate([before, rows])
    assert {name: x.shape for name, x in stored.items()} == hf_shapes(table)
    # Axes that Hugging Face flattens are widened to whole inner ones; the part is found in them.
    for name, place in table.items():
        part = tuple(slice(n // 4, n // 2) for n in place.shape)
        outer, inner = place.block(part)
        rows = stored[place.tensor][place.hf_slices(outer)]
        block = place.to_native(rows, slices_shape(outer))
        np.testing.assert_array_equal(block[inner], native[name][part], err_msg=name)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all blocks that are read."""
    sizes: list[int] = []
    original = Shards.read

    def counted(self: Any, name: str, part: Any = None) -> np.ndarray:
        value = original(self, name, part)
        sizes.append(value.size)
        return value

    monkeypatch.setattr(Shards, "read", counted)
    return sizes


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(("tied", "family"), [(True, "phi3"), (False, "llama")])
def test_a_sharded_load_reads_each_value_once(
    scan_layers: bool, tied: bool, family: str, tmp_path: Path, read: list[int]
) -> None:
    settings = {"num_kv_heads": 4, "vocab_size": 264, "tie_word_embeddings": tied}
    save_hf(tmp_path / "model", tiny_family(family, **settings))
    (tmp_path / "model" / "zflora.json").unlink()  # a stock directory
    whole = load_model(tmp_path / "model", scan_layers=scan_layers)
    read.clear()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    divided = load_model(tmp_path / "model", scan_layers=scan_layers, mesh=mesh)
    assert_trees_equal(divided.params, whole.params)
    assert sum(read) == trees.size(whole.params)  # although data=2 holds each twice
    for name, leaf in trees.flatten(divided.params).items():
        assert leaf.sharding.spec == spec(name, leaf.shape, mesh), name
    assert max(read) <= 264 * 64 // 4  # no tensor was read whole that the mesh divides


@pytest.mark.parametrize("method", ["zflora-minimal", "zflora-uniform", "lora"])
def test_a_sharded_load_of_an_export(method: str, tmp_path: Path, read: list[int]) -> None:
    """Stock form pads and reorders, and still every value is read once."""
    base: Model = tiny_model(num_kv_heads=4, vocab_size=264)
    save_hf(tmp_path / "out", fused_model(base, AdapterConfig(method, rank=8)))
    whole = load_model(tmp_path / "out")
    read.clear()
    mesh = make_mesh(MeshConfig(fsdp=4))
    divided = load_model(tmp_path / "out", mesh=mesh)
    assert_trees_equal(divided.params, whole.params)
    # And the table's channels behind the base's, which have to be zero.
    behind = whole.config.hidden_size - whole.config.norm_dim
    assert sum(read) == trees.size(whole.params) + whole.config.vocab_size * behind
    assert max(read) <= 264 * (64 + 8) // 4
    read.clear()
    stock = load_stock(tmp_path / "out", mesh=mesh)
    assert max(read) <= 264 * (64 + 8) // 4
    assert_trees_equal(stock.params, load_stock(tmp_path / "out").params)
