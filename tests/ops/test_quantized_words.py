"""What a user is told of a base of codes: of blocks that cannot be kept, of the price on a CPU, of
what an export holds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.gguf_files import gguf_file
from support.models import tiny_model
from support.quantized import WIDENED, quantized_tiny

from zflora_jax import load_model, save_gguf, save_hf
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.experiments.info import describe
from zflora_jax.hf.save import model_card
from zflora_jax.nn.quantize_model import dequantize_model

pytestmark = pytest.mark.filterwarnings("ignore:head_dim 32")  # a group that is not full


def test_what_cannot_be_kept_is_named_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By module and type, in the log as in the report of an export."""
    kinds = {"blk.0.ffn_down.weight": "Q4_1", "attn_v": "Q5_0", "ffn_up": "Q5_0", "attn_q": "F16"}
    path = gguf_file(tmp_path / "base.gguf", tiny_model(head_dim=16), kinds, "Q4_0")
    base = load_model(path, quantize="keep")
    [said] = caplog.messages
    assert said.endswith(
        "dequantised to float32, as only blocks of Q8_0, Q4_0, Q4_1 are kept:"
        " o: Q4_0, whose blocks of 32 go across heads of 16;"
        " q: F16; v, up: Q5_0;"
        " down: Q4_0, Q4_1, each in some of the layers, which are one array"
    )
    written = save_gguf(tmp_path / "x.gguf", base, "keep")["not kept"]
    for kind in ("Q4_0", "Q4_1"):
        assert f"ffn_down as Q8_0 ({kind} in the base's file)" in written
    assert "attn_q as F16" in written and "F16 in the" not in written
    caplog.clear()
    apart = load_model(path, scan_layers=False, quantize="keep")
    assert "down" not in caplog.text
    kept = [trees.flatten(apart.params)[f"layers_{i}/mlp/down/kernel"].dtype for i in (0, 1)]
    assert kept == ["q4_1", "q4_0"]


def test_generate_is_silent_of_a_file_without_blocks(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks for none; where blocks run, their price is on stderr."""
    monkeypatch.setattr("zflora_jax.hf.gguf.read.gguf_tokenizer", lambda *_: None)
    monkeypatch.setattr("zflora_jax.inference.text.stream", lambda *_, **settings: [])
    monkeypatch.setattr("zflora_jax.adapters.packing.pack_for_decode", lambda model, **_: model)

    def told(rest: str) -> str:
        path = gguf_file(tmp_path / f"{rest}.gguf", tiny_model(head_dim=32), {}, rest)
        assert main(["generate", "--model", str(path), "--plain", "--prompt", "ab"]) == 0
        return capsys.readouterr().err + caplog.text

    assert told("F16") == ""
    assert (said := told("Q4_0")).startswith("base: q4_0: embed, ")
    assert said.endswith(" (--quantize none: as floats)\n")
    load_model(tmp_path / "F16.gguf", quantize="keep")
    assert "F16" in caplog.text


def test_an_export_as_numbers_says_that_the_base_comes_back_as_numbers(tmp_path: Path) -> None:
    base = quantized_tiny("q4_1", num_layers=1)
    fused = dataclasses.replace(base, adapter=WIDENED["zflora-minimal"])
    card = model_card(fused, {"parameters": 1, "dtype": "bfloat16"}, {})
    assert "bit for bit" not in card and "the base in bfloat16, as its codes (q4_1: " in card
    save_hf(tmp_path / "x", base, dtype="bfloat16")
    found = json.loads((tmp_path / "x" / "zflora.json").read_text())["base"]
    codes = trees.fingerprint(base.params)
    assert found["fingerprint"] is None and found["codes_fingerprint"] == codes
    facts = describe(tmp_path / "x")
    assert facts["codes_fingerprint"] == codes and "base_fingerprint" not in facts
    back = trees.flatten(load_model(tmp_path / "x", "bfloat16").params)
    for name, leaf in trees.flatten(dequantize_model(base).params).items():
        np.testing.assert_array_equal(back[name], leaf.astype("bfloat16"), err_msg=name)
