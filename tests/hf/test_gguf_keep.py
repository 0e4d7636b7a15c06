"""save_gguf(..., "keep"): every block of the base's file is in the new one, byte for byte, and the
adapter's next to them give the fused model's function.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close
from support.gguf_files import gguf_file, kept_file
from support.grids import always
from support.models import tiny_model
from support.quantized import WIDENED, moved, quantized_tiny
from support.runs import small_run

from zflora_jax import forward, fuse, load_model, save_gguf
from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import RopeScaling
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.train import train
from zflora_jax.hf.gguf.file import ATTENTION_FACTOR, GGUFFile, tensor_module
from zflora_jax.nn.quantize_model import is_quantized
from zflora_jax.ops.quantized import QuantizedArray

pytestmark = pytest.mark.filterwarnings("ignore:head_dim 32")  # a group that is not full

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


def assert_blocks_kept(before: Path, after: Path, model: Model) -> None:
    """Every block of the file `before` is in `after` at its place; `model` is the base."""
    old, new, c = GGUFFile(before), GGUFFile(after), model.config
    counts = {"attn_q": c.num_heads, "attn_k": c.num_kv_heads, "attn_v": c.num_kv_heads}
    checked = 0
    for name, was in old.tensors.items():
        now, kind = new.tensors[name], tensor_module(name)
        assert now.type == was.type, name
        if len(was.shape) == 1:
            continue
        size, rows = BLOCK_BYTES[was.type.name], now.data
        if kind in counts:
            wider = rows.reshape(counts[kind], -1, rows.shape[-1])
            places = np.arange(c.head_dim)
            if kind != "attn_v":  # halves of the base's dims first in each half, interleaved
                places = places.reshape(-1, 2)
                assert wider.shape[1] >= 2 * len(places)
            rows = wider[:, places.reshape(-1)].reshape(-1, rows.shape[-1])
        blocks = rows[: len(was.data)].reshape(len(was.data), -1, size)
        if kind == "attn_output":  # the inputs of each head, then its adapter's
            blocks = blocks.reshape(len(blocks), c.num_heads, -1, size)[:, :, : c.head_dim // 32]
        want = was.data.reshape(len(was.data), -1, size)
        found = blocks.reshape(len(blocks), -1, size)[:, : want.shape[1]]
        np.testing.assert_array_equal(found, want, err_msg=name)
        checked += 1
    assert checked == 7 * c.num_layers + 2 - c.tie_word_embeddings


def assert_computes(path: Path, fused: Model, eps_z: float | None) -> None:
    """A kept file's function is that of an f32 file with the same eps_z, and the model's but for
    what eps_z does to the norms.
    """
    save_gguf(path.with_name("f32.gguf"), fused, "f32", eps_z=eps_z)
    exact = forward(load_model(path.with_name("f32.gguf")), TOKENS)
    want = np.asarray(forward(fused, TOKENS))
    for how in (None, "keep"):
        found = load_model(path, quantize=how)
        assert is_quantized(found) == (how == "keep")
        logits = forward(found, TOKENS)
        assert_logits_close(logits, exact, 1e-4)  # scales that are subnormal numbers are rounded
        assert np.abs(np.asarray(logits) - want).max() <= 2.0**-9 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_a_base_alone_is_its_file(kind: str, tmp_path: Path) -> None:
    base = kept_file(tmp_path / "base.gguf", kind, tie_word_embeddings=False)
    report = save_gguf(tmp_path / "x.gguf", base, "keep")
    old, new = GGUFFile(tmp_path / "base.gguf"), GGUFFile(tmp_path / "x.gguf")
    assert old.tensors.keys() == new.tensors.keys()
    for name, tensor in old.tensors.items():
        found = new.tensors[name]
        assert (found.type, found.shape) == (tensor.type, tensor.shape), name
        np.testing.assert_array_equal(found.data, tensor.data, err_msg=name)
    assert report["not kept"] == "none" and kind.upper() in report["types"]
    want = gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    assert new.get("general.file_type") == int(want)


# Every value once, and with q4_1, whose blocks have minima of their own, every method that widens
# heads.
KEPT = [
    *[("q8_0", "zflora-minimal", False), ("q4_0", "zflora-uniform", True)],
    *[("q4_1", "zflora-uniform", True), ("q4_1", "values only", False), ("q4_1", "ffba", True)],
]


@pytest.mark.parametrize(
    ("kind", "method", "tied"),
    always(
        itertools.product(["q8_0", "q4_0", "q4_1"], WIDENED, [True, False]),
        lambda case: case in KEPT,
    ),
)
def test_an_adapters_blocks_stand_next_to_the_bases(
    kind: str, method: str, tied: bool, tmp_path: Path
) -> None:
    base = kept_file(tmp_path / "base.gguf", kind, tie_word_embeddings=tied)
    fused = fuse(base, WIDENED[method], moved(base, WIDENED[method]))
    report = save_gguf(tmp_path / "x.gguf", fused, "keep")
    assert report["fallback"] == report["not kept"] == "none"
    assert_blocks_kept(tmp_path / "base.gguf", tmp_path / "x.gguf", base)
    assert_computes(tmp_path / "x.gguf", fused, report.get("eps_z"))


def test_what_is_read_back_is_written_again_the_same(tmp_path: Path) -> None:
    """Wider heads too, whose rows are in the order of stock form; the factor of their scores is
    next to the RoPE settings.
    """
    base = kept_file(tmp_path / "base.gguf", "q4_1")
    adapter = WIDENED["zflora-uniform"]
    fused = fuse(base, adapter, moved(base, adapter))
    save_gguf(tmp_path / "x.gguf", fused, "keep")
    again = load_model(tmp_path / "x.gguf", quantize="keep")
    save_gguf(tmp_path / "y.gguf", again, "keep")
    old, new = GGUFFile(tmp_path / "x.gguf"), GGUFFile(tmp_path / "y.gguf")
    for name, tensor in old.tensors.items():
        np.testing.assert_array_equal(tensor.data, new.tensors[name].data, err_msg=name)
    assert old.get(f"llama.{ATTENTION_FACTOR}") == pytest.approx((64 / 32) ** 0.25)
    save_gguf(tmp_path / "z.gguf", fused, "q8_0")
    assert GGUFFile(tmp_path / "z.gguf").get(f"llama.{ATTENTION_FACTOR}") is None


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"family": "qwen2"}, "zflora-uniform"),
        ({"family": "qwen3"}, "zflora-minimal"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)}, "ffba"),
    ],
)
def test_families(changes: dict[str, Any], method: str, tmp_path: Path) -> None:
    """Biases are scaled no more than blocks are; Llama 3's frequencies stay in the divisors."""
    base = kept_file(tmp_path / "base.gguf", "q8_0", **changes)
    fused = fuse(base, WIDENED[method], moved(base, WIDENED[method]))
    eps_z = save_gguf(tmp_path / "x.gguf", fused, "keep").get("eps_z")
    if changes.get("family") != "qwen3" and method != "ffba":
        old, new = GGUFFile(tmp_path / "base.gguf"), GGUFFile(tmp_path / "x.gguf")
        bias = new.tensors["blk.0.attn_q.bias"].data.view(np.float32)
        want = old.tensors["blk.0.attn_q.bias"].data.view(np.float32)
        np.testing.assert_array_equal(np.sort(bias[bias != 0]), np.sort(want))
    assert_computes(tmp_path / "x.gguf", fused, eps_z)


def test_floats_have_the_type_of_their_file_or_q8_0(tmp_path: Path) -> None:
    """Of Q5_0 and the like, codes that are not kept; heads of 16 dims, two in a block of o."""
    model = tiny_model(head_dim=16, tie_word_embeddings=False)
    kinds = {"attn_v": "Q5_0", "output": "F16", "token_embd": "BF16", "ffn_up": "F32"}
    gguf_file(tmp_path / "base.gguf", model, kinds, "Q4_0")
    base = load_model(tmp_path / "base.gguf", quantize="keep")
    report = save_gguf(tmp_path / "x.gguf", base, "keep")
    for text in ("attn_v as Q8_0", "attn_output as Q8_0", "output as F16", "token_embd as BF16"):
        assert text in report["not kept"]
    old, new = GGUFFile(tmp_path / "base.gguf"), GGUFFile(tmp_path / "x.gguf")
    for name, tensor in old.tensors.items():
        if tensor_module(name) not in ("attn_v", "attn_output"):
            np.testing.assert_array_equal(tensor.data, new.tensors[name].data, err_msg=name)
    assert new.tensors["blk.0.attn_v.weight"].type.name == "Q8_0"


def test_codes_made_in_memory_are_kept_too(tmp_path: Path) -> None:
    model = quantized_tiny("q4_0")
    save_gguf(tmp_path / "x.gguf", model, "keep")
    found = load_model(tmp_path / "x.gguf", quantize="keep")
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_a_model_of_codes_is_written_as_other_types(quant: str, tmp_path: Path) -> None:
    base = kept_file(tmp_path / "base.gguf", "q4_1")
    adapter = WIDENED["zflora-minimal"]
    fused = fuse(base, adapter, moved(base, adapter))
    save_gguf(tmp_path / "x.gguf", fused, quant)
    tolerance = 2e-5 if quant == "f32" else 0.05
    found = np.asarray(forward(load_model(tmp_path / "x.gguf"), TOKENS))
    want = np.asarray(forward(fused, TOKENS))
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    for model, words in (
        (tiny_model(), r"only floats.*quantize='keep'.*quantize\.kernels=keep.*q8_0"),
        (quantized_tiny("int8"), "is stored as int8, and a GGUF file has q8_0, q4_0, q4_1"),
    ):
        with pytest.raises(ConfigError, match=words):
            save_gguf(tmp_path / "x.gguf", model, "keep")
    assert not list(tmp_path.iterdir())


def with_scales(fused: Model, kernel: str, factor: float) -> Model:
    """`fused` with the scales of the state's blocks of a kernel times `factor`."""
    mlp = fused.params["layers"]["mlp"]
    leaf, d = mlp[kernel]["kernel"], fused.config.norm_dim
    scales = np.asarray(leaf.scales).astype(np.float32)
    at = (..., slice(d, None)) if kernel == "down" else (slice(None), slice(d // 32, None))
    scales[at] *= factor
    scales = scales.astype(np.float16)
    mlp[kernel]["kernel"] = QuantizedArray(
        leaf.codes, scales, leaf.mins, leaf.kind, 1, 1, leaf.group, leaf.base
    )
    return fused


@pytest.mark.parametrize(("kernel", "factor"), [("down", 2.0**-9), ("up", 2.0**23)])
def test_scales_beyond_float16_make_eps_z_larger(
    kernel: str, factor: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = kept_file(tmp_path / "base.gguf", "q8_0")
    adapter = WIDENED["zflora-minimal"]
    plain = fuse(base, adapter, moved(base, adapter))
    usual = save_gguf(tmp_path / "x.gguf", plain, "keep")["eps_z"]
    fused = with_scales(plain, kernel, factor)
    with pytest.raises(ConfigError, match=r"eps_z=0\.0009765625: scales.*range of float16"):
        save_gguf(tmp_path / "x.gguf", fused, "keep", eps_z=2.0**-10)
    with caplog.at_level(logging.WARNING):
        report = save_gguf(tmp_path / "x.gguf", fused, "keep")
    if kernel == "up":
        assert report["eps_z"] > usual and "in float16's range" in caplog.text
    assert_blocks_kept(tmp_path / "base.gguf", tmp_path / "x.gguf", base)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base's file, and runs on it: "keep" on its blocks, "none" on floats."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_model(head_dim=32, max_position_embeddings=512)
    model.params = jax.tree.map(lambda x: x / 4, model.params)
    model.tokenizer = byte_tokenizer()
    save_gguf(folder / "base.gguf", model, "q4_1")
    for how in ("keep", "none"):
        changes = {"train.steps": 3, "quantize.kernels": how}
        train(override(small_run(str(folder / "base.gguf")), changes), folder / how, console=False)
    return {name: folder / name for name in ("base.gguf", "keep", "none")}


def test_runs_are_exported_with_their_blocks_or_refused(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table of a run on kept blocks is floats, which become the file's codes again."""
    out = tmp_path / "x.gguf"
    command = ["export", "--workdir", str(runs["keep"]), "--out", str(out), "--format", "gguf"]
    assert main([*command, "--quant", "keep"]) == 0
    assert "token_embd as Q8_0" in capsys.readouterr().out
    assert_blocks_kept(runs["base.gguf"], out, load_model(runs["base.gguf"], quantize="keep"))
    report = export_run(runs["keep"], out, format="gguf", quant="keep")
    assert report["max_abs_dlogit"] <= 1e-3 * report["logit_scale"]
    monkeypatch.setattr("zflora_jax.adapters.fuse.fuse", lambda *_: pytest.fail("fused"))
    with pytest.raises(ConfigError, match=r"train with quantize\.kernels=keep"):
        export_run(runs["none"], tmp_path / "y.gguf", format="gguf", quant="keep")
    assert not (tmp_path / "y.gguf").exists()
