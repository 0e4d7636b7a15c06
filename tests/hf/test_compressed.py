"""Exports with quantised kernels: codes and scales of the base are copied, an adapter's rows share
them with a known error, and what cannot be written is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from support.checks import assert_logits_close
from support.grids import always, pairwise
from support.models import perturb, tiny_model
from support.quantized import WIDENED, how, moved, quantized_tiny

from zflora_jax import AdapterConfig, forward, fuse, load_model, quantize_model, save_hf
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.experiments.exporters import EXPORTERS
from zflora_jax.hf.compressed_types import pack, unpack
from zflora_jax.hf.keys import hf_table
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.stock import module_of

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
pytestmark = pytest.mark.filterwarnings("ignore:head_dim 32")
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


def smaller(tree: trees.Tree) -> trees.Tree:
    """Adapters as training leaves them: rows far smaller than the base's."""
    return trees.map_with_names(
        lambda name, x: 0.1 * x if name.endswith(("backward", "cross")) else x, tree
    )


def quantised(kind: str, method: str = "base", **changes: Any) -> Model:
    base = tiny_model(**({"head_dim": 32} | changes))
    coded = quantize_model(base, how(kind, 32 if kind == "int4" else 0))
    if method == "base":
        return coded
    return fuse(coded, WIDENED[method], smaller(moved(base, WIDENED[method])))


def stored(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def codes_of(tensors: dict[str, np.ndarray], stem: str, bits: int) -> np.ndarray:
    """Codes [out, in], unpacked one by one: low bits first, counted from the lowest code."""
    if stem + "weight" in tensors:
        return tensors[stem + "weight"]
    words, (rows, width) = tensors[stem + "weight_packed"], tensors[stem + "weight_shape"]
    found = np.zeros((rows, width), np.int64)
    for i in range(width):
        word = words[:, i // (32 // bits)].astype(np.int64) % (1 << 32)
        found[:, i] = (word >> (bits * (i % (32 // bits)))) % (1 << bits) - (1 << (bits - 1))
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 37])
def test_packing(bits: int, width: int) -> None:
    low = 1 << (bits - 1)
    codes = np.random.default_rng(0).integers(-low, low, (5, width)).astype(np.int8)
    words = pack(codes, bits)
    assert words.dtype == np.int32 and words.shape == (5, -(-width * bits // 32))
    np.testing.assert_array_equal(unpack(words, bits, width), codes)
    tensors = {"a.weight_packed": words, "a.weight_shape": np.array([5, width])}
    np.testing.assert_array_equal(codes_of(tensors, "a.", bits), codes)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # of what the package imports
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_the_package(bits: int) -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized import helpers

    low = 1 << (bits - 1)
    codes = np.random.default_rng(0).integers(-low, low, (5, 24)).astype(np.int8)
    theirs = helpers.pack_to_int32(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(pack(codes, bits), theirs.numpy())


# --- the base's codes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "method"), pairwise(["int8", "w8a8", "int4"], ["base", *WIDENED])
)
def test_the_codes_and_scales_of_the_base_are_copied(
    quant: str, method: str, tmp_path: Path
) -> None:
    kind = "int4" if quant == "int4" else "int8"
    base, fused = quantised(kind), quantised(kind, method)
    save_hf(tmp_path / "x", fused, quant=quant)
    tensors, leaves = stored(tmp_path / "x"), trees.flatten(base.params)
    hf = json.loads((tmp_path / "x" / "config.json").read_text())
    head, wide = base.config.head_dim, hf["head_dim"]
    order = (
        np.arange(head) if wide == head else np.r_[0 : head // 2, wide // 2 : (wide + head) // 2]
    )
    for name, place in hf_table(base.config).items():
        kernel = module_of(place)
        if kernel not in KERNELS:
            continue
        leaf, stem = leaves[place.leaf], name.removesuffix("weight")
        codes = codes_of(tensors, stem, 4 if kind == "int4" else 8)
        scales = np.asarray(tensors[stem + "weight_scale"], np.float32)
        outputs, inputs = np.arange(place.hf_shape[0]), np.arange(place.hf_shape[1])
        if kernel in "qkv":  # heads with the adapter's dims behind or between the base's
            dims = order if kernel in "qk" else np.arange(head)
            outputs = (np.arange(len(outputs) // head)[:, None] * wide + dims).ravel()
        if kernel == "o":
            inputs = (np.arange(len(inputs) // head)[:, None] * wide + np.arange(head)).ravel()
        want = np.asarray(leaf.codes[place.layer]).astype(np.int8)
        np.testing.assert_array_equal(codes[np.ix_(outputs, inputs)], place.to_hf(want))
        scale = np.asarray(leaf.scales[place.layer], np.float32)
        scale = scale.reshape(-1, len(outputs)).T
        if kernel == "q":
            scale = scale * np.float32(np.sqrt(wide / head))
        groups = inputs[:: leaf.group] // leaf.group if leaf.group else [0]
        np.testing.assert_array_equal(scales[np.ix_(outputs, groups)], scale)


@pytest.mark.parametrize(("quant", "method"), pairwise(["int8", "int4"], ["base", *WIDENED]))
def test_the_export_computes_what_the_model_does(quant: str, method: str, tmp_path: Path) -> None:
    """int4 has groups for an adapter's rows, so nothing is rounded; int8 rounds them once more."""
    fused = quantised(quant, method)
    save_hf(tmp_path / "x", fused, quant=quant)
    found, want = forward(load_stock(tmp_path / "x"), TOKENS), forward(fused, TOKENS)
    if quant == "int4" or method == "base":
        assert_logits_close(found, want)
    assert np.abs(found - want).max() < 0.02 * np.abs(want).max()
    gap = export_gap(fused, tmp_path / "x", TOKENS)
    assert gap["top1_agreement"] > 0.95 and gap["max_abs_dlogit"] < 0.02 * gap["logit_scale"]


@pytest.mark.parametrize(
    ("quant", "method"), pairwise(["int8", "int4"], ["base", "lora", *WIDENED])
)
def test_numbers_are_quantised_here(quant: str, method: str, tmp_path: Path) -> None:
    model, group = tiny_model(head_dim=32), 32 if quant == "int4" else 0
    adapter = WIDENED.get(method, AdapterConfig("lora", rank=4))
    if method != "base":
        model = fuse(model, adapter, smaller(moved(model, adapter)))
    save_hf(tmp_path / "x", model, quant="int4-g32" if group else "int8")
    found, want = forward(load_stock(tmp_path / "x"), TOKENS), forward(model, TOKENS)
    limit = 0.3 if quant == "int4" else 0.03
    assert np.abs(found - want).mean() < limit * np.abs(want).mean()


# --- families, widths, dtype ----------------------------------------------------------------------


# The others' kernels are stored as qwen2's.
@pytest.mark.parametrize(
    "family",
    always(["mistral", "qwen2", "qwen3", "smollm3"], lambda name: name in ("qwen2", "qwen3")),
)
def test_every_family(family: str, tmp_path: Path) -> None:
    fused = quantised("int4", "zflora-uniform", family=family)
    save_hf(tmp_path / "x", fused, quant="int4")
    assert_logits_close(forward(load_stock(tmp_path / "x"), TOKENS), forward(fused, TOKENS))


def test_widths_are_multiples_of_groups_and_heads(tmp_path: Path) -> None:
    fused = quantised("int4", "zflora-minimal", hidden_size=96, num_heads=6, num_kv_heads=2)
    report = save_hf(tmp_path / "x", fused, quant="int4")
    assert report["filled with zeros"] == "hidden 102 -> 192, MLP 106 -> 128"  # 6 and 32: 96
    assert report["groups of inputs"] == "32: q, k, v, o, gate, up, down"
    fused = quantised("int4", "zflora-minimal", hidden_size=96, num_heads=6, family="qwen3")
    assert "hidden 102 -> 128" in save_hf(tmp_path / "x", fused, quant="int4")["filled with zeros"]
    fused = quantised("int4", "zflora-uniform")
    assert "head 48 -> 64" in save_hf(tmp_path / "x", fused, quant="int4")["filled with zeros"]
    report = save_hf(tmp_path / "x", quantised("int8", "zflora-minimal"), quant="int8")
    assert report["filled with zeros"] == "hidden 70 -> 72, MLP 106 -> 108"


def test_heads_smaller_than_a_group_have_groups_of_their_own(tmp_path: Path) -> None:
    model = tiny_model(head_dim=32, hidden_size=64, intermediate_size=128)
    report = save_hf(tmp_path / "x", model, quant="int4-g64")
    assert report["groups of inputs"] == "64: q, k, v, gate, up, down; 32: o"
    groups = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    assert [g["weights"]["group_size"] for g in groups.values()] == [64, 32]
    assert groups["group_1"]["targets"] == ["re:.*o_proj$"]
    found = stored(tmp_path / "x")
    assert found["model.layers.0.self_attn.o_proj.weight_scale"].shape == (64, 4)
    assert np.isfinite(forward(load_stock(tmp_path / "x"), TOKENS)).all()


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_and_shards(tied: bool, tmp_path: Path) -> None:
    fused = quantised("int4", "zflora-minimal", tie_word_embeddings=tied)
    save_hf(tmp_path / "x", fused, quant="int4", dtype="bfloat16", max_shard_bytes=50_000)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    gap = export_gap(fused, tmp_path / "x", TOKENS)
    assert gap["max_abs_dlogit"] < 0.1 * gap["logit_scale"]


def test_unstacked_layers_give_the_same_file(tmp_path: Path) -> None:
    fused = quantised("int8", "zflora-uniform")
    flat = trees.unstack_layers(fused.params, fused.config.num_layers)
    other = Model(fused.config.replace(scan_layers=False), flat, adapter=fused.adapter)
    for folder, model in (("a", fused), ("b", other)):
        save_hf(tmp_path / folder, model, quant="int8")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert a == b


# --- scales, report, config -----------------------------------------------------------------------


def test_eps_z_is_the_one_of_the_smallest_error(tmp_path: Path) -> None:
    fused, gaps = quantised("int8", "zflora-minimal"), {}
    chosen = save_hf(tmp_path / "x", fused, quant="int8")
    assert chosen["error of the state's rows"].endswith(("size", "clipped"))
    for k in range(0, 11, 2):
        report = save_hf(tmp_path / "x", fused, quant="int8", eps_z=2.0**-k)
        assert report["eps_z"] == 2.0**-k
        gaps[2.0**-k] = export_gap(fused, tmp_path / "x", TOKENS)["mean_abs_dlogit"]
    save_hf(tmp_path / "x", fused, quant="int8")
    best = export_gap(fused, tmp_path / "x", TOKENS)["mean_abs_dlogit"]
    assert best < 1.5 * min(gaps.values()) and best < 0.1 * gaps[2.0**-10], (best, gaps)


def test_eps_z_is_smaller_where_norms_bear_less(tmp_path: Path) -> None:
    """Adapters that move much: the rows alone are stored best with 1/2, the norms want less."""
    base, adapter = quantized_tiny("int8", family="qwen3"), WIDENED["zflora-uniform"]
    start = init_adapters(jax.random.key(0), base, adapter)
    fused, gaps = fuse(base, adapter, perturb(start, 1, std=0.02)), {}
    for eps_z in (0.5, 0.25, 0.125):
        save_hf(tmp_path / "x", fused, quant="int8", eps_z=eps_z)
        gaps[eps_z] = export_gap(fused, tmp_path / "x", TOKENS)["mean_abs_dlogit"]
    assert save_hf(tmp_path / "x", fused, quant="int8")["eps_z"] == min(gaps, key=gaps.__getitem__)


def test_units_of_any_size_keep_their_digits(tmp_path: Path) -> None:
    """Rows of down a thousand times too large, and columns of up as much too small."""
    model, adapter = tiny_model(head_dim=32), WIDENED["ffba"]
    adapters = trees.flatten(smaller(moved(model, adapter)))
    for name in adapters:
        factor = {"down/backward": 512.0, "up/forward": 1 / 512}
        adapters[name] = adapters[name] * factor.get("/".join(name.split("/")[-2:]), 1.0)
    fused = fuse(quantize_model(model, how("int8", 0)), adapter, trees.unflatten(adapters))
    save_hf(tmp_path / "x", fused, quant="int8")
    found, want = forward(load_stock(tmp_path / "x"), TOKENS), forward(fused, TOKENS)
    assert np.abs(found - want).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("quant", ["int8", "w8a8", "int4"])
def test_config_and_report(quant: str, tmp_path: Path) -> None:
    fused = quantised("int4" if quant == "int4" else "int8", "zflora-minimal")
    report = save_hf(tmp_path / "x", fused, quant=quant)
    files = {str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("*") if p.is_file()}
    assert files == set(report["files"]) and report["quant"].startswith(f"{quant}: ")
    assert report["eps_z"] <= 1 and report["widths"].startswith("hidden")
    found = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    (group,) = found["config_groups"].values()
    assert found["quant_method"] == "compressed-tensors" and "lm_head" in found["ignore"]
    assert found["quantization_status"] == "compressed" and group["targets"] == ["Linear"]
    packed = "int-quantized" if quant == "w8a8" else "pack-quantized"
    assert found["format"] == group["format"] == packed
    weights = {key: group["weights"][key] for key in ("num_bits", "strategy", "group_size")}
    channel = {"num_bits": 8, "strategy": "channel", "group_size": None}
    in_groups = {"num_bits": 4, "strategy": "group", "group_size": 32}
    assert weights == (in_groups if quant == "int4" else channel)
    assert (group["input_activations"] is None) == (quant != "w8a8")
    card = (tmp_path / "x" / "README.md").read_text()
    assert "pip install compressed-tensors" in card and "unfuse" not in card
    save_hf(tmp_path / "x", fused)  # an export of this project, which may be replaced


def test_load_model_says_what_to_load_instead(tmp_path: Path) -> None:
    save_hf(tmp_path / "x", quantised("int8"), quant="int8")
    with pytest.raises(ConfigError, match=r"packed weights.*without --quant"):
        load_model(tmp_path / "x")


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "group", "settings", "message"),
    [
        (None, 0, {"quant": "int3"}, "quant='int3'.*int4.*--format gguf"),
        (None, 0, {"quant": "int8", "dtype": "float16"}, "dtype='float16'.*float32 or bfloat16"),
        (None, 0, {"quant": "int8", "eps_z": 0.3}, "power of two"),
        ("nf4", 32, {"quant": "int4"}, "stored as nf4"),
        ("int8", 32, {"quant": "int8"}, "a scale for 32 inputs"),
        ("int8", 0, {"quant": "int4"}, "stored as int8"),
        ("int4", 32, {"quant": "int4-g64"}, "a scale for 32 inputs"),
    ],
)
def test_what_cannot_be_written_is_refused(
    kind: str | None, group: int, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny_model(head_dim=32)
    model = model if kind is None else quantize_model(model, how(kind, group))
    with pytest.raises(ConfigError, match=message):
        save_hf(tmp_path / "x", model, **settings)
    assert not (tmp_path / "x").exists()


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16 inputs are no multiple of 32"):
        save_hf(tmp_path / "x", tiny_model(), quant="int4")


def test_the_command_refuses_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant='int5'"):
        EXPORTERS["hf"].check(tmp_path, quant="int5")
    EXPORTERS["hf"].check(tmp_path, quant="int8", dtype="bfloat16", eps_z=None)


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    model = quantised("int8")
    leaf = model.params["layers"]["mlp"]["up"]["kernel"]
    broken = replace(leaf, scales=leaf.scales.at[1].set(jnp.nan))
    model.params["layers"]["mlp"]["up"]["kernel"] = broken
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        save_hf(tmp_path / "x", model, quant="int8")


def test_a_file_that_was_changed_is_named(tmp_path: Path) -> None:
    save_hf(tmp_path / "x", quantised("int8"), quant="int8")
    manifest = json.loads((tmp_path / "x" / "zflora.json").read_text())
    (tmp_path / "x" / "zflora.json").write_text(json.dumps(manifest | {"quant": "int4"}))
    with pytest.raises(CheckpointError, match="words"):
        load_stock(tmp_path / "x")
