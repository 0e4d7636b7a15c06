"""save_gguf: the file's function is the model's, its numbers are the type's nearest, and nothing is
filled, left out or replaced in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close
from support.grids import always, pairwise
from support.models import needs_smollm2, perturb, tiny_fused, tiny_model

from zflora_jax import AdapterConfig, forward, fuse, init_adapters, load_model, save_gguf
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import RopeScaling
from zflora_jax.hf.gguf_form import gguf_form
from zflora_jax.hf.gguf_names import gguf_name, half_split, hf_name, interleave
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.gguf_save import MARK
from zflora_jax.hf.gguf_types import QUANTS, plan_tensor
from zflora_jax.nn.llama import random_model

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
METHODS = ("base", "lora", "ffa", "ffba", "zflora-minimal", "zflora-uniform", "full")
WIDER = ["ffba", "zflora-minimal", "zflora-uniform"]


def widened(method: str, **changes: Any) -> Model:
    """A tiny base fused by `method`, adapters moved by noise; no width is a multiple of 32."""
    base = tiny_model(hidden_size=72, intermediate_size=100, **changes)
    adapter = AdapterConfig(method, rank=5, extra_head_dim=None)
    return fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))


@pytest.mark.parametrize("method", always(METHODS, {"base", "lora", "zflora-uniform"}.__contains__))
def test_the_file_computes_what_the_model_does(method: str, tmp_path: Path) -> None:
    fused = tiny_fused(method)
    save_gguf(tmp_path / "x.gguf", fused, "f32")
    found = load_model(tmp_path / "x.gguf")
    assert_logits_close(forward(found, TOKENS), forward(fused, TOKENS))


@pytest.mark.parametrize(("method", "tied"), pairwise(WIDER, [True, False]))
def test_widths_are_filled_and_the_function_stays(method: str, tied: bool, tmp_path: Path) -> None:
    fused = widened(method, tie_word_embeddings=tied)
    report = save_gguf(tmp_path / "x.gguf", fused, "f32")
    file, found = GGUFFile(tmp_path / "x.gguf"), load_model(tmp_path / "x.gguf")
    assert ("output.weight" in file.tensors) == (not tied)
    hidden = fused.config.hidden_size
    assert f"hidden {hidden} -> 96" in report["filled with zeros"]
    assert "MLP" in report["filled with zeros"] and "hidden 96" in report["widths"]
    assert_logits_close(forward(found, TOKENS), forward(fused, TOKENS))
    for key in ("embedding_length", "feed_forward_length"):
        assert file.get(f"llama.{key}") % 32 == 0
    heads = 16 if method == "zflora-minimal" else 32
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert file.get(f"llama.{key}") == heads
    assert ("rope_freqs.weight" in file.tensors) == (heads == 32)
    for tensor in file.tensors.values():  # 4 heads of 16 dims are a multiple too
        assert tensor.name == "rope_freqs.weight" or tensor.shape[-1] % 32 == 0, tensor.name


def test_wider_heads_are_filled_each(tmp_path: Path) -> None:
    """Heads of 64 dims and 16 more: 96 in the file, whose rows of o keep blocks of a head whole."""
    base, adapter = tiny_model(head_dim=64), AdapterConfig("ffba", rank=4)
    fused = fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))
    report = save_gguf(tmp_path / "x.gguf", fused, "f32")
    assert "head 80 -> 96" in report["filled with zeros"]
    found = load_model(tmp_path / "x.gguf")
    assert (found.config.head_dim, found.config.base_head_dim) == (96, 64)
    assert_logits_close(forward(found, TOKENS), forward(fused, TOKENS))
    rows = GGUFFile(tmp_path / "x.gguf").tensors["blk.0.attn_output.weight"]
    values = gguf.dequantize(rows.data, rows.kind).reshape(-1, 4, 96)
    assert not values[..., 80:].any() and values[..., :80].all()


@pytest.mark.parametrize("widened_heads", [False, True])
def test_llama3_scaling_is_in_the_divisors(widened_heads: bool, tmp_path: Path) -> None:
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    fused = tiny_model(rope_scaling=scaling, head_dim=32)
    if widened_heads:
        adapter = AdapterConfig("ffba", rank=4)
        fused = fuse(fused, adapter, perturb(init_adapters(jax.random.key(0), fused, adapter)))
    save_gguf(tmp_path / "x.gguf", fused, "f32")
    found = load_model(tmp_path / "x.gguf")
    assert found.config.rope_scaling is not None and found.config.rope_scaling.factor == 8.0
    assert_logits_close(forward(found, TOKENS), forward(fused, TOKENS))


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_every_family_with_a_wider_residual_stream(family: str, tmp_path: Path) -> None:
    layers = {"num_layers": 4, "nope_layers": (3,)} if family == "smollm3" else {}
    base = tiny_model(family=family, **layers)
    adapter = AdapterConfig("zflora-minimal", rank=5)
    fused = fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))
    save_gguf(tmp_path / "x.gguf", fused, "f32")
    found = load_model(tmp_path / "x.gguf")
    assert found.config.family == ("llama" if family == "mistral" else family)
    assert_logits_close(forward(found, TOKENS), forward(fused, TOKENS))


@pytest.mark.parametrize("method", ["base", "zflora-minimal", "zflora-uniform"])
def test_a_wider_qwen2_is_a_llama_with_biases(method: str, tmp_path: Path) -> None:
    """llama.cpp's qwen2 refuses heads that are not as wide as the residual stream."""
    fused = base = tiny_model(family="qwen2")
    if method != "base":
        adapter = AdapterConfig(method, rank=5)
        fused = fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))
    report = save_gguf(tmp_path / "x.gguf", fused, "f32")
    file, found = GGUFFile(tmp_path / "x.gguf"), load_model(tmp_path / "x.gguf")
    assert file.get("general.architecture") == ("qwen2" if method == "base" else "llama")
    assert ("architecture" in report) == (method != "base") and found.config.family == "qwen2"
    assert_logits_close(forward(found, TOKENS), forward(fused, TOKENS))


def test_names_and_row_orders_invert_each_other() -> None:
    for name in ("blk.3.attn_q_norm.weight", "blk.0.attn_k.bias", "output.weight"):
        assert gguf_name(hf_name(name)) == name
    # Every name is llama.cpp's own for the architecture.
    for arch in ("LLAMA", "QWEN2", "QWEN3", "SMOLLM3"):
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 1)
        for module in ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"):
            hf = f"model.layers.0.{module}"
            assert gguf_name(f"{hf}.weight") == known.get_name(hf) + ".weight"
    rows = np.arange(24).reshape(24, 1)
    np.testing.assert_array_equal(half_split(interleave(rows, 2), 2), rows)
    assert interleave(rows, 2)[:4, 0].tolist() == [0, 6, 1, 7]


def test_a_window_limits_the_context_and_the_report_says_so(tmp_path: Path) -> None:
    model = tiny_model(family="mistral", sliding_window=32)
    report = save_gguf(tmp_path / "x.gguf", model, "f32")
    assert report["context"].startswith("32 of 512: the sliding window")
    assert GGUFFile(tmp_path / "x.gguf").get("llama.context_length") == 32


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (
            "ffba",
            {"family": "qwen3"},
            "llama, mistral, qwen2, not for qwen3",
        ),
        ("zflora-uniform", {"family": "qwen3"}, "not for qwen3.*zflora-minimal"),
        (
            "base",
            {"family": "qwen3", "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)},
            "Llama-3's RoPE scaling.*not for qwen3",
        ),
        ("base", {"family": "smollm3", "nope_layers": (1,)}, r"nope_layers=\(1,\)"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(
    method: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = tiny_model(**changes)
    if method != "base":
        adapter = AdapterConfig(method, rank=4)
        model = fuse(model, adapter, init_adapters(jax.random.key(0), model, adapter))
    with pytest.raises(ConfigError, match=words):
        save_gguf(tmp_path / "x.gguf", model)
    assert not list(tmp_path.iterdir())


# --- types ----------------------------------------------------------------------------------------

# The largest error of a number as a share of the range (largest less smallest, 0 among them) of the
# numbers that share a scale: half a step, and for the K-quants the rounding of scales beside it.
STEPS = {
    "F32": 0.0,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "Q8_0": 0.51 / 127,
    "Q4_0": 1.01 / 8,  # one end has eight steps, the other seven
    "Q4_1": 0.51 / 15,
    "Q5_0": 1.01 / 16,
    "Q4_K": 1.1 / 15,
    "Q6_K": 1.0 / 32,
}


@pytest.mark.parametrize("quant", QUANTS)
def test_numbers_are_within_a_step_of_the_model(quant: str, tmp_path: Path) -> None:
    """Widths of 256, so that K-quants need no fallback; every tensor of the file."""
    layers = 8 if quant == "q4_k_m" else 2  # whose kinds depend on the layer
    config = tiny_model().config.replace(
        hidden_size=256, intermediate_size=512, head_dim=64, num_layers=layers
    )
    model = random_model(config, jax.random.key(3))
    report = save_gguf(tmp_path / "x.gguf", model, quant)
    assert report["fallback"] == "none" and report["quant"] == quant
    form = gguf_form(model, QUANTS[quant].dtype)
    want, file = dict(form.tensors(model)), GGUFFile(tmp_path / "x.gguf")
    assert list(want) == list(file.tensors)
    kinds = {name: tensor.kind.name for name, tensor in file.tensors.items()}
    for name, tensor in file.tensors.items():
        x, kind = want[name].reshape(-1, 16 if tensor.shape[-1] % 32 else 32), kinds[name]
        low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
        error = np.abs(gguf.dequantize(tensor.data, tensor.kind).reshape(x.shape) - x).max(-1)
        assert (error <= STEPS[kind] * (high - low) + 1e-9).all(), (name, kind)
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    if quant == "q4_k_m":
        assert (kinds["token_embd.weight"], kinds["blk.2.attn_v.weight"]) == ("Q6_K", "Q4_K")
        assert [kinds[f"blk.{i}.ffn_down.weight"] for i in (0, 1, 2, 3, 7)] == [
            "Q6_K",
            "Q4_K",
            "Q4_K",
            "Q6_K",
            "Q6_K",
        ]
    elif quant in ("q4_0", "q4_1"):
        assert kinds["token_embd.weight"] == "Q8_0"


def test_the_head_of_an_untied_k_quant_has_more_bits_than_its_embedding() -> None:
    def kind(name: str, tied: bool) -> str:
        plan = plan_tensor(name, (64, 256), QUANTS["q4_k_m"], layers=8, tied=tied)
        return plan.kind.name

    assert (kind("output.weight", False), kind("token_embd.weight", False)) == ("Q6_K", "Q4_K")
    assert kind("token_embd.weight", True) == "Q6_K"


def test_a_fallback_is_named(tmp_path: Path) -> None:
    """Rows of 96 and 128 are no super-blocks of 256; heads that are left alone read 48 rows of o,
    which no block divides.
    """
    base = tiny_model(head_dim=12, num_layers=8)
    adapter = AdapterConfig("zflora-minimal", rank=5)
    fused = fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))
    for quant, wanted in (("q4_k_m", "Q4_K"), ("q8_0", "Q8_0")):
        report = save_gguf(tmp_path / "x.gguf", fused, quant)
        assert f"{wanted} -> F16: 8 tensors with rows of 48 (attn_output)" in report["fallback"]
        assert ("Q6_K -> Q8_0" in report["fallback"]) == (quant == "q4_k_m")
    kinds = {t.name: t.kind.name for t in GGUFFile(tmp_path / "x.gguf").tensors.values()}
    assert kinds["blk.0.attn_output.weight"] == "F16" and kinds["blk.0.attn_q.weight"] == "Q8_0"


def test_numbers_beyond_the_type_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    kernel = model.params["layers"]["mlp"]["up"]["kernel"]
    model.params["layers"]["mlp"]["up"]["kernel"] = kernel.at[1, 0, 0].set(1e6)
    for quant in ("f16", "q8_0"):
        with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight.*range of float16"):
            save_gguf(tmp_path / "x.gguf", model, quant)
    assert not list(tmp_path.iterdir())
    save_gguf(tmp_path / "x.gguf", model, "bf16")


# --- the file -------------------------------------------------------------------------------------


def test_settings_and_names_that_are_wrong(tmp_path: Path) -> None:
    model = tiny_model()
    for out, quant, words in (
        ("x.gguf", "q4_k", "quant='q4_k'.*q4_k_m"),
        ("x.bin", "q8_0", r"ends in \.gguf"),
    ):
        with pytest.raises(ConfigError, match=words):
            save_gguf(tmp_path / out, model, quant)
    with pytest.raises(ConfigError, match="is a URL"):
        save_gguf("s3://bucket/x.gguf", model)
    with pytest.raises(ConfigError, match="eps_z"):
        save_gguf(tmp_path / "x.gguf", model, eps_z=0.5)
    assert not list(tmp_path.iterdir())


def test_only_files_of_this_project_are_replaced(tmp_path: Path) -> None:
    model, target = tiny_model(), tmp_path / "x.gguf"
    save_gguf(target, model, "f32")
    size = save_gguf(target, model, "q8_0")["bytes"]
    assert target.stat().st_size == size and GGUFFile(target).get(MARK)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
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
    monkeypatch.setattr("zflora_jax.hf.gguf_save.check_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gguf(target, model, "q8_0")
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_processes_that_do_not_write_still_gather(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process goes through all tensors; only process 0 has a path."""
    seen = []
    from zflora_jax.hf import gguf_save, stock

    real = stock.trees.on_host
    monkeypatch.setattr(stock.trees, "on_host", lambda *args: seen.append(1) or real(*args))
    monkeypatch.setattr(gguf_save, "on_main", lambda action: None)
    model = tiny_model()
    gguf_save.save_gguf(tmp_path / "x.gguf", model)
    assert len(seen) == len(gguf_form(model, "float32").shapes) and not list(tmp_path.iterdir())


@pytest.mark.soak  # twins: the next one; test_quantized_training has the packaged model's blocks
@needs_smollm2
def test_the_packaged_model_keeps_its_tokenizer(tmp_path: Path) -> None:
    """Byte for byte, and the codes of a model that came as Q4_1 are nearly its own."""
    from zflora_jax.hf.load import locate, model_tokenizer

    base = load_model("smollm2-135m")
    report = save_gguf(tmp_path / "x.gguf", base, "q4_1")
    assert report["tokenizer"] == "copied from the base's file"
    old, new = GGUFFile(locate("smollm2-135m")[0]), GGUFFile(tmp_path / "x.gguf")
    assert new.below("tokenizer.") == old.below("tokenizer.")
    assert {n: (t.shape, t.kind) for n, t in new.tensors.items()} == {
        n: (t.shape, t.kind) for n, t in old.tensors.items()
    }
    again = model_tokenizer(tmp_path / "x.gguf")
    assert again("A b1")["input_ids"] == base.tokenizer("A b1")["input_ids"]


def test_a_byte_tokenizer_makes_the_round(tmp_path: Path) -> None:
    model = tiny_model()
    model.tokenizer = byte_tokenizer(add_bos=True)
    report = save_gguf(tmp_path / "x.gguf", model, "f32")
    assert "llama.cpp refuses one without merges" in report["tokenizer"]
    found = load_model(tmp_path / "x.gguf")
    assert found.tokenizer("aé 1<eos>")["input_ids"] == model.tokenizer("aé 1<eos>")["input_ids"]
    assert found.tokenizer.chat_template == model.tokenizer.chat_template
    assert found.config.eos_token_ids == (257,) and found.config.bos_token_id == 256
