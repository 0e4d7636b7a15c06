"""GGUF files equal what transformers makes of them; damaged and unsupported ones are refused by
name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close
from support.huggingface import LLAMA3, TOKENS, hf_logits, hf_model, write_gguf
from support.models import untied

from zflora_jax.core import trees
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model_config import RopeScaling
from zflora_jax.hf.gguf_save import save_gguf
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 16}])
def test_written_file_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    reference = hf_model(**changes)
    write_gguf(tmp_path / "x.gguf", reference)
    model = load_model(tmp_path / "x.gguf")
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    assert model.config.tie_word_embeddings == bool(changes) and model.config.rms_norm_eps == 1e-5
    assert (model.config.bos_token_id, model.config.eos_token_ids, model.config.pad_token_id) == (
        256,
        (257,),
        258,
    )
    assert model.tokenizer("aé 1<eos>")["input_ids"] == byte_tokenizer()("aé 1<eos>")["input_ids"]
    apart = load_model(tmp_path / "x.gguf", "bfloat16", scan_layers=False)
    assert apart.config.execution.dtype == "bfloat16" and "layers_1" in apart.params


@pytest.mark.parametrize("vocab_size", [288, 292])  # tensors begin elsewhere in the file
@pytest.mark.parametrize(("quant", "quantize"), [("f32", None), ("q8_0", "keep")])
def test_a_loaded_model_holds_no_page_of_its_file(
    quant: str, quantize: Any, vocab_size: int, tmp_path: Path
) -> None:
    """Written over in place, the file leaves the model as it was."""
    file = tmp_path / "x.gguf"
    save_gguf(file, untied(head_dim=32, vocab_size=vocab_size), quant)
    model = load_model(file, quantize=quantize)
    before = trees.fingerprint(model.params)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert trees.fingerprint(model.params) == before


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
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    for kind, factor, error, words in (
        (np.float32, 2, ConfigError, "rope_freqs"),
        (np.int8, 1, CheckpointError, r"y\.gguf: rope_freqs\.weight cannot be dequantised"),
    ):
        wrong = (divisors * factor).astype(kind)
        write_gguf(
            tmp_path / "y.gguf",
            reference,
            tokenizer=False,
            edit=lambda t, wrong=wrong: t.update({"rope_freqs.weight": wrong}),
        )
        with pytest.raises(error, match=words):
            load_model(tmp_path / "y.gguf")


def test_divisors_in_float16_are_read_by_their_kind(tmp_path: Path) -> None:
    reference = hf_model()
    divisors = np.ones(reference.config.head_dim // 2, np.float16)  # exact: no scaling
    write_gguf(
        tmp_path / "x.gguf",
        reference,
        tokenizer=False,
        edit=lambda t: t.update({"rope_freqs.weight": divisors}),
    )
    model = load_model(tmp_path / "x.gguf")
    assert model.config.rope_scaling is None
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "gemma"}, "gemma.*only .llama., .qwen2., .qwen3., .smollm3."),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__scaling__factor": 4}, r"'linear' \(factor 4\)"),  # without a type
        ({"llama__rope__scale_linear": 4}, r"'linear' \(factor 4\)"),  # as files of 2023 say it
        ({"blocks": 2**31}, "belong to 2"),
        ({"split__count": 3}, "one of the 3 files of a split model.*--merge"),
        (
            {"edit": lambda t: t.pop("blk.1.ffn_up.weight")},
            r"missing +model\.layers\.1\.mlp\.up_proj",
        ),
        (
            {"edit": lambda t: t.update({"blk.0.attn_q.bias": np.ones(48, np.float32)})},
            r"unexpected +model\.layers\.0\.self_attn\.q_proj\.bias",
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
    file.write_bytes(good[:4] + good[7:3:-1] + good[8:])  # the version's bytes turned round
    with pytest.raises(CheckpointError, match=r"x\.gguf is a big-endian GGUF file"):
        load_model(file)
    file.write_bytes(b"GGML" + good[4:])
    with pytest.raises(CheckpointError, match="magic"):
        load_model(file)
