"""tools/: a GGUF file from an export, by a script that stands in for llama.cpp's; a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from support.checks import assert_logits_close
from support.huggingface import TOKENS, hf_logits, hf_model, write_gguf
from support.models import perturb, tiny_model
from tiny_model import main as write_tiny_model
from to_gguf import ConversionError, _filled, convert

from zflora_jax import AdapterConfig, forward, fuse, init_adapters, load_model, save_hf

SCRIPT = """
import argparse, shutil
parser = argparse.ArgumentParser()
parser.add_argument("export")
for name in ("--outtype", "--outfile"):
    parser.add_argument(name)
args = parser.parse_args()
if args.outtype == "bf16":
    raise SystemExit("unsupported")
shutil.copy({source!r}, args.outfile)
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """Sources of a llama.cpp whose script gives one file, whatever the export."""
    source = tmp_path / "source.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_uint32("llama.rope.dimension_count", 24)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "<s>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("half.weight", np.arange(4, dtype=np.float16))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(SCRIPT.format(source=str(source)))
    return folder


def exported(tmp_path, method):
    import jax

    model, adapter = tiny_model(num_layers=2), AdapterConfig(method, rank=4)
    save_hf(
        tmp_path / method, fuse(model, adapter, init_adapters(jax.random.key(0), model, adapter))
    )
    return tmp_path / method


def read(path):
    reader = GGUFReader(path)
    fields = {
        f.name: (f.contents(), f.types)
        for f in reader.fields.values()
        if not f.name.startswith("GGUF.")
    }
    return fields, {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}


def test_wider_heads_bring_their_rope_factors(tmp_path, llama_cpp):
    import json

    export = exported(tmp_path, "zflora-uniform")
    convert(export, tmp_path / "out" / "a.gguf", llama_cpp, multiple=1)
    fields, tensors = read(tmp_path / "out" / "a.gguf")
    want_fields, want = read(tmp_path / "source.gguf")
    assert fields == want_fields
    for name, (values, kind) in want.items():
        assert tensors[name][1] == kind
        np.testing.assert_array_equal(tensors[name][0], values)
    factors = json.loads((export / "config.json").read_text())["rope_parameters"]
    for kind in ("long", "short"):
        np.testing.assert_array_equal(
            tensors[f"rope_factors_{kind}.weight"][0],
            np.asarray(factors[f"{kind}_factor"], np.float32),
        )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.gguf"]


def test_heads_of_the_base_are_left_as_they_are(tmp_path, llama_cpp):
    said = convert(exported(tmp_path, "zflora-minimal"), tmp_path / "a.gguf", llama_cpp, multiple=1)
    assert (
        "widths as they are\nno multiple of 32" in said
        and "hidden_size (68), intermediate_size (100)" in said
    )
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "source.gguf").read_bytes()


def test_a_script_that_fails_leaves_no_file(tmp_path, llama_cpp):
    with pytest.raises(ConversionError, match="ended with 1:\nunsupported"):
        convert(
            exported(tmp_path, "zflora-minimal"), tmp_path / "a.gguf", llama_cpp, outtype="bf16"
        )
    assert not (tmp_path / "a.gguf").exists()


# --- widths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "multiple", "widths"),
    [("zflora-minimal", 32, (96, 128)), ("zflora-uniform", 256, (256, 256))],
)
def test_widths_are_filled_and_the_function_stays(method, multiple, widths, tmp_path):
    """Real tensors: the file of a fused model with adapters moved by noise, before and after."""
    import jax
    import transformers

    base, adapter = (
        tiny_model(num_layers=2, tie_word_embeddings=False),
        AdapterConfig(method, rank=5, extra_head_dim=None),
    )
    fused = fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter)))
    save_hf(tmp_path / "export", fused)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    (tmp_path / "llama.cpp").mkdir()
    write_gguf(tmp_path / "plain.gguf", model, tokenizer=False)
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(
        SCRIPT.format(source=str(tmp_path / "plain.gguf"))
    )
    said = convert(
        tmp_path / "export", tmp_path / "a.gguf", tmp_path / "llama.cpp", multiple=multiple
    )
    assert f"hidden_size 72 -> {widths[0]}, intermediate_size 101 -> {widths[1]}" in said
    assert ("fall back" in said) == (multiple == 32 or method == "zflora-uniform")
    fields, tensors = read(tmp_path / "a.gguf")
    assert (fields["llama.embedding_length"][0], fields["llama.feed_forward_length"][0]) == widths
    heads = fused.config.head_dim
    assert (
        fields["llama.attention.key_length"][0]
        == fields["llama.attention.value_length"][0]
        == heads
    )
    of = {
        "token_embd": (259, widths[0]),
        "attn_q": (4 * heads, widths[0]),
        "attn_output": (widths[0], 4 * heads),
    }
    of |= {
        "ffn_gate": (widths[1], widths[0]),
        "ffn_down": (widths[0], widths[1]),
        "ffn_norm": (widths[0],),
    }
    for name, shape in of.items():
        found = [
            data.shape
            for key, (data, _) in tensors.items()
            if key.removesuffix(".weight").split(".")[-1] == name
        ]
        assert found and set(found) == {shape}, name
    if method == "zflora-uniform":  # our reader takes no rope factors of a file
        assert tensors["rope_factors_long.weight"][0].shape == (heads // 2,)
        return
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    assert_logits_close(forward(load_model(tmp_path / "a.gguf"), tokens), forward(fused, tokens))


def test_bytes_of_bfloat16_are_filled_number_by_number():
    config, filled = (
        {"hidden_size": 6, "intermediate_size": 3},
        {
            "hidden_size": 8,
            "intermediate_size": 4,
        },
    )
    data = np.arange(1, 37, dtype=np.uint8).reshape(6, 6)  # [hidden, units] of two bytes each
    found = _filled(data, "ffn_down", config, filled, inputs=3)
    assert found.shape == (8, 8) and not found[6:].any() and not found[:, 6:].any()
    np.testing.assert_array_equal(found[:6, :6], data)


def test_a_multiple_that_is_none_is_refused(tmp_path, llama_cpp):
    with pytest.raises(ConversionError, match="256 for K-quants"):
        convert(exported(tmp_path, "zflora-minimal"), tmp_path / "a.gguf", llama_cpp, multiple=0)


def test_the_tiny_model_of_contributing_fits_the_byte_tokenizer(tmp_path):
    write_tiny_model(str(tmp_path / "tiny"))
    model = load_model(str(tmp_path / "tiny"))
    assert len(model.tokenizer) <= model.config.vocab_size < 1000


# --- other families -------------------------------------------------------------------------------


def test_widths_of_other_families_are_filled_by_their_own_names(tmp_path):
    reference = hf_model(family="qwen2", tie_word_embeddings=True)
    reference.save_pretrained(tmp_path / "export")
    write_gguf(tmp_path / "source.gguf", reference)
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    script = SCRIPT.format(source=str(tmp_path / "source.gguf"))
    (folder / "convert_hf_to_gguf.py").write_text(script)
    save_hf(tmp_path / "again", load_model(tmp_path / "export"))  # which names the head_dim
    convert(tmp_path / "again", tmp_path / "a.gguf", folder, multiple=32)
    filled = load_model(tmp_path / "a.gguf")
    assert (filled.config.hidden_size, filled.config.intermediate_size) == (64, 96)
    assert_logits_close(forward(filled, TOKENS), hf_logits(reference))


def test_wider_heads_that_llama_cpp_could_not_turn_are_refused(tmp_path, llama_cpp):
    import jax

    model, adapter = tiny_model(family="qwen3"), AdapterConfig("ffba", rank=4)
    save_hf(tmp_path / "x", fuse(model, adapter, init_adapters(jax.random.key(0), model, adapter)))
    with pytest.raises(ConversionError, match=r"does not read for qwen3.*zflora-minimal"):
        convert(tmp_path / "x", tmp_path / "a.gguf", llama_cpp)
    assert not (tmp_path / "a.gguf").exists()
