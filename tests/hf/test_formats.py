"""Every family in every format: its consumer computes the model, or the table's text refuses it."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.cases import case_id
from support.checks import assert_logits_close, assert_trees_equal
from support.exports import WIDENED, perturbed_adapters, tiny_family
from support.grids import always
from support.huggingface import TOKENS, hf_logits, open_stock

from zflora_jax import forward, fuse, load_model, load_peft, save_gguf, save_hf, save_peft, unfuse
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.families import FAMILIES
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.hf.restore import load_stock

NARROW = AdapterConfig("zflora-minimal", rank=6, extra_mlp_units=6)
WIDE, LORA = AdapterConfig("ffba", rank=4), AdapterConfig("lora", rank=4)
# Settings that a GGUF file can express: no window, every fourth layer without RoPE
GGUF: dict[Any, dict[str, Any]] = {
    "gguf": {"sliding_window": None},
    ("smollm3", "gguf"): {"num_layers": 4, "nope_layers": (3,)},
}
FORMATS = ("hf", "compressed", "gguf", "peft")
CELLS = [
    (family, name, adapter)
    for family in FAMILIES
    for name in FORMATS
    for adapter in ((LORA,) if name == "peft" else (NARROW, WIDE))
]
CELLS += [("llama", "hf", adapter) for adapter in WIDENED.values()]
CELLS += [("llama", "hf", adapter) for adapter in (LORA, AdapterConfig("full"))]


def runs_always(cell: Any) -> bool:
    """Wide heads of the other families are stored as llama's."""
    family, name, adapter = cell
    return family == "llama" or (adapter != WIDE and name == "hf")


pytestmark = [
    pytest.mark.filterwarnings("ignore:head_dim"),
    pytest.mark.filterwarnings("ignore:.torch.jit"),  # in what compressed-tensors imports
]


def write(name: str, out: Path, base: Model, adapter: AdapterConfig, adapters: Any) -> Model:
    """Write a format; returns the fused model."""
    fused = fuse(base, adapter, adapters)
    if name == "peft":
        save_hf(out / "base", base)
        save_peft(out / "x", base, adapter, adapters)
    elif name == "gguf":
        fused.tokenizer = byte_tokenizer()
        save_gguf(out / "x.gguf", fused, "f32")
    else:
        save_hf(out / "x", fused, quant="int8" if name == "compressed" else None)
    return fused


@pytest.mark.parametrize(
    ("family", "name", "adapter"),
    always(CELLS, runs_always),
    ids=[f"{family}-{name}-{case_id(adapter)}" for family, name, adapter in CELLS],
)
def test_a_format_holds_a_family_or_says_why_not(
    family: str, name: str, adapter: AdapterConfig, tmp_path: Path
) -> None:
    base = tiny_family(family, vocab_size=260, **GGUF.get((family, name), GGUF.get(name, {})))
    adapters = perturbed_adapters(base, adapter, std=0.02)
    if name == "gguf" and adapter.method == "ffba" and not FAMILIES[family].gguf_wide_heads:
        with pytest.raises(ConfigError, match=f"does not read for family '{family}'"):
            write(name, tmp_path, base, adapter, adapters)
        assert not list(tmp_path.glob("x*"))
        return
    fused = write(name, tmp_path, base, adapter, adapters)
    wanted = np.asarray(forward(fused, TOKENS))
    if name == "hf":
        model = open_stock(tmp_path / "x")
        assert type(model).__name__ == FAMILIES[family].architecture
        assert_logits_close(hf_logits(model), wanted)
        again = load_model(tmp_path / "x")
        assert_trees_equal(again.params, fused.params)
        assert again.config == fused.config and again.adapter == adapter
        manifest = json.loads((tmp_path / "x" / "zflora.json").read_text())
        if METHODS[adapter.method].widens:
            found, back = unfuse(again)
            assert_trees_equal(found.params, base.params)
            assert_trees_equal(back, unfuse(fused)[1])
            assert manifest["base"]["fingerprint"] == trees.fingerprint(base.params)
        gap = export_gap(fused, tmp_path / "x", TOKENS[:1])
        assert gap["max_abs_dlogit"] <= 1e-5 * gap["logit_scale"] and gap["top1_agreement"] == 1.0
    elif name == "compressed":
        ours = forward(load_stock(tmp_path / "x"), TOKENS)  # of the same codes
        assert_logits_close(hf_logits(open_stock(tmp_path / "x")), ours, share=2e-5)
        assert np.abs(ours - wanted).mean() < 0.05 * np.abs(wanted).mean()
    elif name == "gguf":
        reader = gguf.GGUFReader(tmp_path / "x.gguf")
        known = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH[FAMILIES[family].gguf.upper()]])
        names = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in known}
        first = {re.sub(r"^blk\.\d+", "blk.0", t.name).rpartition(".")[0] for t in reader.tensors}
        assert first <= names
        assert_logits_close(forward(load_model(tmp_path / "x.gguf"), TOKENS), wanted)
    else:
        theirs = peft.PeftModel.from_pretrained(open_stock(tmp_path / "base"), tmp_path / "x")
        assert_logits_close(hf_logits(theirs.eval()), wanted)
        assert_trees_equal(load_peft(tmp_path / "x", base)[1], adapters)
