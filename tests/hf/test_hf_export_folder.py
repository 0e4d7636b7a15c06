"""Exported directories: replacement, companion files, files that do not match."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.numpy import load_file, save_file
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_trees_equal
from support.exports import WIDENED, fused_model, perturbed_adapters
from support.huggingface import open_stock

from zflora_jax.adapters.fuse import fuse, swap, unfuse
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import DataConfig, RunConfig
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.experiments.base import as_base
from zflora_jax.hf.load import load_model, model_config
from zflora_jax.hf.peft import save_peft
from zflora_jax.hf.restore import SIDE_FILE, SIDE_FOLDER
from zflora_jax.hf.save import save_hf

LORA = AdapterConfig("lora", rank=2)
# Widths that no server has kernels for are fine here.
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


@pytest.fixture(scope="module")
def fused(bases: dict[str, Model]) -> Model:
    return fused_model(bases["plain"], WIDENED["zflora-uniform"])


@pytest.fixture(scope="module")
def exported(fused: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    save_hf(path, fused)
    return path


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "out"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_our_own_exports_are_replaced(bases: dict[str, Model], tmp_path: Path) -> None:
    model, out = bases["plain"], tmp_path / "out"
    out.mkdir()
    save_hf(out, model)  # an empty directory is no loss
    first = (out / "model.safetensors").stat()
    save_hf(out, model)
    second, config = ((out / n).stat() for n in ("model.safetensors", "config.json"))
    assert second.st_ino != first.st_ino and names(tmp_path) == {"out"}
    assert stat.S_IMODE(second.st_mode) == stat.S_IMODE(config.st_mode)

    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"did not write there: notes\.txt"):
        save_hf(out, model)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "zflora.json").write_text('{"format": "something else"}')
    foreign = shutil.copytree(str(model.source), tmp_path / "foreign")
    for folder in (out, foreign):
        with pytest.raises(CheckpointError, match="not written by this project"):
            save_hf(folder, model)
    assert names(foreign) == names(Path(str(model.source)))
    with pytest.raises(CheckpointError, match="is a file"):
        save_hf(foreign / "config.json", model)
    assert names(tmp_path) == {"out", "foreign"}


@pytest.mark.parametrize("moment", ["write", "first rename", "second rename"])
def test_a_failed_replacement_keeps_the_old_export(
    moment: str, bases: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save_hf(out, bases["plain"])
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    calls, rename = [], os.rename

    def failing(*paths: Any, **_: Any) -> None:
        calls.append(paths)
        if len(calls) == (2 if moment == "second rename" else 1):
            raise OSError(28, "No space left on device")
        rename(*paths)

    monkeypatch.setattr(
        "zflora_jax.hf.save.write_tensors" if moment == "write" else "os.rename", failing
    )
    with pytest.raises(OSError, match="No space left"):
        save_hf(out, bases["llama3"])
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert names(tmp_path) == {"out"}


def test_tokenizer_and_generation_config(bases: dict[str, Model], tmp_path: Path) -> None:
    """Byte for byte from the base's directory; from the tokenizer object where there is no
    directory; the same ids either way.
    """
    source, tokenizer = tmp_path / "base", byte_tokenizer()
    shutil.copytree(str(bases["plain"].source), source)
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3],   "do_sample": true}')
    model = load_model(source)
    assert model.config.eos_token_ids == (2, 3)
    save_hf(tmp_path / "out", model)
    candidates = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    copied = [n for n in (*candidates, "generation_config.json") if (source / n).exists()]
    assert len(copied) >= 3
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert load_model(tmp_path / "out").config == model.config

    save_hf(tmp_path / "written", Model(model.config, model.params, tokenizer))
    settings = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["chat_template"]
    generation = json.loads((tmp_path / "written" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    chat, text = [{"role": "user", "content": "1 + 1?"}], "héllo  12 <eos>\n"
    for path in ("out", "written"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / path)
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        for token in ("eos_token_id", "pad_token_id"):
            assert getattr(again, token) == getattr(tokenizer, token)
        prompts = [t.apply_chat_template(chat, tokenize=False) for t in (again, tokenizer)]
        assert prompts[0] == prompts[1]
    gap = export_gap(model, tmp_path / "out", ["hello", "12 + 30 = 42"])
    assert gap["max_abs_dlogit"] == 0 and gap["top1_agreement"] == 1


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
    file: str, change: dict[str, Any], words: str, out: Path
) -> None:
    values = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=words):
        load_model(out)


def test_a_missing_side_file_and_a_state_in_the_embedding_are_refused(
    fused: Model, out: Path
) -> None:
    """The state starts at zero: other software put a value there, and it would be dropped."""
    (out / SIDE_FOLDER).rename(out / "elsewhere")
    with pytest.raises(CheckpointError, match=r"lacks zflora/restore\.safetensors.*copy it"):
        load_model(out)
    (out / "elsewhere").rename(out / SIDE_FOLDER)
    tensors, name = load_file(out / "model.safetensors"), "model.embed_tokens.weight"
    tensors[name][3, fused.config.norm_dim] = 0.5
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} has channels from .* that are not zero"):
        load_model(out)


def test_card(bases: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    fused = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    fused.source = "some-org/some-llama"
    save_hf(tmp_path / "out", fused, card={"accuracy after": 0.71234, "task": "arithmetic"})
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        *("base_model: some-org/some-llama\n", "| accuracy after | 0.7123 |", "zflora-minimal"),
        "reconstruction of zFLoRA (arXiv 2510.25784)",
    ):
        assert words in text
    assert str(tmp_path) not in text + (tmp_path / "out" / "zflora.json").read_text()


def test_an_export_on_the_hub_is_the_export_on_disk(
    fused: Model, exported: Path, tmp_path: Path
) -> None:
    """In the hub's cache each file is a link into the blobs; one to elsewhere is refused."""
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    there = home / "snapshots" / "abc"
    for i, file in enumerate(path for path in exported.rglob("*") if path.is_file()):
        link = there / file.relative_to(exported)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, home / "blobs" / str(i))
        link.symlink_to(os.path.relpath(home / "blobs" / str(i), link.parent))
    loaded = load_model(there)
    assert_trees_equal(loaded.params, fused.params)
    assert model_config(there) == loaded.config  # of the model, not of its stock form
    side = there / SIDE_FOLDER / SIDE_FILE
    shutil.copy(side, tmp_path / "away")
    side.unlink()
    side.symlink_to(tmp_path / "away")
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        load_model(there)


def test_an_export_saved_again_by_transformers(
    fused: Model, exported: Path, tmp_path: Path
) -> None:
    """Its zflora.json is gone; with the files of the first export it is restored."""
    open_stock(exported).save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"'longrope' is not supported.*copy zflora\.json"):
        load_model(tmp_path / "again")
    shutil.copy(exported / "zflora.json", tmp_path / "again")
    shutil.copytree(exported / "zflora", tmp_path / "again" / "zflora")
    model = load_model(tmp_path / "again")
    assert model.adapter == fused.adapter and model.config == fused.config
    assert_trees_equal(model.params, fused.params)


def test_the_base_of_an_export_is_not_called_as_the_export(
    bases: dict[str, Model], exported: Path, tmp_path: Path
) -> None:
    """Adapters on it belong to the base; saved again, the export has the same base."""
    fused = load_model(exported)
    assert fused.source == str(exported) and fused.base == "plain"
    base, adapters = unfuse(fused)
    assert (base.source, base.base) == (fused.source, "plain")  # its other files are there still
    assert unfuse(swap(fuse(base, fused.adapter, adapters), adapters))[0].base == "plain"
    save_peft(tmp_path / "peft", base, LORA, perturbed_adapters(base, LORA))
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "plain"
    save_hf(tmp_path / "again", load_model(exported))
    manifest = json.loads((tmp_path / "again" / "zflora.json").read_text())
    assert manifest["base"]["name"] == "plain"
    base.tokenizer = byte_tokenizer()
    run = RunConfig("x", data=DataConfig(bucket_lengths=(16,)), adapter=LORA)
    assert as_base(run, base).base == "plain"
    again = unfuse(fuse(bases["plain"], fused.adapter, adapters))[0]
    assert (again.source, again.base) == (bases["plain"].source, None)
