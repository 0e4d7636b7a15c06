"""Exports with quantised kernels: codes and scales of the base are copied, an adapter's rows share
them with a known error, and other kernels are refused.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.checks import TOLERANCE
from support.exports import perturbed_adapters
from support.grids import always, in_turn
from support.models import tiny_model
from support.quantized import WIDENED, how

from zflora_jax import AdapterConfig, export_gap, forward, fuse, load_model, quantize_model, save_hf
from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.experiments.export import EXPORTERS
from zflora_jax.hf.compressed import pack, unpack
from zflora_jax.hf.keys import hf_table
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.stock import module_of

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
pytestmark = [
    pytest.mark.filterwarnings("ignore:head_dim 32"),
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # in what compressed-tensors imports
]


def fused(base: Model, adapter: AdapterConfig, floats: Model | None = None) -> Model:
    """`base` fused with adapters as training leaves them: rows far smaller than the base's."""
    adapters = trees.map_with_names(
        lambda name, x: 0.1 * x if name.endswith(("backward", "cross")) else x,
        perturbed_adapters(floats or base, adapter, std=0.1),
    )
    return fuse(base, adapter, adapters)


def quantised(kind: str, method: str = "base", **changes: Any) -> Model:
    floats = tiny_model(**({"head_dim": 32} | changes))
    base = quantize_model(floats, how(kind, 32 if kind == "int4" else 0))
    return base if method == "base" else fused(base, WIDENED[method], floats)


def difference(folder: Path, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """(|logits of the export minus the model's|, |the model's|)."""
    found, want = forward(load_stock(folder), TOKENS), np.asarray(forward(model, TOKENS))
    return np.abs(found - want), np.abs(want)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 37])
def test_packing_is_that_of_the_package(bits: int, width: int) -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized import helpers

    low = 1 << (bits - 1)
    codes = np.random.default_rng(0).integers(-low, low, (5, width)).astype(np.int8)
    words = pack(codes, bits)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(words, helpers.pack_to_int32(torch.from_numpy(codes), bits))
    np.testing.assert_array_equal(unpack(words, bits, width), codes)


@pytest.mark.parametrize(("quant", "method"), in_turn(["int8", "w8a8", "int4"], ["base", *WIDENED]))
def test_the_codes_and_scales_of_the_base_are_copied(
    quant: str, method: str, tmp_path: Path
) -> None:
    kind = "int4" if quant == "int4" else "int8"
    base = quantised(kind)
    save_hf(tmp_path / "x", quantised(kind, method), quant=quant)
    tensors, leaves = load_file(tmp_path / "x" / "model.safetensors"), trees.flatten(base.params)
    head, wide = base.config.head_dim, config_of(tmp_path / "x")["head_dim"]
    half = head // 2
    order = np.arange(head) if wide == head else np.r_[0:half, wide // 2 : wide // 2 + half]
    for name, place in hf_table(base.config).items():
        kernel = module_of(place)
        if kernel not in KERNELS:
            continue
        leaf, stem = leaves[place.leaf], name.removesuffix("weight")
        codes = tensors.get(name)
        if codes is None:
            width = int(tensors[stem + "weight_shape"][1])
            codes = unpack(tensors[stem + "weight_packed"], 4 if kind == "int4" else 8, width)
        outputs, inputs = np.arange(place.hf_shape[0]), np.arange(place.hf_shape[1])
        if kernel in "qkv":  # heads with the adapter's dims behind or between the base's
            dims = order if kernel in "qk" else np.arange(head)
            outputs = (np.arange(len(outputs) // head)[:, None] * wide + dims).ravel()
        if kernel == "o":
            inputs = (np.arange(len(inputs) // head)[:, None] * wide + np.arange(head)).ravel()
        want = np.asarray(leaf.codes[place.layer]).astype(np.int8)
        np.testing.assert_array_equal(codes[np.ix_(outputs, inputs)], place.to_hf(want))
        scale = np.asarray(leaf.scales[place.layer], np.float32).reshape(-1, len(outputs)).T
        if kernel == "q":
            scale = scale * np.float32(np.sqrt(wide / head))
        groups = inputs[:: leaf.group] // leaf.group if leaf.group else [0]
        scales = np.asarray(tensors[stem + "weight_scale"], np.float32)
        np.testing.assert_array_equal(scales[np.ix_(outputs, groups)], scale)


@pytest.mark.parametrize(
    ("quant", "method"), in_turn(["int8", "int4", "floats"], ["base", *WIDENED])
)
def test_the_export_computes_what_the_model_does(quant: str, method: str, tmp_path: Path) -> None:
    """int4 has groups for an adapter's rows, so nothing is rounded; int8 rounds them once more, and
    floats for the first time.
    """
    model = tiny_model(head_dim=32) if quant == "floats" else quantised(quant, method)
    if quant == "floats" and method != "base":
        model = fused(model, WIDENED[method])
    save_hf(tmp_path / "x", model, quant="int8" if quant == "floats" else quant)
    wrong, size = difference(tmp_path / "x", model)
    exact = quant == "int4" or method == "base"
    if quant == "floats":
        assert wrong.mean() < 0.03 * size.mean()
    else:
        assert wrong.max() < (TOLERANCE if exact else 0.02) * size.max()
    gap = export_gap(model, tmp_path / "x", TOKENS)["max_abs_dlogit"]
    if exact and quant != "floats":  # both are rounding alone
        assert gap < TOLERANCE * size.max()
    else:
        assert gap == pytest.approx(wrong.max(), rel=1e-3)


@pytest.mark.parametrize("adapter", [None, AdapterConfig("lora", rank=4), WIDENED["ffba"]])
def test_floats_are_quantised_in_groups_that_fit(
    adapter: AdapterConfig | None, tmp_path: Path
) -> None:
    """Heads smaller than a group have smaller groups."""
    base = tiny_model(head_dim=32, hidden_size=64, intermediate_size=128)
    model = base if adapter is None else fused(base, adapter)
    save_hf(tmp_path / "x", model, quant="int4")
    groups = config_of(tmp_path / "x")["quantization_config"]["config_groups"]
    assert [g["weights"]["group_size"] for g in groups.values()] == [64, 32]
    assert groups["group_1"]["targets"] == ["re:.*o_proj$"]
    wrong, size = difference(tmp_path / "x", model)
    assert wrong.mean() < 0.3 * size.mean()


@pytest.mark.parametrize(
    ("kind", "method", "changes", "filled"),
    [
        # 6 heads and groups of 32: 96
        ("int4", "zflora-minimal", {"num_heads": 6, "num_kv_heads": 2}, "hidden 102 -> 192, MLP"),
        ("int4", "zflora-minimal", {"num_heads": 6, "family": "qwen3"}, "hidden 102 -> 128, MLP"),
        ("int4", "zflora-uniform", {}, "head 48 -> 64"),
        ("int8", "zflora-minimal", {"hidden_size": 64}, "hidden 70 -> 72, MLP 106 -> 108"),
    ],
)
def test_widths_are_multiples_of_groups_and_heads(
    kind: str, method: str, changes: dict[str, Any], filled: str, tmp_path: Path
) -> None:
    model = quantised(kind, method, **({"hidden_size": 96} | changes))
    report = save_hf(tmp_path / "x", model, quant=kind)
    assert filled in report["filled with zeros"]


@pytest.mark.parametrize("scan_layers", [True, False])
def test_bfloat16_and_shards(scan_layers: bool, tmp_path: Path) -> None:
    model = quantised("int4", "zflora-minimal", tie_word_embeddings=scan_layers)
    if not scan_layers:
        flat = trees.unstack_layers(model.params, model.config.num_layers)
        model = Model(model.config.replace(scan_layers=False), flat, adapter=model.adapter)
    save_hf(tmp_path / "x", model, quant="int4", dtype="bfloat16", max_shard_bytes=50_000)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    gap = export_gap(model, tmp_path / "x", TOKENS)
    assert gap["max_abs_dlogit"] < 0.1 * gap["logit_scale"] and gap["top1_agreement"] > 0.9


@pytest.mark.parametrize(
    ("family", "method"),
    always([("llama", "minimal"), ("qwen3", "uniform")], lambda case: case[0] == "qwen3"),
)
def test_eps_z_is_the_one_of_the_smallest_error(family: str, method: str, tmp_path: Path) -> None:
    """Also of an adapter with a state, and dims of normed heads, larger than the base's."""
    base, adapter = tiny_model(head_dim=32, family=family), AdapterConfig(f"zflora-{method}", 16)
    model = fuse(
        base,
        adapter,
        trees.map_with_names(
            lambda name, x: x * (3 if name.endswith("forward") else 0.4),
            perturbed_adapters(base, adapter, std=0.1),
        ),
    )

    def gap(**settings: Any) -> float:
        save_hf(tmp_path / "x", model, quant="int8", **settings)
        return float(difference(tmp_path / "x", model)[0].mean())

    gaps, best = {k: gap(eps_z=2.0**-k) for k in (0, 1, 2, 4, 5, 10)}, gap()
    assert best < 1.15 * min(gaps.values()) and best < 0.8 * gaps[10], (best, gaps)


def test_units_of_any_size_keep_their_digits(tmp_path: Path) -> None:
    """Rows of down a thousand times too large, and columns of up as much too small."""
    floats, adapter = tiny_model(head_dim=32), WIDENED["ffba"]
    factors = {"down/backward": 51.2, "up/forward": 1 / 512, "backward": 0.1, "cross": 0.1}
    adapters = trees.map_with_names(
        lambda name, x: x * next((f for end, f in factors.items() if name.endswith(end)), 1.0),
        perturbed_adapters(floats, adapter, std=0.1),
    )
    model = fuse(quantize_model(floats, how("int8", 0)), adapter, adapters)
    save_hf(tmp_path / "x", model, quant="int8")
    wrong, size = difference(tmp_path / "x", model)
    assert wrong.max() < 0.02 * size.max()


@pytest.mark.parametrize(
    ("quant", "layout", "weights"),
    [
        ("int8", "pack-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
        ("w8a8", "int-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}),
        ("int4", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    ],
)
def test_config_and_report(
    quant: str, layout: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    model = quantised("int4" if quant == "int4" else "int8", "zflora-minimal")
    report = save_hf(tmp_path / "x", model, quant=quant)
    assert report["quant"].startswith(f"{quant}: ") and report["eps_z"] <= 1
    found = config_of(tmp_path / "x")["quantization_config"]
    (group,) = found["config_groups"].values()
    assert found["format"] == group["format"] == layout and group["targets"] == ["Linear"]
    assert weights.items() <= group["weights"].items()
    assert (group["input_activations"] is None) == (quant != "w8a8")
    card = (tmp_path / "x" / "README.md").read_text()
    assert "pip install compressed-tensors" in card and "unfuse" not in card
    with pytest.raises(ConfigError, match=r"packed weights.*without --quant"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize(
    ("kind", "group", "settings", "message"),
    [
        (None, 0, {"quant": "int3"}, "quant='int3'.*int4.*--format gguf"),
        (None, 0, {"quant": "int8", "dtype": "float16"}, "dtype='float16'.*float32 or bfloat16"),
        (None, 0, {"quant": "int8", "eps_z": 0.3}, "power of two"),
        ("nf4", 32, {"quant": "int4"}, "stored as nf4"),
        ("int8", 32, {"quant": "int8"}, "a scale for 32 inputs"),
        ("int8", 0, {"quant": "int4"}, "stored as int8"),
        ("narrow", 0, {"quant": "int4"}, "16 inputs are no multiple of 32"),
    ],
)
def test_other_kernels_and_settings_are_refused(
    kind: str | None, group: int, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = tiny_model(head_dim=16 if kind == "narrow" else 32)
    model = quantize_model(model, how(kind, group)) if kind not in (None, "narrow") else model
    with pytest.raises(ConfigError, match=message):
        save_hf(tmp_path / "x", model, **settings)
    if "eps_z" not in settings and kind is None:  # the command, before anything is loaded
        with pytest.raises(ConfigError, match=message):
            EXPORTERS["hf"].check(tmp_path, **settings)
    assert not (tmp_path / "x").exists()


def test_damaged_scales_and_changed_files_are_named(tmp_path: Path) -> None:
    model = quantised("int8")
    save_hf(tmp_path / "x", model, quant="int8")
    file = tmp_path / "x" / "zflora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quant": "int4"}))
    with pytest.raises(CheckpointError, match="words"):
        load_stock(tmp_path / "x")
    up = model.params["layers"]["mlp"]["up"]
    up["kernel"] = replace(up["kernel"], scales=up["kernel"].scales.at[1].set(jnp.nan))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        save_hf(tmp_path / "y", model, quant="int8")
