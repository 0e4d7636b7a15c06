"""Models and adapters by hub id, at a revision; presets that a package brings. The hub is a folder
here: nothing is fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.checks import assert_trees_equal
from support.exports import fused_model, perturbed_adapters
from support.models import needs_smollm2, tiny_model

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model import Model
from zflora_jax.experiments.base import _same_source
from zflora_jax.experiments.info import describe
from zflora_jax.hf import hub
from zflora_jax.hf.card import base_name, model_card
from zflora_jax.hf.hub import HUB_IDS, packaged
from zflora_jax.hf.load import load_model, model_config
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.hf.save import save_hf

FACTS = {"parameters": 1, "dtype": "bfloat16"}
LORA = AdapterConfig("lora", rank=2, targets="q|v")


@pytest.fixture(scope="module")
def base() -> Model:
    return tiny_model()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The repositories that were asked for, with their revisions; tmp_path / "hub" is the hub."""
    found = []

    def snapshot_download(name: str, revision: str | None = None, **_: Any) -> str:
        found.append((name, revision))
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


def test_a_model_at_a_revision(base: Model, tmp_path: Path, asked: Any) -> None:
    save_hf(tmp_path / "hub" / "org" / "llama", base)
    model = load_model("org/llama@v1.0")
    assert_trees_equal(model.params, base.params)
    assert asked == [("org/llama", "v1.0")] and model.source == "org/llama@v1.0"
    assert base_name(model) == "org/llama@v1.0"
    assert "base_model: org/llama\n" in model_card(model, FACTS, {})
    save_hf(tmp_path / "fused", fused_model(model, LORA))  # which passes the revision to PEFT
    again = load_model(tmp_path / "fused")
    save_peft(tmp_path / "lora", again, LORA, perturbed_adapters(base, LORA))
    told = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("org/llama", "v1.0")
    assert load_model("org/llama").source == "org/llama" and asked[-1] == ("org/llama", None)


def test_an_adapter_on_the_hub(base: Model, tmp_path: Path, asked: Any) -> None:
    adapters = perturbed_adapters(base, LORA)
    save_peft(tmp_path / "hub" / "org" / "lora", base, LORA, adapters)
    _, found = load_peft("org/lora@abc123", base)
    assert_trees_equal(found, adapters)
    assert asked == [("org/lora", "abc123")]


def test_a_repository_of_gguf_files_alone(tmp_path: Path, asked: Any) -> None:
    (tmp_path / "hub" / "org" / "llama-gguf").mkdir(parents=True)
    for read in (load_model, model_config, describe):
        with pytest.raises(CheckpointError, match=r"no config\.json on the hub.*give its path"):
            read("org/llama-gguf")


def test_what_is_here_is_no_hub_id(
    base: Model, tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path of two parts looks like one."""
    save_hf(tmp_path / "runs" / "llama", base)
    save_peft(tmp_path / "runs" / "lora", base, LORA, perturbed_adapters(base, LORA))
    monkeypatch.chdir(tmp_path)
    assert_trees_equal(load_model("runs/llama").params, base.params)
    assert load_peft("runs/lora", base)[0].targets == "q|v"
    assert base_name(Model(base.config, base.params, source="runs/llama")) == "llama"
    assert not asked


@needs_smollm2
def test_a_packaged_preset_is_not_the_hubs_model(
    base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are those of 4-bit blocks; without the package it is the hub's."""
    model = Model(base.config, base.params, source="smollm2-135m")
    name = HUB_IDS["smollm2-135m"]
    assert not _same_source("smollm2-135m", name) and _same_source("smollm2-135m", "smollm2-135m")
    assert f"{name}, as the blocks of" in model_card(model, FACTS, {})
    with pytest.warns(UserWarning, match=f"have fewer bits than those of {name}"):
        save_peft(tmp_path / "a", model, LORA, perturbed_adapters(base, LORA))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()  # a directory of that name goes before the package
    assert packaged("smollm2-135m") is None
    (tmp_path / "smollm2-135m").rmdir()
    assert packaged("smollm2-135m") is not None
    monkeypatch.setattr(hub, "PACKAGED", {})
    assert packaged("smollm2-135m") is None
    assert _same_source("smollm2-135m", name)
    assert f"| base | {name} |" in model_card(model, FACTS, {})
    save_peft(tmp_path / "a", model, LORA, perturbed_adapters(base, LORA))


def test_targets_stay_in_their_cell(base: Model) -> None:
    """Of the card's table."""
    card = model_card(Model(base.config, base.params, adapter=LORA), FACTS, {})
    assert r"| adapter.targets | q\|v |" in card


def test_a_failed_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    words = r"'org/lora@main' could not be fetched.*no route.*no directory or file .* here either"
    with pytest.raises(CheckpointError, match=words):
        load_peft("org/lora@main", tiny_model())
