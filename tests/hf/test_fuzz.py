"""Loaders under arbitrary input, flipped header bytes among it: a typed error or a value."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.exports import perturbed_adapters
from support.grids import always
from support.huggingface import SETTINGS, hf_model, write_gguf
from support.models import tiny_model

from zflora_jax import CheckpointError, RunConfig, fuse, load_model, load_peft, save_hf, save_peft
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.families import FAMILIES
from zflora_jax.core.fields import ConfigError, from_dict, to_dict
from zflora_jax.hf.config import from_hf_config
from zflora_jax.hf.restore import read_export
from zflora_jax.hf.stock import CHOICES

TYPED = (ConfigError, CheckpointError)
fuzz = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
GOOD = to_dict(RunConfig())
HF_KEYS = (
    *("architectures", "auto_map", "eos_token_id", "head_dim", "hidden_act", "layer_types"),
    *("max_window_layers", "no_rope_layer_interval", "no_rope_layers", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "quantization_config", "rms_norm_eps"),
    *("rope_parameters", "rope_scaling", "sliding_window", "tie_word_embeddings"),
    "use_sliding_window",
)
PATHS = [
    (key, inner)
    for key, part in GOOD.items()
    for inner in (part if isinstance(part, dict) else [None])
]


@fuzz
@given(st.lists(st.tuples(st.sampled_from(PATHS), values), min_size=1, max_size=4))
def test_any_config(changes):
    config: dict[str, Any] = json.loads(json.dumps(GOOD))
    for (key, inner), value in changes:
        if inner is None or not isinstance(config[key], dict):
            config[key] = value
        else:
            config[key][inner] = value
    try:
        run = from_dict(RunConfig, config)
    except ConfigError:
        return
    assert from_dict(RunConfig, to_dict(run)) == run


@fuzz
@given(st.sampled_from([*FAMILIES]), st.dictionaries(st.sampled_from(HF_KEYS), values, max_size=3))
def test_any_config_json_of_a_model(family, changes):
    with contextlib.suppress(ConfigError):
        from_hf_config(SETTINGS | {"model_type": family} | changes)


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory) -> Path:
    model, adapter = tiny_model(family="qwen3"), AdapterConfig("zflora-uniform", rank=4)
    out = tmp_path_factory.mktemp("fuzz") / "export"
    save_hf(out, fuse(model, adapter, perturbed_adapters(model, adapter)))
    return out


@fuzz
@given(st.data())
def test_any_manifest_of_an_export(export_dir, tmp_path, data):
    manifest = json.loads((export_dir / "zflora.json").read_text())
    at = data.draw(st.sampled_from([manifest, manifest["base"], manifest["native_config"]]))
    at[data.draw(st.sampled_from([*at, "new"]))] = data.draw(values)
    (tmp_path / "zflora.json").write_text(json.dumps(manifest))
    shutil.copy(export_dir / "config.json", tmp_path / "config.json")
    with contextlib.suppress(*TYPED):
        assert read_export(tmp_path).form.eps_z in CHOICES


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    model, adapter = tiny_model(), AdapterConfig("lora", rank=2)
    save_hf(folder / "base", model)
    base = load_model(folder / "base")
    save_peft(folder / "adapter", base, adapter, perturbed_adapters(base, adapter))
    return folder / "adapter", lambda: base  # hypothesis would print all of the model itself


@pytest.mark.filterwarnings("ignore:.*keys that this reader does not know")
@fuzz
@given(st.data())
def test_any_adapter_directory(adapter_dir, tmp_path, data):
    good, base = adapter_dir[0], adapter_dir[1]()
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    if data.draw(st.booleans()):
        config = json.loads((folder / "adapter_config.json").read_text())
        key = data.draw(st.sampled_from([*config, "rank_pattern", "use_dora", "new_key"]))
        config[key] = data.draw(values)
        (folder / "adapter_config.json").write_text(json.dumps(config))
    else:
        damage(folder / "adapter_model.safetensors", data)
    try:
        adapter, adapters = load_peft(folder, base)
    except TYPED:
        return
    assert adapter.method == "lora" and all(np.isfinite(x).all() for x in jax.tree.leaves(adapters))


def damage(file: Path, data: Any) -> None:
    """Overwrite, insert or cut bytes anywhere."""
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(400, len(content) - 1)))
    new = data.draw(st.binary(min_size=1, max_size=9))
    how = data.draw(st.sampled_from(("overwrite", "insert", "cut")))
    if how == "cut":
        del content[at : at + data.draw(st.integers(1, 64))]
    else:
        content[at : at + len(new) * (how == "overwrite")] = new
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_gguf(path, hf_model(head_dim=16, num_hidden_layers=1))
    return path


def flipped(good: bytes, positions: Any, file: Path, load: Any) -> int:
    """Load a file with one bit flipped, for each position; the number of typed errors."""
    draw, refused = np.random.default_rng(0), 0
    for position in positions:
        bit = 1 << int(draw.integers(8))
        file.write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :])
        try:
            load()
        except TYPED:
            refused += 1
    return refused


every = pytest.mark.parametrize("step", always([1, 5], lambda step: step == 5))


@pytest.mark.filterwarnings("ignore:.*its tokenizer .* could not be built")
@every
def test_every_header_byte_of_a_gguf_file(step, gguf_file, tmp_path):
    """Sizes and offsets: before the vocabulary, which is text, and the table of tensors."""
    good, tensors = gguf_file.read_bytes(), gguf.GGUFReader(gguf_file).tensors
    table = range(
        min(good.index(t.name.encode()) for t in tensors) - 8, min(t.data_offset for t in tensors)
    )
    assert len(table) > 300
    positions = [*range(good.index(b"tokenizer.ggml.tokens")), *table][::step]
    file = tmp_path / "x.gguf"
    assert flipped(good, positions, file, lambda: load_model(file)) > 0.5 * len(table[::step])


@every
def test_every_header_byte_of_a_safetensors_file(step, tmp_path):
    save_hf(tmp_path / "model", tiny_model(num_layers=1))
    (tmp_path / "model" / "zflora.json").unlink()
    file = tmp_path / "model" / "model.safetensors"
    good = file.read_bytes()
    header = range(8 + int.from_bytes(good[:8], "little"))[::step]
    assert flipped(good, header, file, lambda: load_model(file.parent)) > 0.8 * len(header)
