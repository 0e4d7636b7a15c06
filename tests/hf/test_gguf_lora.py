"""save_gguf_lora: the products that llama.cpp adds to a base's tensors are the adapter's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.grids import pairwise
from support.models import perturb, tiny_model
from support.runs import small_run

from zflora_jax import AdapterConfig, fuse, init_adapters
from zflora_jax.cli.main import main
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model import Model
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.train import train
from zflora_jax.hf.gguf_form import gguf_form
from zflora_jax.hf.gguf_lora import save_gguf_lora
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf


def adapters_of(model: Model, adapter: AdapterConfig) -> Any:
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    layers = adapter.layers_to_transform or range(model.config.num_layers)
    live = np.isin(np.arange(model.config.num_layers), layers).astype(np.float32)
    return jax.tree.map(lambda x: np.asarray(x) * live.reshape(-1, *[1] * (x.ndim - 1)), adapters)


SETTINGS: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 12.0},
    {"rank": 4, "targets": "attention"},
    {"alpha": 8.0, "use_rslora": True, "rank_pattern": {"q": 2}, "alpha_pattern": {"up": 3.0}},
    {"rank": 4, "layers_to_transform": (1,)},
]


@pytest.mark.parametrize(
    ("family", "settings"),
    pairwise(["llama", "qwen3"], SETTINGS),
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_bases_plus_products_are_the_merged_model(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """As llama.cpp has it: W + alpha / rank B A, rows of q and k in its order."""
    model, adapter = tiny_model(family=family), AdapterConfig("lora", **settings)
    adapters = adapters_of(model, adapter)
    report = save_gguf_lora(tmp_path / "x.gguf", model, adapter, adapters)
    file = GGUFFile(tmp_path / "x.gguf")
    base = dict(gguf_form(model, "float32").tensors(model))
    merged = dict(gguf_form(model, "float32").tensors(fuse(model, adapter, adapters)))
    alpha, changed = file.get("adapter.lora.alpha"), 0
    for name, array in base.items():
        if a := file.tensors.get(f"{name}.lora_a"):
            b = file.dequantised(file.tensors[f"{name}.lora_b"])
            array = array + alpha / b.shape[1] * (b @ file.dequantised(a))
            changed += 2
        np.testing.assert_allclose(array, merged[name], atol=2e-5 * np.abs(array).max())
    assert changed == len(file.tensors) == report["tensors"] > 0
    assert file.get("general.type") == "adapter" and file.get("adapter.type") == "lora"
    assert file.get("general.architecture") == family


def test_what_llama_cpp_does_not_add_is_refused(tmp_path: Path) -> None:
    for settings, changes, words in (
        ({"use_dora": True}, {}, "DoRA has no form beside a base.*--format gguf"),
        ({"method": "ffa"}, {}, "method 'ffa' has no form"),
        ({}, {"hidden_size": 72}, r"wider streams than the adapters \(hidden 72 -> 96\)"),
    ):
        model = tiny_model(**changes)
        adapter = AdapterConfig(**({"method": "lora", "rank": 4} | settings))
        with pytest.raises(ConfigError, match=words):
            save_gguf_lora(tmp_path / "x.gguf", model, adapter, adapters_of(model, adapter))
    model, adapter = tiny_model(), AdapterConfig("lora", rank=4)
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        save_gguf_lora(tmp_path / "x", model, adapter, adapters_of(model, adapter))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    with pytest.raises(CheckpointError, match="no GGUF file that this project wrote"):
        save_gguf_lora(tmp_path / "other.gguf", model, adapter, adapters_of(model, adapter))


def test_a_run_is_exported_beside_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(max_position_embeddings=512)
    model.params = jax.tree.map(lambda x: x / 4, model.params)
    model.tokenizer = byte_tokenizer()
    save_hf(tmp_path / "base", model)
    changes = {"adapter.method": "lora", "train.steps": 4}
    train(override(small_run(str(tmp_path / "base")), changes), tmp_path / "run", console=False)
    out = tmp_path / "x.gguf"
    command = ["export", "--workdir", str(tmp_path / "run"), "--out", str(out)]
    assert main([*command, "--format", "gguf-lora"]) == 0
    assert "tensors" in capsys.readouterr().out and GGUFFile(out).get("zflora.method") == "lora"
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        export_run(tmp_path / "run", tmp_path / "folder", format="gguf-lora")
    with pytest.raises(ConfigError, match=r"holds an adapter for llama\.cpp"):
        load_model(out)
