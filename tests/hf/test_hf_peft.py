"""PEFT directories: what the peft library computes with ours is what we compute, and what it writes
we read; other settings are refused by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from support.checks import assert_logits_close
from support.huggingface import TOKENS, hf_logits, hf_model
from support.models import perturb

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.experiments.info import describe
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.nn.llama import forward


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("base") / "model"
    hf_model(head_dim=16).save_pretrained(path)
    return load_model(path)


def perturbed(base: Model, adapter: AdapterConfig) -> trees.Tree:
    return perturb(init_adapters(jax.random.key(0), base, adapter), std=0.05)


def adapted(base: Model, adapter: AdapterConfig, adapters: trees.Tree) -> np.ndarray:
    return np.asarray(forward(base, jnp.asarray(TOKENS), adapter, adapters))


@pytest.mark.parametrize("targets", ["all", "attention", "q|v", "down"])
def test_peft_computes_what_we_do(targets: str, base: Model, tmp_path: Path) -> None:
    adapter = AdapterConfig("lora", rank=4, alpha=6.0, targets=targets)
    adapters = perturbed(base, adapter)
    report = save_peft(tmp_path / "out", base, adapter, adapters)
    expected = adapted(base, adapter, adapters)
    theirs = peft.PeftModel.from_pretrained(hf_model(head_dim=16), tmp_path / "out").eval()
    assert_logits_close(hf_logits(theirs), expected)
    assert np.abs(expected - hf_logits(hf_model(head_dim=16))).max() > 0.05 * np.abs(expected).max()
    assert report["parameters"] == trees.size(adapters)

    again, back = load_peft(tmp_path / "out", base)
    assert again == adapter
    assert all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(adapters), strict=True)
    )
    apart = load_model(str(base.source), scan_layers=False)
    assert trees.fingerprint(load_peft(tmp_path / "out", apart)[1]) == trees.fingerprint(adapters)


def test_rslora_is_what_peft_computes(base: Model, tmp_path: Path) -> None:
    adapter = AdapterConfig("lora", rank=4, alpha=6.0, use_rslora=True)
    assert adapter.scale == 3.0
    adapters = perturbed(base, adapter)
    save_peft(tmp_path / "out", base, adapter, adapters)
    theirs = peft.PeftModel.from_pretrained(hf_model(head_dim=16), tmp_path / "out").eval()
    assert theirs.peft_config["default"].use_rslora
    assert_logits_close(hf_logits(theirs), adapted(base, adapter, adapters))
    again, _ = load_peft(tmp_path / "out", base)
    assert again == adapter
    with pytest.raises(ConfigError, match=r"give adapter\.alpha too"):
        AdapterConfig("lora", use_rslora=True)


def test_written_files(base: Model, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    adapter = AdapterConfig("lora", rank=2, targets="q|down")
    model = Model(base.config, base.params, source="some-org/some-llama@v1")
    adapters = trees.unstack_layers(perturbed(base, adapter), 2)
    save_peft(tmp_path / "out", model, adapter, adapters)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some-org/some-llama" and settings[
        "target_modules"
    ] == ["down_proj", "q_proj"]
    assert settings["revision"] == "v1"
    assert (
        settings["r"],
        settings["lora_alpha"],
        settings["peft_type"],
        settings["task_type"],
    ) == (2, 4, "LORA", "CAUSAL_LM")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
        shape = file.get_slice(
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
        ).get_shape()
        assert (
            file.metadata() == {"format": "pt", "writer": "zflora_jax"}
            and len(list(file.keys())) == 8
            and shape == [2, 80]
        )
    save_peft(tmp_path / "out", model, adapter, adapters)  # its own directory may be replaced
    peft_written = tmp_path / "theirs"
    shutil.copytree(tmp_path / "out", peft_written)
    save_file(
        load_file(peft_written / "adapter_model.safetensors"),
        peft_written / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="was not written by this project"):
        save_peft(peft_written, model, adapter, adapters)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save_peft(tmp_path / "out", model, adapter, adapters)
    with pytest.raises(ConfigError, match="save_hf"):
        save_peft(tmp_path / "other", base, AdapterConfig("zflora-minimal"), {})
    adapters["layers_0"]["attn"]["q"]["lora_a"] = (
        adapters["layers_0"]["attn"]["q"]["lora_a"].at[0, 0].set(np.nan)
    )
    with pytest.raises(ValueError, match="NaN"):
        save_peft(tmp_path / "other", base, adapter, adapters)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
        },
        {"target_modules": r".*\.layers\.1\..*(k|up)_proj", "lora_alpha": 1},
        {
            "target_modules": ["down_proj", "k_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"k_proj": 8},
            "use_rslora": True,
        },
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ],
)
def test_we_read_what_peft_writes(settings: dict[str, Any], base: Model, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | settings))
    theirs = peft.get_peft_model(hf_model(head_dim=16), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "out")
    adapter, adapters = load_peft(tmp_path / "out", base)
    assert adapter.method == "lora"
    assert_logits_close(adapted(base, adapter, adapters), hf_logits(theirs))


def test_settings_without_a_native_form_are_refused_by_name(base: Model, tmp_path: Path) -> None:
    adapter = AdapterConfig("lora", rank=2, targets="q")
    save_peft(tmp_path / "out", base, adapter, perturbed(base, adapter))
    path = tmp_path / "out" / "adapter_config.json"
    good = json.loads(path.read_text())
    for key, value in {
        **{
            "peft_type": "IA3",
            "bias": "all",
            "modules_to_save": ["lm_head"],
            "fan_in_fan_out": True,
            "init_lora_weights": "pissa_niter_4",
        },
        **{
            "target_modules": ["c_attn"],
            "rank_pattern": {"^q_proj": 4},
            "alpha_pattern": {"o_proj": 4},
            "r": 0,
            "lora_bias": True,
        },
    }.items():
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(ConfigError, match="r=0" if key == "r" else key):
            load_peft(tmp_path / "out", base)
    for targets in (["q_proj", "lm_head"], ["q_proj", "embed_tokens"], r".*(q_proj|lm_head)"):
        path.write_text(json.dumps(good | {"target_modules": targets}))
        with pytest.raises(ConfigError, match=r"names (lm_head|model\.embed_tokens), which native"):
            load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good | {"target_modules": targets, "exclude_modules": ["lm_head"]}))
    load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good | {"new_in_peft_9": 1, "another": None}))
    with pytest.warns(UserWarning, match="another, new_in_peft_9"):
        load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good | {"r": 3}))
    with pytest.raises(CheckpointError, match=r"lora_A.*\(2, 48\), expected \(3, 48\)"):
        load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good | {"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(CheckpointError, match=r"missing .*v_proj\.lora_A"):
        load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good | {"layers_to_transform": 0}))
    with pytest.raises(CheckpointError, match=r"unexpected .*layers\.1"):
        load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good | {"layers_to_transform": []}))  # PEFT: all
    load_peft(tmp_path / "out", base)
    path.write_text(json.dumps(good))
    (tmp_path / "out" / "adapter_model.safetensors").rename(tmp_path / "out" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization"):
        load_peft(tmp_path / "out", base)
    with pytest.raises(CheckpointError, match="safe_serialization"):
        describe(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"nowhere: nothing is there. Give the directory"):
        load_peft(tmp_path / "nowhere", base)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: that is a file"):
        load_peft(path, base)
    with pytest.raises(CheckpointError, match=r"its adapters have names: give .*out"):
        load_peft(tmp_path, base)  # as peft saves an adapter that has a name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", True),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("exclude_modules", 3),
        ("layers_to_transform", 0.5),
        ("rank_pattern", 3),
        ("rank_pattern", {"q_proj": "four"}),
        ("alpha_pattern", ["q_proj"]),
        ("r", None),
        ("lora_alpha", [1]),
    ],
)
def test_settings_of_the_wrong_kind_are_named(
    key: str, value: Any, base: Model, tmp_path: Path
) -> None:
    adapter = AdapterConfig("lora", rank=2)
    save_peft(tmp_path / "out", base, adapter, perturbed(base, adapter))
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises((ConfigError, CheckpointError), match=r"adapter_config\.json"):
        load_peft(tmp_path / "out", base)


def test_what_peft_has_trained_is_fused_and_decoded(base: Model, tmp_path: Path) -> None:
    """Three steps of AdamW in torch, saved by peft: logits of the fused model are peft's, and far
    from the base's.
    """
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        hf_model(head_dim=16),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=3e-2)
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    losses = []
    for _ in range(3):
        loss = theirs(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    theirs.eval().save_pretrained(tmp_path / "out")
    assert losses[-1] < losses[0]
    adapter, adapters = load_peft(tmp_path / "out", base)
    fused = np.asarray(forward(fuse(base, adapter, adapters), jnp.asarray(TOKENS)))
    want = hf_logits(theirs)
    assert_logits_close(fused, want)
    assert np.abs(want - hf_logits(hf_model(head_dim=16))).max() > 0.05 * np.abs(want).max()
