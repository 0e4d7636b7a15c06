"""tools/: a GGUF file from an export, by a script that stands in for llama.cpp's."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_model
from gguf import GGUFReader, GGUFWriter
from to_gguf import ConversionError, convert

from zflora_jax import AdapterConfig, fuse, init_adapters, save_hf

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
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(SCRIPT.format(source=str(source)))
    return folder


def exported(tmp_path, method):
    import jax

    model, adapter = tiny_model(num_layers=2), AdapterConfig(method, rank=4)
    save_hf(tmp_path / method, fuse(model, adapter, init_adapters(jax.random.key(0), model, adapter)))
    return tmp_path / method


def read(path):
    reader = GGUFReader(path)
    fields = {f.name: (f.contents(), f.types) for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    return fields, {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}


def test_wider_heads_bring_their_rope_factors(tmp_path, llama_cpp):
    import json

    export = exported(tmp_path, "zflora-uniform")
    convert(export, tmp_path / "out" / "a.gguf", llama_cpp)
    fields, tensors = read(tmp_path / "out" / "a.gguf")
    want_fields, want = read(tmp_path / "source.gguf")
    assert fields == want_fields
    for name, (values, kind) in want.items():
        assert tensors[name][1] == kind
        np.testing.assert_array_equal(tensors[name][0], values)
    factors = json.loads((export / "config.json").read_text())["rope_parameters"]
    for kind in ("long", "short"):
        np.testing.assert_array_equal(tensors[f"rope_factors_{kind}.weight"][0], np.asarray(factors[f"{kind}_factor"], np.float32))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.gguf"]


def test_heads_of_the_base_are_left_as_they_are(tmp_path, llama_cpp):
    convert(exported(tmp_path, "zflora-minimal"), tmp_path / "a.gguf", llama_cpp)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "source.gguf").read_bytes()


def test_a_script_that_fails_leaves_no_file(tmp_path, llama_cpp):
    with pytest.raises(ConversionError, match="ended with 1:\nunsupported"):
        convert(exported(tmp_path, "zflora-minimal"), tmp_path / "a.gguf", llama_cpp, outtype="bf16")
    assert not (tmp_path / "a.gguf").exists()
