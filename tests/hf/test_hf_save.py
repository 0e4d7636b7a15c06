"""Export: stock transformers computes what the fused model computes, load_model gets the fused
model back bit for bit, and no directory is lost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.checks import assert_logits_close
from support.exports import WIDENED, fused_model
from support.grids import always
from support.huggingface import TOKENS, hf_logits

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
# Widths that no server has kernels for are fine here.
pytestmark = pytest.mark.filterwarnings("ignore:head_dim")


def stock_logits(path: Path, dtype: Any = torch.float32) -> np.ndarray:
    return hf_logits(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())


def same(a: Model, b: Model) -> bool:
    one, two = trees.flatten(a.params), trees.flatten(b.params)
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "base"),
    always(
        [
            *((name, "plain") for name in WIDENED),
            ("zflora-minimal", "llama3"),
            ("zflora-uniform", "llama3"),
        ],
        lambda case: (
            case
            not in (
                ("zflora-minimal", "plain"),
                ("zflora-uniform", "llama3"),
                ("attention only", "plain"),  # kernels of uniform, the MLP of the base
            )
        ),
    ),
)
def test_widened_exports(name: str, base: str, bases: dict[str, Model], tmp_path: Path) -> None:
    fused = fused_model(bases[base], WIDENED[name])
    report = save_hf(tmp_path / "out", fused)
    expected = np.asarray(forward(fused, jnp.asarray(TOKENS)))
    assert (
        np.abs(expected - stock_logits(Path(str(bases[base].source)))).max()
        > 0.1 * np.abs(expected).max()
    )
    assert_logits_close(stock_logits(tmp_path / "out"), expected)

    again = load_model(tmp_path / "out")
    assert same(again, fused) and again.config == fused.config and again.adapter == fused.adapter
    stripped, adapters = unfuse(again)
    assert same(stripped, bases[base]) and stripped.config == bases[base].config
    assert all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(unfuse(fused)[1]), strict=True)
    )
    assert METHODS[WIDENED[name].method].source in (tmp_path / "out" / "README.md").read_text()
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
    assert_logits_close(
        stock_logits(tmp_path / "out"), np.asarray(forward(fused, jnp.asarray(TOKENS)))
    )
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
    assert_logits_close(
        stock_logits(tmp_path / "out"), np.asarray(forward(fused, jnp.asarray(TOKENS)))
    )
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
    assert_logits_close(
        stock_logits(tmp_path / "out"), expected, 0.1 if dtype == "bfloat16" else 0.02
    )
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


# --- what lies beside the tensors -----------------------------------------------------------------


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
