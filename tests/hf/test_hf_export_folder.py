"""Exported directories: what they replace, what lies beside the tensors, what does not match."""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close
from support.exports import WIDENED, fused_model
from support.huggingface import TOKENS

from zflora_jax.core import trees
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model import Model
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.hf.load import load_model, model_config
from zflora_jax.hf.restore import SIDE_FILE, SIDE_FOLDER
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward

# Widths that no server has kernels for are fine here.
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


def test_only_our_own_exports_are_replaced(bases: dict[str, Model], tmp_path: Path) -> None:
    model, out = bases["plain"], tmp_path / "out"
    out.mkdir()
    save_hf(out, model)  # an empty directory is no loss
    first = (out / "model.safetensors").stat().st_ino
    save_hf(out, model)
    assert (out / "model.safetensors").stat().st_ino != first and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (out / "config.json").stat().st_mode
    )

    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"did not write there: notes\.txt"):
        save_hf(out, model)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "zflora.json").write_text('{"format": "something else"}')
    with pytest.raises(CheckpointError, match="not written by this project"):
        save_hf(out, model)
    foreign = tmp_path / "foreign"
    shutil.copytree(str(model.source), foreign)
    with pytest.raises(CheckpointError, match="not written by this project"):
        save_hf(foreign, model)
    assert {p.name for p in foreign.iterdir()} == {
        p.name for p in Path(str(model.source)).iterdir()
    }
    with pytest.raises(CheckpointError, match="is a file"):
        save_hf(foreign / "config.json", model)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "foreign"}


@pytest.mark.parametrize("moment", ["write", "first rename", "second rename"])
def test_a_failed_replacement_keeps_the_old_export(
    moment: str, bases: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save_hf(out, bases["plain"])
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    calls, rename = [], os.rename

    def failing(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == (1 if moment == "first rename" else 2):
            raise OSError(28, "No space left on device")
        rename(source, target)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr("zflora_jax.hf.save.write_tensors", full)
    else:
        monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="No space left"):
        save_hf(out, bases["llama3"])
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


def test_tokenizer_and_generation_config(bases: dict[str, Model], tmp_path: Path) -> None:
    """Byte for byte from the base's directory; from the tokenizer object where there is no
    directory; the same ids either way.
    """
    source = tmp_path / "base"
    shutil.copytree(str(bases["plain"].source), source)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3],   "do_sample": true}')
    model = load_model(source)
    assert model.config.eos_token_ids == (2, 3)
    save_hf(tmp_path / "out", model)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    copied = [name for name in names if (source / name).exists()]
    assert len(copied) >= 3 and all(
        (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied
    )
    assert load_model(tmp_path / "out").config == model.config

    save_hf(tmp_path / "written", Model(model.config, model.params, tokenizer))
    settings = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["chat_template"]
    assert json.loads((tmp_path / "written" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 0,
    }
    chat = [{"role": "user", "content": "1 + 1?"}]
    for path in ("out", "written"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / path)
        assert (
            again("héllo  12 <eos>\n")["input_ids"] == tokenizer("héllo  12 <eos>\n")["input_ids"]
        )
        assert (again.eos_token_id, again.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
            chat, tokenize=False
        )
    gap = export_gap(model, tmp_path / "out", ["hello", "12 + 30 = 42"])
    assert gap["max_abs_dlogit"] == 0 and gap["top1_agreement"] == 1


def test_config_is_read_alike_by_both_spellings(bases: dict[str, Model], tmp_path: Path) -> None:
    """4 reads rope_theta and rope_scaling, 5 reads rope_parameters: both must say the same, and
    widened heads turn at the base frequencies.
    """
    fused = fused_model(bases["llama3"], WIDENED["zflora-uniform"])
    save_hf(tmp_path / "out", fused)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == {
        "rope_theta": written["rope_theta"],
        **written["rope_scaling"],
    }
    assert (
        written["torch_dtype"] == written["dtype"] == "float32"
        and written["hidden_size"] % written["num_attention_heads"] == 0
    )
    rotary = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out"
    ).model.rotary_emb.inv_freq.numpy()
    base = transformers.AutoModelForCausalLM.from_pretrained(
        str(bases["llama3"].source)
    ).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(rotary[: len(base)], base, rtol=3e-7)
    assert (np.abs(rotary[len(base) :]) < 1e-29).all()


def test_without_the_side_file_arithmetic_takes_over(
    bases: dict[str, Model], tmp_path: Path
) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-uniform"])
    save_hf(tmp_path / "out", fused)
    shutil.rmtree(tmp_path / "out" / "zflora")
    with pytest.warns(UserWarning, match="recovered by arithmetic") as warned:
        again = load_model(tmp_path / "out")
    assert warned[0].filename == __file__
    for name, leaf in trees.flatten(again.params).items():
        np.testing.assert_allclose(leaf, trees.flatten(fused.params)[name], rtol=2e-7, atol=1e-9)
    assert_logits_close(
        forward(again, jnp.asarray(TOKENS)), np.asarray(forward(fused, jnp.asarray(TOKENS)))
    )


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("config.json", {"hidden_size": 48}, "hidden_size"),
        ("config.json", {"rope_scaling": None}, "rope_scaling"),
        ("config.json", {"rope_theta": 1e4}, "rope_theta"),
        ("config.json", {"attention_bias": True}, "attention_bias"),
        ("zflora.json", {"version": 2}, "version 2"),
        ("zflora.json", {"format": "x"}, "not a manifest"),
        ("zflora.json", {"adapter": {"method": "zflora-uniform", "rank": 9}}, "was not fused from"),
        ("zflora.json", {"native_config": {}}, "incomplete or damaged"),
        ("zflora.json", {"eps_z": None}, "incomplete or damaged"),
    ],
)
def test_files_that_do_not_belong_together(
    file: str, change: dict[str, Any], words: str, bases: dict[str, Model], tmp_path: Path
) -> None:
    save_hf(tmp_path / "out", fused_model(bases["plain"], WIDENED["zflora-uniform"]))
    path = tmp_path / "out" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_model(tmp_path / "out")


def test_card(bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    fused.source = "some-org/some-llama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "huggingface_hub.snapshot_download",
            lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")),
        )
        save_hf(tmp_path / "out", fused, card={"accuracy after": 0.71234, "task": "arithmetic"})
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "base_model: some-org/some-llama" in text
        and "| accuracy after | 0.7123 |" in text
        and "zflora-minimal" in text
        and "reconstruction of zFLoRA (arXiv 2510.25784)" in text
    )
    assert str(tmp_path) not in text + (tmp_path / "out" / "zflora.json").read_text()


def test_an_export_on_the_hub_is_the_export_on_disk(bases: Any, tmp_path: Path) -> None:
    """In the hub's cache each file is a link into the blobs; one to elsewhere is refused."""
    fused = fused_model(bases["plain"], WIDENED["zflora-uniform"])
    save_hf(tmp_path / "export", fused)
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    there = home / "snapshots" / "abc"
    for i, file in enumerate(path for path in (tmp_path / "export").rglob("*") if path.is_file()):
        link = there / file.relative_to(tmp_path / "export")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, home / "blobs" / str(i))
        link.symlink_to(home / "blobs" / str(i))
    loaded = load_model(there)
    assert trees.fingerprint(loaded.params) == trees.fingerprint(fused.params)
    assert model_config(there) == loaded.config  # of the model, not of its stock form
    side = there / SIDE_FOLDER / SIDE_FILE
    shutil.copy(side, tmp_path / "away")
    side.unlink()
    side.symlink_to(tmp_path / "away")
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        load_model(there)
