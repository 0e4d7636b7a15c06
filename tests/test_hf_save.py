"""Export: stock transformers computes what the fused model computes, load_model gets the fused
model back bit for bit, and no directory is lost.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.byte_tokenizer import byte_tokenizer
from support.huggingface import LLAMA3, TOKENS, assert_close, hf_logits, hf_model
from support.models import perturb

from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.hf.keys import CheckpointError
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.state_scale import FLOAT16_LEAST, choose_eps_z
from zflora_jax.hf.stock import StockForm
from zflora_jax.nn.llama import forward

WIDENED = {
    "ffba": AdapterConfig("ffba", rank=4, extra_head_dim=8, extra_mlp_units=6),
    "zflora-minimal": AdapterConfig(
        "zflora-minimal", rank=5, extra_mlp_units=6
    ),  # 48 + 5 is no multiple of 4 heads: padded to 56
    "zflora-uniform": AdapterConfig("zflora-uniform", rank=8, extra_head_dim=4, extra_mlp_units=6),
    "zflora-uniform, values only": AdapterConfig(
        "zflora-uniform", rank=4, extra_head_dim=4, extra_mlp_units=6, head_scores=False
    ),
    "attention only": AdapterConfig(
        "zflora-uniform", rank=4, extra_head_dim=8, targets="attention"
    ),
}
MERGED = {
    name: AdapterConfig(name, **({} if name == "full" else {"rank": 4}))
    for name in ("lora", "ffa", "full")
}
# Widths that no server has kernels for are fine here.
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


def fused_model(base: Model, adapter: AdapterConfig) -> Model:
    """Fused with every adapter leaf perturbed, so that no block is zero."""
    return fuse(base, adapter, perturb(init_adapters(jax.random.key(0), base, adapter), std=0.05))


def stock_logits(path: Path, dtype: Any = torch.float32) -> np.ndarray:
    return hf_logits(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())


def same(a: Model, b: Model) -> bool:
    one, two = trees.flatten(a.params), trees.flatten(b.params)
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """ "plain": untied, GQA; "llama3": tied, Llama-3 RoPE scaling, head_dim other than d/H."""
    models = {}
    for name, changes in {
        "plain": {},
        "llama3": {"rope": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    }.items():
        path = tmp_path_factory.mktemp("base") / name
        hf_model(**changes).save_pretrained(path)
        models[name] = load_model(path)
    return models


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *((name, "plain") for name in WIDENED),
        ("zflora-minimal", "llama3"),
        ("zflora-uniform", "llama3"),
    ],
)
def test_widened_exports(name: str, base: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases[base], WIDENED[name])
    report = save_hf(tmp_path / "out", fused)
    expected = np.asarray(forward(fused, jnp.asarray(TOKENS)))
    assert (
        np.abs(expected - stock_logits(Path(str(bases[base].source)))).max()
        > 0.1 * np.abs(expected).max()
    )
    assert_close(stock_logits(tmp_path / "out"), expected)

    again = load_model(tmp_path / "out")
    assert same(again, fused) and again.config == fused.config and again.adapter == fused.adapter
    stripped, adapters = unfuse(again)
    assert same(stripped, bases[base]) and stripped.config == bases[base].config
    assert all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(unfuse(fused)[1]), strict=True)
    )
    manifest = json.loads((tmp_path / "out" / "zflora.json").read_text())
    assert (
        manifest["base"]["fingerprint"]
        == trees.fingerprint(stripped.params)
        == trees.fingerprint(bases[base].params)
    )
    assert (
        "no multiple of 32" in report["widths"]
        and f"MLP {fused.config.intermediate_size}" in report["widths"]
    )
    assert set(report["files"]) == {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }

    gap = export_gap(fused, tmp_path / "out", TOKENS[:1])
    assert gap["max_abs_dlogit"] <= 1e-5 * gap["logit_scale"] and gap["top1_agreement"] == 1.0


@pytest.mark.parametrize("name", MERGED)
def test_merged_exports(name: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], MERGED[name])
    save_hf(tmp_path / "out", fused, base_fingerprint="abc")
    assert_close(stock_logits(tmp_path / "out"), np.asarray(forward(fused, jnp.asarray(TOKENS))))
    again = load_model(tmp_path / "out", scan_layers=False)
    assert again.adapter == fused.adapter and trees.fingerprint(again.params) == trees.fingerprint(
        fused.params
    )
    assert (
        json.loads((tmp_path / "out" / "zflora.json").read_text())["base"]["fingerprint"] == "abc"
    )
    assert not (tmp_path / "out" / "zflora").exists()


def test_a_base_is_saved_as_it_was_loaded(bases: dict[str, Model], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save_hf(tmp_path / "out", bases["llama3"])
    ours, theirs = (
        load_file(Path(p) / "model.safetensors")
        for p in (tmp_path / "out", str(bases["llama3"].source))
    )
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


def test_layers_apart_and_shards(bases: dict[str, Model], tmp_path: Path) -> None:
    base = load_model(str(bases["plain"].source), scan_layers=False)
    fused = fused_model(base, WIDENED["zflora-uniform"])
    report = save_hf(tmp_path / "out", fused, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_parameters"] == report["parameters"]
        and len(set(index["weight_map"].values())) > 2
    )
    assert_close(stock_logits(tmp_path / "out"), np.asarray(forward(fused, jnp.asarray(TOKENS))))
    assert same(load_model(tmp_path / "out", scan_layers=False), fused)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-uniform"])
    save_hf(tmp_path / "out", fused, dtype=dtype)
    assert (
        json.loads((tmp_path / "out" / "zflora.json").read_text())["eps_z"]
        == choose_eps_z(fused, dtype)
        >= FLOAT16_LEAST
    )
    again = load_model(tmp_path / "out")
    for name, leaf in (
        trees.flatten(fused.params).items()
    ):  # the model rounded to the stored dtype once; float16's subnormals cost the state a bit
        rounded = np.asarray(leaf).astype(jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_allclose(
            trees.flatten(again.params)[name],
            rounded,
            rtol=0,
            atol=2**-20 if dtype == "float16" else 0,
            err_msg=name,
        )
    base = trees.map_with_names(
        lambda _, leaf: leaf.astype(dtype).astype(jnp.float32), bases["plain"].params
    )
    assert same(unfuse(again)[0], Model(bases["plain"].config, base))
    expected = np.asarray(forward(fused, jnp.asarray(TOKENS)))
    assert_close(stock_logits(tmp_path / "out"), expected, 0.1 if dtype == "bfloat16" else 0.02)
    with jax.numpy_dtype_promotion("standard"):  # jax's own bfloat16 attention needs it
        gap = export_gap(fused, tmp_path / "out", TOKENS[:1])
    assert 0 < gap["max_abs_dlogit"] < 0.2 * gap["logit_scale"]
    if dtype == "bfloat16":
        kept = load_model(tmp_path / "out", "bfloat16")
        save_hf(tmp_path / "twice", kept)
        assert same(load_model(tmp_path / "twice", "bfloat16"), kept)


def test_float16_refuses_what_it_cannot_hold(bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    leaf = fused.params["layers"]["attn"]["q"]["kernel"]
    # Fits float16, but not once divided by eps_z = 2^-4.
    fused.params["layers"]["attn"]["q"]["kernel"] = leaf.at[1, 50].set(5000.0)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.*range of float16"):
        save_hf(tmp_path / "out", fused, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_refusals_leave_nothing_behind(bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    with pytest.raises(ConfigError, match="packed"):
        save_hf(tmp_path / "out", pack_for_decode(fused))
    with pytest.raises(ConfigError, match="int8"):
        save_hf(tmp_path / "out", fused, dtype="int8")
    fused.params["layers"]["mlp"]["up"]["kernel"] = (
        fused.params["layers"]["mlp"]["up"]["kernel"].at[0, 0, 0].set(np.nan)
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        save_hf(tmp_path / "out", fused)
    assert list(tmp_path.iterdir()) == []


# --- the directory --------------------------------------------------------------------------------


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
        monkeypatch.setattr("safetensors.numpy.save_file", full)
    else:
        monkeypatch.setattr("os.rename", failing)
    with pytest.raises(OSError, match="No space left"):
        save_hf(out, bases["llama3"])
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


# --- what lies beside the tensors -----------------------------------------------------------------


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
    with pytest.warns(UserWarning, match="recovered by arithmetic"):
        again = load_model(tmp_path / "out")
    for name, leaf in trees.flatten(again.params).items():
        np.testing.assert_allclose(leaf, trees.flatten(fused.params)[name], rtol=2e-7, atol=1e-9)
    assert_close(
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
    )
    assert str(tmp_path) not in text + (tmp_path / "out" / "zflora.json").read_text()


def test_head_order_pairs_base_dims(bases: dict[str, Model]) -> None:
    """HF rotates dim i with dim i + (k+e)/2: base pairs must be (i, i + k/2), adapter dims must
    pair among themselves.
    """
    config = fused_model(bases["plain"], WIDENED["zflora-uniform"]).config
    order, k, wide = StockForm(config, 1.0).head_order, config.rotary_dim, config.head_dim
    assert sorted(order) == list(range(wide))
    for i in range(wide // 2):
        a, b = order[i], order[i + wide // 2]
        assert (b == a + k // 2 and a < k // 2) if i < k // 2 else (a >= k and b >= k)
