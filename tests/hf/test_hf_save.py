"""Export: stock transformers computes what the fused model computes, and load_model gets the fused
model back bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
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
from zflora_jax.hf.state_scale import FLOAT16_LEAST, choose_eps_z
from zflora_jax.hf.stock import StockForm
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


def test_float16_refuses_values_beyond_its_range(bases: dict[str, Model], tmp_path: Path) -> None:
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
    up = fused.params["layers"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[0, 0, 0].set(np.nan)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN"):
        save_hf(tmp_path / "out", fused)
    assert list(tmp_path.iterdir()) == []


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
