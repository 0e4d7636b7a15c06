"""PEFT directories: peft computes with ours what we compute, and we read what it writes; other
settings are refused by name.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import perturbed_adapters
from support.huggingface import TOKENS, hf_logits, hf_model

from zflora_jax import ConfigError, Model, forward, fuse, load_model, load_peft, save_peft
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("base") / "model"
    hf_model(head_dim=16).save_pretrained(path)
    return load_model(path)


@pytest.fixture
def out(base: Model, tmp_path: Path) -> Path:
    """A directory that save_peft wrote, of rank 2 on q."""
    adapter = AdapterConfig("lora", rank=2, targets="q")
    save_peft(tmp_path / "out", base, adapter, perturbed_adapters(base, adapter))
    return tmp_path / "out"


def adapted(base: Model, adapter: AdapterConfig, adapters: trees.Tree) -> np.ndarray:
    return np.asarray(forward(base, jnp.asarray(TOKENS), adapter, adapters))


def edit(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | changes))


def test_adapters_of_layers_that_are_left_out_are_refused(base: Model, tmp_path: Path) -> None:
    every = AdapterConfig("lora", rank=4)
    with pytest.raises(ConfigError, match=r"layers_0/attn/\w/lora_b.*: not zero, in layers that"):
        chosen = every.replace(layers_to_transform=(1,))
        save_peft(tmp_path / "out", base, chosen, perturbed_adapters(base, every))


def test_written_files(base: Model, tmp_path: Path) -> None:
    adapter = AdapterConfig("lora", rank=2, targets="q|down")
    model = Model(base.config, base.params, source="some-org/some-llama@v1")
    adapters = trees.unstack_layers(perturbed_adapters(base, adapter), 2)
    save_peft(tmp_path / "out", model, adapter, adapters)
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    wanted = {"base_model_name_or_path": "some-org/some-llama", "revision": "v1", "r": 2}
    wanted |= {"lora_alpha": 4, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    assert wanted.items() <= settings.items()
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    with safe_open(tmp_path / "out" / WEIGHTS, "np") as file:
        down = file.get_tensor("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")
        assert file.metadata() == {"format": "pt", "writer": "zflora_jax"}
        assert down.shape == (2, 80)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_peft(tmp_path / "out", model, adapter, adapters)  # its own directory may be replaced
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save_peft(tmp_path / "out", model, adapter, adapters)
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})  # as peft does
    with pytest.raises(CheckpointError, match="was not written by this project"):
        save_peft(tmp_path / "out", model, adapter, adapters)
    with pytest.raises(ConfigError, match="save_hf"):
        save_peft(tmp_path / "other", base, AdapterConfig("zflora-minimal"), {})
    q = adapters["layers_0"]["attn"]["q"]
    q["lora_a"] = q["lora_a"].at[0, 0].set(np.nan)
    with pytest.raises(ValueError, match="NaN"):
        save_peft(tmp_path / "other", base, adapter, adapters)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "exclude_modules": ["o_proj"]},
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {"self_attn.q_proj": 3},
        },
        {"target_modules": r".*\.layers\.1\..*(k|up)_proj", "lora_alpha": 1},
        {
            "target_modules": ["down_proj", "k_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"k_proj": 8},
            "use_rslora": True,
        },
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
    wanted = hf_logits(theirs)
    assert_logits_close(adapted(base, adapter, adapters), wanted)
    fused = np.asarray(forward(fuse(base, adapter, adapters), jnp.asarray(TOKENS)))
    assert_logits_close(fused, wanted)
    assert np.abs(wanted - hf_logits(hf_model(head_dim=16))).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *[("peft_type", "IA3", "peft_type='IA3'"), ("bias", "all", "bias='all'")],
        *[("modules_to_save", ["x"], "modules_to_save"), ("lora_bias", True, "lora_bias=True")],
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights"),
        ("target_modules", ["c_attn"], r"target_modules=\['c_attn'\] match no module"),
        ("r", 0, "r=0"),
        ("use_dora", True, rf"{CONFIG}: use_dora=True needs all layers here.*with peft"),
        ("r", 3, r"lora_A.*\(2, 48\), expected \(3, 48\)"),
        ("target_modules", ["q_proj", "v_proj"], r"missing .*v_proj\.lora_A"),
        ("layers_to_transform", 0, r"unexpected .*layers\.1"),
        ("rank_pattern", {"layers.1.self_attn.q_proj": 1}, r"differ between layers.*with peft"),
        ("alpha_pattern", {"layers.1.self_attn.q_proj": 1}, r"differ between layers.*with peft"),
        ("target_modules", r".*0.*(q|k)_proj|.*1.*q_proj", r"differ between layers.*with peft"),
        ("new_in_peft_9", 1, r"new_in_peft_9=1.*or remove a key that does not change"),
        *[("target_modules", "(", CONFIG), ("rank_pattern", 3, CONFIG)],  # of the wrong type
        *[("r", None, CONFIG), ("lora_alpha", [1], CONFIG), ("target_modules", [1], CONFIG)],
    ],
)
def test_wrong_settings_are_named(key: str, value: Any, words: str, base: Model, out: Path) -> None:
    edit(out, **{key: value}, **({"layers_to_transform": 0} if key == "use_dora" else {}))
    with pytest.raises((ConfigError, CheckpointError), match=words):
        load_peft(out, base)


def test_other_spellings_of_a_setting_are_read(base: Model, out: Path) -> None:
    wanted = load_peft(out, base)[1]
    for changes in (
        {"target_modules": r".*(q_proj|lm_head)", "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},  # PEFT: all
        {"new_in_peft_9": None, "another": {}},  # not in use
    ):
        edit(out, **changes)
        assert_trees_equal(load_peft(out, base)[1], wanted)


def test_wrong_directories_are_named(base: Model, out: Path, tmp_path: Path) -> None:
    for path, words in {
        tmp_path / "nowhere": r"nowhere: it has no adapter_config\.json\. Give the directory",
        out / CONFIG: r"adapter_config\.json: it has no",
        tmp_path: r"its adapters have names: give .*out",  # as peft saves an adapter with a name
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_peft(path, base)
    (out / WEIGHTS).rename(out / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization"):
        load_peft(out, base)
