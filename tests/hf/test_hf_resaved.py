"""An export with widened heads that stock transformers saved again: its zflora.json is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close
from support.huggingface import LLAMA3, TOKENS, hf_logits, hf_model
from support.models import perturb

from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.swapping import swap
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig
from zflora_jax.experiments.base import as_base
from zflora_jax.hf.config import from_hf_config
from zflora_jax.hf.load import load_model, model_config
from zflora_jax.hf.peft import save_peft
from zflora_jax.hf.rope import turned_dims
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward
from zflora_jax.parallel.sharding import make_mesh

ADAPTERS = {
    "zflora-uniform": AdapterConfig("zflora-uniform", rank=8, extra_head_dim=4, extra_mlp_units=6),
    "ffba": AdapterConfig("ffba", rank=4, extra_head_dim=8, extra_mlp_units=6),
}
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama3": {"rope": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
}
CASES = [("zflora-uniform", "plain"), ("ffba", "plain"), ("zflora-uniform", "llama3")]
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


def stock(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Model, Path]]:
    """(the fused model, a directory with "base", "export" and "again": saved by transformers)."""
    found = {}
    for method, base in CASES:
        path = tmp_path_factory.mktemp("resaved")
        hf_model(**BASES[base]).save_pretrained(path / "base")
        model, adapter = load_model(path / "base"), ADAPTERS[method]
        fused = fuse(
            model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter), std=0.05)
        )
        save_hf(path / "export", fused)
        stock(path / "export").save_pretrained(path / "again")
        found[method, base] = fused, path
    return found


def load_again(path: Path, *args: Any, **kwargs: Any) -> Model:
    with pytest.warns(UserWarning, match=r"saved again.*copy zflora\.json"):
        return load_model(path, *args, **kwargs)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_loads_as_what_stock_software_computes(case, saved, tmp_path):
    fused, path = saved[case]
    assert not (path / "again" / "zflora.json").exists()
    model = load_again(path / "again")
    assert (
        model.adapter is None
        and model.config.base_head_dim == fused.config.base_head_dim
        and model.config.base_hidden_size is None
    )
    assert (
        model.config.rope_theta == fused.config.rope_theta
        and model.config.rope_scaling == fused.config.rope_scaling
    )
    want = hf_logits(stock(path / "again"))
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), want)
    assert_logits_close(want, np.asarray(forward(fused, jnp.asarray(TOKENS))))
    assert model_config(path / "again").base_head_dim == fused.config.base_head_dim
    save_hf(tmp_path / "out", model)  # and it can be exported like any model
    assert_logits_close(hf_logits(stock(tmp_path / "out")), want)
    again = load_model(tmp_path / "out")
    for name, leaf in trees.flatten(model.params).items():
        np.testing.assert_array_equal(trees.flatten(again.params)[name], leaf, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_files_of_the_first_export_restore_it(case, saved, tmp_path):
    fused, path = saved[case]
    shutil.copytree(path / "again", tmp_path / "again")
    shutil.copy(path / "export" / "zflora.json", tmp_path / "again")
    shutil.copytree(path / "export" / "zflora", tmp_path / "again" / "zflora")
    model = load_model(tmp_path / "again")  # without a warning
    assert model.adapter == fused.adapter and model.config == fused.config
    for name, leaf in trees.flatten(fused.params).items():
        np.testing.assert_array_equal(trees.flatten(model.params)[name], leaf, err_msg=name)
    base = load_model(path / "base")
    assert trees.fingerprint(unfuse(model)[0].params) == trees.fingerprint(base.params)


def test_the_base_of_an_export_is_not_called_as_the_export(saved, tmp_path):
    """Adapters beside it belong to the base; saved again, the export has the same base."""
    path = saved[CASES[0]][1]
    fused = load_model(path / "export")
    assert fused.source == str(path / "export") and fused.base == "base"
    base, adapters = unfuse(fused)
    assert (base.source, base.base) == (fused.source, "base")  # its other files are there still
    assert unfuse(swap(fuse(base, fused.adapter, adapters), adapters))[0].base == "base"
    lora = AdapterConfig("lora", rank=2)
    save_peft(tmp_path / "peft", base, lora, init_adapters(jax.random.key(0), base, lora))
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "base"
    save_hf(tmp_path / "again", load_model(path / "export"))
    manifest = json.loads((tmp_path / "again" / "zflora.json").read_text())
    assert manifest["base"]["name"] == "base"
    base.tokenizer = byte_tokenizer()
    run = RunConfig("x", data=DataConfig(bucket_lengths=(16,)), adapter=lora)
    assert as_base(run, base).base == "base"
    in_memory = load_model(path / "base")
    fused = fuse(in_memory, ADAPTERS[CASES[0][0]], adapters)
    assert unfuse(fused)[0].source == in_memory.source == str(path / "base")
    assert unfuse(fused)[0].base is None


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids="-".join)
def test_a_state_in_the_embedding_is_refused(case, saved, tmp_path):
    """It starts at zero: a number there was put by other software, and would be dropped."""
    fused, path = saved[case]
    shutil.copytree(path / "export", tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    tensors[name][3, fused.config.norm_dim] = 0.5
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name} has channels from .* that are not zero"):
        load_model(tmp_path / "export")


def test_on_a_mesh_in_bfloat16_and_layers_apart(saved):
    _, path = saved[CASES[0]]
    whole = load_again(path / "again")
    divided = load_again(path / "again", mesh=make_mesh(MeshConfig(fsdp=2, tensor=1)))
    apart = load_again(path / "again", scan_layers=False)
    assert (
        trees.fingerprint(divided.params)
        == trees.fingerprint(whole.params)
        == trees.fingerprint(apart.params)
    )
    half = load_again(path / "again", "bfloat16")
    for name, leaf in trees.flatten(half.params).items():
        np.testing.assert_array_equal(
            leaf, trees.flatten(whole.params)[name].astype(jnp.bfloat16), err_msg=name
        )


def test_adapters_on_top_of_it(saved):
    """Merged methods keep what RoPE turns; methods that widen need an ordinary base."""
    _, path = saved[CASES[0]]
    model = load_again(path / "again")
    lora = AdapterConfig("lora", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), model, lora), std=0.05)
    merged = fuse(model, lora, adapters)
    assert merged.config == model.config
    tokens = jnp.asarray(TOKENS)
    assert_logits_close(forward(merged, tokens), np.asarray(forward(model, tokens, lora, adapters)))
    for method in ("zflora-minimal", "ffba"):
        with pytest.raises(ConfigError, match="widened already"):
            init_adapters(jax.random.key(0), model, AdapterConfig(method, rank=4))


def test_other_uses_of_longrope_are_refused(saved):
    _, path = saved[CASES[0]]
    config = json.loads((path / "again" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert turned_dims(rope) == 12
    off = [1e30] * 2
    for changes in (
        {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        {"short_factor": [1.0] * 8},
        {"attention_factor": 1.2},
        {
            "long_factor": [*off, *rope["long_factor"][:6]],
            "short_factor": [*off, *rope["long_factor"][:6]],
        },
    ):
        with pytest.raises(ConfigError, match="'longrope' is not supported"):
            from_hf_config(config | {"rope_parameters": rope | changes})
    odd = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0, *off]
    with pytest.raises(ConfigError, match=r"no frequencies of plain RoPE.*Copy zflora\.json"):
        from_hf_config(
            config | {"rope_parameters": rope | {"long_factor": odd, "short_factor": odd}}
        )
    with pytest.raises(ConfigError, match="8 longrope factors for heads of 12"):
        from_hf_config(config | {"head_dim": 12})
