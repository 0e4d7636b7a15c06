"""A model that is handed to `train` meets the run's settings, as a loaded one does."""

import dataclasses
from unittest.mock import Mock

import jax
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.models import perturb, tiny_model

from zflora_jax import CheckpointError, Model, init_adapters, load_model, save_gguf, save_hf, train
from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import RunConfig, TrainConfig
from zflora_jax.experiments import base
from zflora_jax.experiments.base import as_base, given_base


def fused(model: Model, method: str) -> Model:
    adapter = AdapterConfig(method, rank=4)
    return fuse(model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter)))


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.widens])
def test_a_fused_model_is_refused_by_name(run, base_dir, tmp_path, method):
    model = fused(load_model(base_dir), method)
    message = rf"has {method} fused in; an adapter on top of it could not be fused"
    with pytest.raises(ConfigError, match=message):
        as_base(run, model)
    save_hf(tmp_path / "out", model)
    with pytest.raises(ConfigError, match=message):
        train(override(run, {"model": str(tmp_path / "out")}), tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


def test_a_merged_model_is_an_ordinary_base_where_it_was_saved(run, base_dir, tmp_path):
    """In memory it is not what run.model names, and the run could not be loaded."""
    model = fused(load_model(base_dir), "lora")
    message = r"lora merged in.*zf\.save_hf\(DIR, model\), and train with run\.model=DIR"
    with pytest.raises(ConfigError, match=message):
        given_base(run, model)
    save_hf(tmp_path / "merged", model)
    run = override(run, {"model": str(tmp_path / "merged")})
    assert given_base(run, as_base(run, load_model(run.model))).adapter is None


def test_a_model_that_was_changed_in_memory_is_refused(run, base_dir):
    """Its widths or its tokenizer: eval, generate and export would load the directory as it is."""
    model = load_model(base_dir)
    given_base(run, model)
    message = r"vocab_size=300 here, 259 there\. Save it with zf\.save_hf"
    with pytest.raises(ConfigError, match=message):
        given_base(run, dataclasses.replace(model, config=model.config.replace(vocab_size=300)))
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match=r"chat template or tokens were changed.*zf\.save_hf"):
        given_base(run, model)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, pack_for_decode, "packed for decoding"),
        (
            {},
            lambda model: load_model(model.source, scan_layers=False),
            r"a tree per layer.*without scan_layers=False",
        ),
        ({}, lambda model: dataclasses.replace(model, tokenizer=None), "without a tokenizer"),
        (
            {},
            lambda model: load_model(model.source, dtype="bfloat16"),
            r"params are bfloat16, and train\.dtype is float32: load it with load_model\(...,"
            r" dtype='float32'\)",
        ),
        (
            {},
            lambda model: dataclasses.replace(model, config=model.config.replace(dtype="bfloat16")),
            r"activations are bfloat16, and train\.dtype is float32",
        ),
        ({"data.bucket_lengths": [1024]}, lambda model: model, "beyond the model's context"),
    ],
)
def test_models_that_the_run_cannot_train_are_refused(run, base_dir, settings, change, message):
    with pytest.raises(ConfigError, match=message):
        as_base(override(run, settings), change(load_model(base_dir)))


def test_a_model_computes_as_the_run_says(run, base_dir):
    """Not as it was loaded."""
    changes = {"remat": "block", "matmul_precision": "highest", "dtype": "bfloat16"}
    run = override(run, {f"train.{name}": value for name, value in changes.items()})
    execution = as_base(run, load_model(base_dir, dtype="bfloat16")).config.execution
    assert changes.items() <= vars(execution).items()


def test_a_model_from_elsewhere_is_warned_of(run, base_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(base_dir)
    given_base(override(run, {"model": "link"}), load_model(base_dir))
    model = load_model(base_dir)
    model.source = "HuggingFaceTB/SmolLM2-360M-Instruct"
    gone = Mock(side_effect=CheckpointError)  # as where the hub cannot be reached
    monkeypatch.setattr(base, "model_config", gone)
    given_base(override(run, {"model": "smollm2-360m"}), model)
    assert "but the run says" not in caplog.text
    given_base(run, model)
    model.source = None
    given_base(run, model)
    for origin in ("loaded from HuggingFaceTB/SmolLM2-360M-Instruct", "made in memory"):
        assert f"the base was {origin}, but the run says model={base_dir}" in caplog.text


def test_a_model_of_a_gguf_file_may_be_handed_in_as_it_is_loaded(tmp_path):
    """Its tokenizer is built anew for the comparison, which takes no file for a changed one."""
    file = str(tmp_path / "base.gguf")
    model = dataclasses.replace(tiny_model(head_dim=32), tokenizer=byte_tokenizer())
    save_gguf(file, model, "q8_0")
    model, run = load_model(file), RunConfig(file, train=TrainConfig(remat="block"))
    assert given_base(run, model).config.execution.remat == "block"
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="chat template or tokens were changed"):
        given_base(run, model)
