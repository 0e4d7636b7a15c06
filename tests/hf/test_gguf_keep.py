"""save_gguf(..., "keep"): every block of the base's file is in the new one, byte for byte, and the
adapter's next to them give the fused model's function.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close, assert_trees_equal
from support.gguf_files import gguf_file, kept_file
from support.grids import always
from support.models import tiny_model
from support.quantized import WIDENED, moved, quantized_tiny
from support.runs import CONFIG, small_run

from zflora_jax import ConfigError, forward, fuse, load_model, override, save_gguf, swap, train
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import RopeScaling
from zflora_jax.experiments import quickstart
from zflora_jax.hf.gguf.file import ATTENTION_FACTOR, GGUFFile
from zflora_jax.nn.quantize_model import is_quantized

pytestmark = pytest.mark.filterwarnings("ignore:head_dim 32")  # a group that is not full

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


def assert_blocks_kept(before: Path, after: Path, model: Model) -> None:
    """Every block of the file `before` is in `after` at its place; `model` is the base."""
    old, new, c = GGUFFile(before), GGUFFile(after), model.config
    counts = {"attn_q": c.num_heads, "attn_k": c.num_kv_heads, "attn_v": c.num_kv_heads}
    checked = 0
    for name, was in old.tensors.items():
        now, kind = new.tensors[name], name.split(".")[-2]
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


def assert_same_tensors(before: Path, after: Path) -> tuple[GGUFFile, GGUFFile]:
    """Two files with the same tensors, byte for byte."""
    old, new = GGUFFile(before), GGUFFile(after)
    assert old.tensors.keys() == new.tensors.keys()
    for name, tensor in old.tensors.items():
        found = new.tensors[name]
        assert (found.type, found.shape) == (tensor.type, tensor.shape), name
        np.testing.assert_array_equal(found.data, tensor.data, err_msg=name)
    return old, new


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_a_base_alone_is_its_file(kind: str, tmp_path: Path) -> None:
    base = kept_file(tmp_path / "base.gguf", kind, tie_word_embeddings=False)
    report = save_gguf(tmp_path / "x.gguf", base, "keep")
    _, new = assert_same_tensors(tmp_path / "base.gguf", tmp_path / "x.gguf")
    assert report["fallback"] == "none" and kind.upper() in report["types"]
    assert new.get("general.file_type") == int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])


SCALED = {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)}


@pytest.mark.parametrize(
    ("kind", "method", "changes"),
    always(
        [
            ("q8_0", "zflora-minimal", {"tie_word_embeddings": False}),
            ("q4_0", "zflora-uniform", {}),
            # Its blocks have minima; with every method that widens heads.
            ("q4_1", "zflora-uniform", {}),
            ("q4_1", "values only", {"tie_word_embeddings": False}),
            ("q4_1", "ffba", SCALED),  # whose frequencies stay in the divisors
            ("q8_0", "zflora-uniform", {"family": "qwen2"}),
            ("q8_0", "zflora-minimal", {"family": "qwen3"}),
        ],
        lambda case: case == ("q4_1", "ffba", SCALED),
    ),
)
def test_an_adapters_blocks_stand_next_to_the_bases(
    kind: str, method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = kept_file(tmp_path / "base.gguf", kind, **changes)
    fused = fuse(base, WIDENED[method], moved(base, WIDENED[method]))
    report = save_gguf(tmp_path / "x.gguf", fused, "keep")
    assert report["fallback"] == "none"
    if "family" not in changes:
        assert_blocks_kept(tmp_path / "base.gguf", tmp_path / "x.gguf", base)
    if changes.get("family") == "qwen2":  # biases are scaled no more than blocks are
        old, new = (GGUFFile(tmp_path / f"{name}.gguf").tensors for name in ("base", "x"))
        bias, want = (of["blk.0.attn_q.bias"].data.view(np.float32) for of in (new, old))
        np.testing.assert_array_equal(np.sort(bias[bias != 0]), np.sort(want))
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
    old, _ = assert_same_tensors(tmp_path / "x.gguf", tmp_path / "y.gguf")
    assert old.get(f"llama.{ATTENTION_FACTOR}") == pytest.approx((64 / 32) ** 0.25)
    save_gguf(tmp_path / "z.gguf", fused, "q8_0")
    assert GGUFFile(tmp_path / "z.gguf").get(f"llama.{ATTENTION_FACTOR}") is None


def test_floats_have_the_type_of_their_file_or_q8_0(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log and the report name each tensor that is not kept, and its type."""
    model = tiny_model(head_dim=16, tie_word_embeddings=False)
    kinds = {"blk.0.ffn_down.weight": "Q4_1", "attn_v": "Q5_0", "ffn_gate": "Q5_0", "attn_q": "F16"}
    kinds |= {"output": "F16", "token_embd": "BF16", "ffn_up": "F32"}
    path = gguf_file(tmp_path / "base.gguf", model, kinds, "Q4_0")
    base = load_model(path, quantize="keep")
    *_, said = caplog.messages  # behind that of loading
    for words in (
        "dequantised to float32, as only blocks of Q8_0, Q4_0, Q4_1 are kept: ",
        " o: Q4_0, whose blocks of 32 go across heads of 16;",
        " v, gate: Q5_0;",
        " down: Q4_0, Q4_1, each in some of the layers, which are one array",
    ):
        assert words in said
    report = save_gguf(tmp_path / "x.gguf", base, "keep")
    for fallen in ("attn_v as Q8_0, not Q5_0", "attn_output as Q8_0, not Q4_0", "ffn_down as Q8_0"):
        assert fallen in report["fallback"]
    assert "F16" not in report["fallback"]
    old, new = GGUFFile(path), GGUFFile(tmp_path / "x.gguf")
    for name, tensor in old.tensors.items():
        if f"{name.split('.')[-2]} as" not in report["fallback"]:
            np.testing.assert_array_equal(tensor.data, new.tensors[name].data, err_msg=name)
    unstacked = trees.flatten(load_model(path, scan_layers=False, quantize="keep").params)
    kept = [unstacked[f"layers_{i}/mlp/down/kernel"].dtype for i in (0, 1)]
    assert kept == ["q4_1", "q4_0"]


def test_codes_made_in_memory_are_kept_too(tmp_path: Path) -> None:
    model = quantized_tiny("q4_0")
    save_gguf(tmp_path / "x.gguf", model, "keep")
    found = load_model(tmp_path / "x.gguf", quantize="keep")
    assert_trees_equal(trees.arrays(found.params), trees.arrays(model.params))


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    for model, words in (
        (tiny_model(), r"only floats.*quantize='keep'.*quantize\.kernels=keep.*q8_0"),
        (quantized_tiny("int8"), "blocks of q8_0, q4_0, q4_1, and this one has int8"),
    ):
        with pytest.raises(ConfigError, match=words):
            save_gguf(tmp_path / "x.gguf", model, "keep")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kernel", "factor"), [("down", 2.0**-9), ("up", 2.0**23)])
def test_scales_beyond_float16_make_eps_z_larger(
    kernel: str, factor: float, tmp_path: Path
) -> None:
    base = kept_file(tmp_path / "base.gguf", "q8_0")
    adapter = WIDENED["zflora-minimal"]
    fused = fuse(base, adapter, moved(base, adapter))
    usual = save_gguf(tmp_path / "x.gguf", fused, "keep")["eps_z"]
    mlp, d = fused.params["layers"]["mlp"], fused.config.base_width
    leaf = mlp[kernel]["kernel"]
    scales = np.asarray(leaf.scales).astype(np.float32)
    scales[(..., slice(d, None)) if kernel == "down" else np.s_[:, d // 32 :]] *= factor
    mlp[kernel]["kernel"] = replace(leaf, scales=scales.astype(np.float16))
    with pytest.raises(ConfigError, match=r"eps_z=0\.0009765625: scales.*range of float16"):
        save_gguf(tmp_path / "x.gguf", fused, "keep", eps_z=2.0**-10)
    report = save_gguf(tmp_path / "x.gguf", fused, "keep")
    assert kernel == "down" or report["eps_z"] > usual
    assert_blocks_kept(tmp_path / "base.gguf", tmp_path / "x.gguf", base)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A model that a run can train."""
    model = tiny_model(head_dim=32, max_position_embeddings=512)
    model.params = jax.tree.map(lambda x: x / 4, model.params)
    model.tokenizer = byte_tokenizer()
    save_gguf(tmp_path / "base.gguf", model, "q4_1")
    return tmp_path / "base.gguf"


def test_a_run_is_exported_with_its_blocks(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its table is floats, which become the file's codes again."""
    out = tmp_path / "x.gguf"
    run = override(small_run(str(text_file)), {"train.steps": 3, "quantize.kernels": "keep"})
    train(run, tmp_path / "run", console=False)
    command = ["export", "--workdir", str(tmp_path / "run"), "--out", str(out)]
    assert main([*command, "--format", "gguf", "--quant", "keep"]) == 0
    assert "logit" in capsys.readouterr().out  # how near the export is
    assert_blocks_kept(text_file, out, load_model(text_file, quantize="keep"))


def test_a_quickstart_ends_with_a_switch_the_base_and_its_blocks(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(quickstart, "swap", lambda *x: made.append(x) or swap(*x))
    (tmp_path / "config.py").write_text(CONFIG.format(model=str(text_file)))
    given = f"quickstart --config {tmp_path}/config.py --workdir {tmp_path} --set train.steps=3"
    assert main([*given.split(), "optim.learning_rate=0.1"]) == 0 and len(made) == 10
    r, said = json.loads((tmp_path / "quickstart.json").read_text()), capsys.readouterr().out
    assert r["loss_after"] < r["loss_before"] and r["base_bit_for_bit"] is True
    files = (tmp_path / f"eval/{name}.jsonl" for name in ("before", "after", "blocks"))
    rows = [[json.loads(row)["output"] for row in x.read_text().splitlines()] for x in files]
    assert rows[0] != rows[1] == rows[2] and r["accuracy_on_blocks"] == r["accuracy_after"]
    assert "the base is back, bit for bit" in said and "unchanged quantised blocks" in said
