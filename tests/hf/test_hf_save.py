"""Export: stock transformers computes what the fused model computes, and load_model gets the fused
model back bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import WIDENED, fused_model
from support.grids import always
from support.huggingface import TOKENS, hf_logits, open_stock

from zflora_jax.adapters.fuse import unfuse
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.shards import write_tensors
from zflora_jax.hf.stock import FLOAT16_LEAST, choose_eps_z
from zflora_jax.nn.llama import forward

MERGED = {
    name: AdapterConfig(name, **({} if name == "full" else {"rank": 4}))
    for name, row in METHODS.items()
    if not row.widens
}
SOAK = [("zflora-minimal", "plain"), ("zflora-uniform", "llama3"), ("attention only", "plain")]
# Widths that no server has kernels for are fine here.
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


def logits(model: Model) -> np.ndarray:
    return np.asarray(forward(model, jnp.asarray(TOKENS)))


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zflora.json").read_text())


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("name", "base"),
    always(
        [*((name, "plain") for name in WIDENED), ("zflora-minimal", "llama3"), SOAK[1]],
        lambda case: case not in SOAK,
    ),
)
def test_widened_exports(name: str, base: str, bases: dict[str, Model], tmp_path: Path) -> None:
    model = bases[base]
    fused = fused_model(model, WIDENED[name])
    report, wanted = save_hf(tmp_path / "out", fused), logits(fused)
    assert np.abs(wanted - logits(model)).max() > 0.1 * np.abs(wanted).max()
    assert_logits_close(hf_logits(open_stock(tmp_path / "out")), wanted)

    again = load_model(tmp_path / "out")
    assert_trees_equal(again.params, fused.params)
    assert again.config == fused.config and again.adapter == fused.adapter
    stripped, adapters = unfuse(again)
    assert_trees_equal(stripped.params, model.params)
    assert_trees_equal(adapters, unfuse(fused)[1])
    assert stripped.config == model.config
    fingerprint = manifest(tmp_path / "out")["base"]["fingerprint"]
    assert fingerprint == trees.fingerprint(model.params)
    assert METHODS[WIDENED[name].method].source in (tmp_path / "out" / "README.md").read_text()
    assert f"MLP {fused.config.intermediate_size}" in report["widths"]
    assert set(report["files"]) == files(tmp_path / "out")
    gap = export_gap(fused, tmp_path / "out", TOKENS[:1])
    assert gap["max_abs_dlogit"] <= 1e-5 * gap["logit_scale"] and gap["top1_agreement"] == 1.0


@pytest.mark.parametrize("name", MERGED)
def test_merged_exports(name: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], MERGED[name])
    save_hf(tmp_path / "out", fused, base_fingerprint="abc")
    assert_logits_close(hf_logits(open_stock(tmp_path / "out")), logits(fused))
    again = load_model(tmp_path / "out", scan_layers=False)
    assert again.adapter == fused.adapter
    assert trees.fingerprint(again.params) == trees.fingerprint(fused.params)
    assert manifest(tmp_path / "out")["base"]["fingerprint"] == "abc"
    assert not (tmp_path / "out" / "zflora").exists()


def test_a_base_is_saved_as_it_was_loaded(bases: dict[str, Model], tmp_path: Path) -> None:
    save_hf(tmp_path / "out", bases["llama3"])
    folders = (tmp_path / "out", Path(str(bases["llama3"].source)))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


def test_separate_layers_and_shards(bases: dict[str, Model], tmp_path: Path) -> None:
    base = load_model(str(bases["plain"].source), scan_layers=False)
    fused = fused_model(base, WIDENED["zflora-uniform"])
    report = save_hf(tmp_path / "out", fused, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == report["parameters"]
    shards = [tmp_path / "out" / file for file in set(index["weight_map"].values())]
    assert len(shards) > 2 and all(file.stat().st_size < 70_000 for file in shards)
    assert_logits_close(hf_logits(open_stock(tmp_path / "out")), logits(fused))
    assert_trees_equal(load_model(tmp_path / "out", scan_layers=False).params, fused.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-uniform"])
    save_hf(tmp_path / "out", fused, dtype=dtype)
    eps_z = manifest(tmp_path / "out")["eps_z"]
    assert eps_z == choose_eps_z(fused, dtype) >= FLOAT16_LEAST
    again = load_model(tmp_path / "out")
    flat = trees.flatten(again.params)
    for name, leaf in trees.flatten(fused.params).items():
        # Rounded to the stored dtype once; float16's subnormals cost the state a bit.
        rounded = np.asarray(leaf).astype(jnp.dtype(dtype)).astype(np.float32)
        atol = 2**-20 if dtype == "float16" else 0
        np.testing.assert_allclose(flat[name], rounded, rtol=0, atol=atol, err_msg=name)
    round_trip = lambda _, leaf: leaf.astype(dtype).astype(jnp.float32)  # noqa: E731
    wanted = trees.map_with_names(round_trip, bases["plain"].params)
    assert_trees_equal(unfuse(again)[0].params, wanted)
    share = 0.1 if dtype == "bfloat16" else 0.02
    assert_logits_close(hf_logits(open_stock(tmp_path / "out")), logits(fused), share)
    with jax.numpy_dtype_promotion("standard"):  # jax's own bfloat16 attention needs it
        gap = export_gap(fused, tmp_path / "out", TOKENS[:1])
    assert 0 < gap["max_abs_dlogit"] < 0.2 * gap["logit_scale"]
    if dtype == "bfloat16":
        kept = load_model(tmp_path / "out", "bfloat16")
        save_hf(tmp_path / "twice", kept)
        assert_trees_equal(load_model(tmp_path / "twice", "bfloat16").params, kept.params)


@pytest.mark.parametrize(
    ("kernel", "value", "settings", "words"),
    [
        # Fits float16, but not once divided by eps_z = 2^-4.
        ("attn/q", 5000.0, {"dtype": "float16"}, r"1\.self_attn\.q_proj.*range of float16"),
        ("mlp/up", np.nan, {}, r"layers\.1\.mlp\.up_proj\.weight holds NaN"),
        ("mlp/up", 1.0, {"dtype": "int8"}, "int8"),
        (None, 1.0, {}, "packed"),
    ],
)
def test_refusals_leave_nothing_behind(
    kernel: str | None,
    value: float,
    settings: dict[str, str],
    words: str,
    bases: dict[str, Model],
    tmp_path: Path,
) -> None:
    fused = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    if kernel is None:
        fused = pack_for_decode(fused)
    else:
        block, name = kernel.split("/")
        leaf = fused.params["layers"][block][name]
        leaf["kernel"] = leaf["kernel"].at[1, 50].set(value)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        save_hf(tmp_path / "out", fused, **settings)
    assert list(tmp_path.iterdir()) == []


SHAPES = {"b.weight": (3, 5), "a": (4,), "layers.10": (2, 2), "layers.9": (1, 7)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors(
    dtype: str, metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    draw, asked = np.random.default_rng(0), []
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensors = {name: draw.standard_normal(shape).astype(stored) for name, shape in SHAPES.items()}
    specs = {name: (shape, dtype) for name, shape in SHAPES.items()}

    def tensor(name: str) -> np.ndarray:
        asked.append(name)
        return np.asfortranarray(tensors[name])  # as a transposed view is

    write_tensors(tmp_path / "ours", specs, tensor, metadata)
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_tensors(None, specs, tensor, metadata)  # another process writes
    assert asked == 2 * sorted(SHAPES)


@pytest.mark.parametrize("wrong", [np.zeros((4, 1), np.float32), np.zeros(4, np.float16)])
def test_a_tensor_of_another_shape_or_dtype_is_refused(wrong: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is .* announced: \(4,\) float32"):
        write_tensors(tmp_path / "file", {"a": ((4,), "float32")}, lambda _: wrong)
