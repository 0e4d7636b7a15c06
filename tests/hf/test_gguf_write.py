"""save_gguf: the file's function is the model's, its values are the type's nearest, and nothing is
padded, left out or replaced in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from support.checks import assert_logits_close
from support.gguf_files import empty_file
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax import AdapterConfig, Model, forward, fuse, init_adapters, load_model, save_gguf
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model_config import RopeScaling
from zflora_jax.hf import stock
from zflora_jax.hf.gguf import write
from zflora_jax.hf.gguf.file import QUANTS, GGUFFile
from zflora_jax.hf.gguf.write import gguf_form
from zflora_jax.nn.llama import random_model

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


def fused_by(method: str, rank: int = 5, **changes: Any) -> Model:
    """A tiny base, or fused with perturbed adapters of a method."""
    base = tiny_model(**changes)
    if method == "base":
        return base
    adapter = AdapterConfig(method, rank=rank, extra_mlp_units=rank if "zf" in method else None)
    return fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))


SCALED = {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64), "head_dim": 32}
ODD = {"hidden_size": 72, "intermediate_size": 100}  # no multiples of 32


@pytest.mark.parametrize(
    ("method", "changes", "architecture", "heads"),
    [
        ("ffba", ODD | {"head_dim": 64}, "llama", 96),  # 80 -> 96: each head is padded by itself
        ("zflora-minimal", ODD | {"tie_word_embeddings": False}, "llama", 16),
        ("base", SCALED, "llama", 32),
        ("ffba", SCALED, "llama", 64),
        ("base", {"family": "qwen2"}, "qwen2", 16),
        # llama.cpp's qwen2 refuses heads that are not as wide as the residual stream.
        ("zflora-uniform", {"family": "qwen2"}, "llama", 32),
        ("base", {"family": "mistral", "sliding_window": 32}, "llama", 16),
    ],
)
def test_the_file_computes_what_the_model_does(
    method: str, changes: dict[str, Any], architecture: str, heads: int, tmp_path: Path
) -> None:
    """All families: test_formats."""
    model = fused_by(method, **changes)
    report = save_gguf(tmp_path / "x.gguf", model, "f32")
    found, file = load_model(tmp_path / "x.gguf"), GGUFFile(tmp_path / "x.gguf")
    assert_logits_close(forward(found, TOKENS), forward(model, TOKENS))
    assert file.get("general.architecture") == architecture
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert file.get(f"{architecture}.{key}") == heads
    assert ("output.weight" in file.tensors) == (not model.config.tie_word_embeddings)
    divided = model.config.base_head_dim is not None or "rope_scaling" in changes
    assert ("rope_freqs.weight" in file.tensors) == divided
    assert found.config.rope_scaling == model.config.rope_scaling
    if "hidden_size" in changes:
        assert f"hidden {model.config.hidden_size} -> 96" in report["filled with zeros"]
        assert "MLP" in report["filled with zeros"] and "hidden 96" in report["widths"]
        for tensor in file.tensors.values():  # 4 heads of 16 dims are a multiple too
            assert tensor.name == "rope_freqs.weight" or tensor.shape[-1] % 32 == 0, tensor.name
    if "sliding_window" in changes:
        assert report["context"].startswith("32 of 512: the sliding window")
        assert file.get("llama.context_length") == 32
    else:
        assert found.config.family == model.config.family and "context" not in report


# --- types ----------------------------------------------------------------------------------------

# The largest error as a share of the range (largest less smallest, 0 among them) of the weights
# that share a scale: half a step.
STEPS = {
    "F32": 0.0,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "Q8_0": 0.51 / 127,
    "Q4_0": 1.01 / 8,  # one end has eight steps, the other seven
    "Q4_1": 0.51 / 15,
}


@pytest.mark.parametrize("quant", always(QUANTS, ("bf16", "q8_0", "q4_1").__contains__))
def test_values_are_within_a_step_of_the_model(quant: str, tmp_path: Path) -> None:
    config = tiny_model().config.replace(hidden_size=256, intermediate_size=512, head_dim=64)
    model = random_model(config, jax.random.key(3))
    report = save_gguf(tmp_path / "x.gguf", model, quant)
    assert report["fallback"] == "none" and report["quant"] == quant
    want = dict(gguf_form(model, QUANTS[quant].dtype).tensors(model))
    file = GGUFFile(tmp_path / "x.gguf")
    assert list(want) == list(file.tensors)
    kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    for name, tensor in file.tensors.items():
        x = want[name].reshape(-1, 32)
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        error = np.abs(file.dequantised(tensor).reshape(x.shape) - x).max(-1)
        assert (error <= STEPS[kinds[name]] * (high - low) + 1e-9).all(), name
    tables = "Q8_0" if quant.startswith("q") else quant.upper()
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_up.weight"] == quant.upper() and kinds["token_embd.weight"] == tables
    file_type = "ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"
    assert file.get("general.file_type") == int(gguf.LlamaFileType[file_type])


def test_a_fallback_is_named(tmp_path: Path) -> None:
    """Heads that are left alone read 48 rows of o, which no block divides."""
    report = save_gguf(tmp_path / "x.gguf", fused_by("zflora-minimal", head_dim=12, num_layers=8))
    assert report["fallback"] == "attn_output as F16, not Q8_0"
    tensors = GGUFFile(tmp_path / "x.gguf").tensors
    assert tensors["blk.0.attn_output.weight"].type.name == "F16"


def test_values_beyond_the_type_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    kernel = model.params["layers"]["mlp"]["up"]["kernel"]
    model.params["layers"]["mlp"]["up"]["kernel"] = kernel.at[1, 0, 0].set(1e6)
    for quant in ("f16", "q8_0"):
        with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight.*range of float16"):
            save_gguf(tmp_path / "x.gguf", model, quant)
    assert not list(tmp_path.iterdir())
    save_gguf(tmp_path / "x.gguf", model, "bf16")


QWEN3, SMOLLM3 = {"family": "qwen3"}, {"family": "smollm3", "nope_layers": (1,)}


@pytest.mark.parametrize(
    ("method", "changes", "out", "settings", "words"),
    [
        ("base", QWEN3 | SCALED, "x.gguf", {}, "RoPE scaling.*not for qwen3"),
        ("base", SMOLLM3, "x.gguf", {}, r"nope_layers=\(1,\)"),
        ("base", {}, "x.gguf", {"quant": "q4_k_m"}, "quant='q4_k_m'.*f16.*llama-quantize FILE"),
        ("base", {}, "x.bin", {}, r"ends in \.gguf"),
        ("base", {}, "s3://bucket/x.gguf", {}, "is a URL"),
        ("base", {}, "x.gguf", {"eps_z": 0.5}, "eps_z"),
    ],
)
def test_what_cannot_be_written_is_refused(
    method: str, changes: Any, out: str, settings: Any, words: str, tmp_path: Path
) -> None:
    path = out if "://" in out else tmp_path / out
    with pytest.raises(ConfigError, match=words):
        save_gguf(path, fused_by(method, 4, **changes), **settings)
    assert not list(tmp_path.iterdir())


def test_only_files_of_this_project_are_replaced(tmp_path: Path) -> None:
    model, target = tiny_model(), tmp_path / "x.gguf"
    save_gguf(target, model, "f32")
    size = save_gguf(target, model, "q8_0")["bytes"]
    assert target.stat().st_size == size and GGUFFile(target).get(write.MARK)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    empty_file(tmp_path / "other.gguf")
    (tmp_path / "text.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("other", "text", "folder"):
        with pytest.raises(CheckpointError, match=f"{name}.gguf exists and is no GGUF file"):
            save_gguf(tmp_path / f"{name}.gguf", model)
    assert (tmp_path / "text.gguf").read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_gguf(tmp_path / "text.gguf" / "x.gguf", model)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = tiny_model(), tmp_path / "x.gguf"
    save_gguf(target, model, "f32")
    before = target.read_bytes()
    monkeypatch.setattr(write.Tensor, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gguf(target, model, "q8_0")
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_processes_that_do_not_write_still_gather(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process goes through all tensors; only process 0 has a path."""
    seen, real = [], stock.trees.on_host
    monkeypatch.setattr(stock.trees, "on_host", lambda *args: seen.append(1) or real(*args))
    monkeypatch.setattr(write, "on_main", lambda action: None)
    model = tiny_model()
    save_gguf(tmp_path / "x.gguf", model)
    assert len(seen) == len(gguf_form(model, "float32").shapes) and not list(tmp_path.iterdir())
