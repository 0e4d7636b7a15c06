"""What a user is told of an export of a base of codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from support.quantized import WIDENED, quantized_tiny

from zflora_jax import load_model, save_hf
from zflora_jax.core import trees
from zflora_jax.experiments.info import describe
from zflora_jax.hf.save import model_card
from zflora_jax.nn.quantize_model import dequantize_model

pytestmark = pytest.mark.filterwarnings("ignore:head_dim 32")  # a group that is not full


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
