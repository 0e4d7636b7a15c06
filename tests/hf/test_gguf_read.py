"""GGUF files equal what transformers makes of them; damaged and unsupported ones are refused by
name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close
from support.huggingface import LLAMA3, TOKENS, hf_logits, hf_model, write_gguf
from support.models import untied

from zflora_jax import CheckpointError, ConfigError, Model, forward, load_model, save_gguf
from zflora_jax.core import trees
from zflora_jax.core.model_config import RopeScaling
from zflora_jax.ops.rope import rope_frequencies


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 16}])
def test_written_file_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    reference = hf_model(**changes)
    write_gguf(tmp_path / "x.gguf", reference)
    model = load_model(tmp_path / "x.gguf")
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    config = model.config
    assert config.tie_word_embeddings == bool(changes) and config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (256, (257,), 258)
    assert model.tokenizer("aé 1<eos>")["input_ids"] == byte_tokenizer()("aé 1<eos>")["input_ids"]
    unstacked = load_model(tmp_path / "x.gguf", "bfloat16", scan_layers=False)
    assert unstacked.config.execution.dtype == "bfloat16" and "layers_1" in unstacked.params


@pytest.mark.parametrize(
    ("quant", "quantize", "vocab_size"),
    [("f32", None, 288), ("f32", None, 292), ("q8_0", "keep", 288)],
)
def test_a_loaded_model_holds_no_page_of_its_file(
    quant: str, quantize: Any, vocab_size: int, tmp_path: Path
) -> None:
    """Written over in place, the file leaves the model as it was; of 292 tokens tensors begin
    elsewhere in the file.
    """
    file = tmp_path / "x.gguf"
    save_gguf(file, untied(head_dim=32, vocab_size=vocab_size), quant)
    model = load_model(file, quantize=quantize)
    before = trees.fingerprint(model.params)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert trees.fingerprint(model.params) == before


def test_llama3_scaling_is_read_from_its_divisors(tmp_path: Path) -> None:
    rope = {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    reference = hf_model(rope=rope, head_dim=64, max_position_embeddings=32768)
    reference.config.rope_parameters["rope_theta"] = 5e5
    file, scaling = tmp_path / "x.gguf", RopeScaling(8.0, 1.0, 4.0, 8192)

    def load(divisors: Any) -> Model:
        new = {} if divisors is None else {"rope_freqs.weight": divisors}
        write_gguf(file, reference, tokenizer=False, edit=lambda tensors: tensors.update(new))
        return load_model(file)

    plain = load(None).config
    divisors = rope_frequencies(plain) / rope_frequencies(plain.replace(rope_scaling=scaling))
    model = load(divisors.astype(np.float32))
    assert model.config.rope_scaling == scaling and model.tokenizer is None
    assert_logits_close(forward(model, jnp.asarray(TOKENS)), hf_logits(reference))
    # Read by their type; ones are no scaling.
    assert load(np.ones_like(divisors, np.float16)).config.rope_scaling is None
    with pytest.raises(ConfigError, match="rope_freqs"):
        load((divisors * 2).astype(np.float32))
    with pytest.raises(CheckpointError, match=r"x\.gguf: rope_freqs\.weight cannot be dequantised"):
        load(divisors.astype(np.int8))


ONES = np.ones((24, 48), np.float32)


def edited(name: str, array: Any) -> dict[str, Any]:
    """A tensor of a file to replace; None: to leave out."""

    def edit(given: dict[str, Any]) -> None:
        given[name] = array
        if array is None:
            del given[name]

    return {"edit": edit}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "gemma"}, "gemma.*only .llama., .qwen2., .qwen3., .smollm3."),
        ({"llama__rope__scaling__attn_factor": 2}, r"attn_factor=2\.0.*only 1\.0"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__scaling__factor": 4}, r"'linear' \(factor 4\)"),  # without a type
        ({"llama__rope__scale_linear": 4}, r"'linear' \(factor 4\)"),  # as files of 2023 say it
        ({"llama__rope__dimension_count": 6}, "dimension_count=6 differs from the head size 12"),
        ({"llama__attention__head_count": "4"}, "head_count='4' is not supported"),
        ({"blocks": 2**31}, "belong to 2"),
        ({"general__type": "adapter"}, "holds an adapter .*PEFT directory"),
        ({"llama__expert_count": 8}, "expert_count=8: mixtures of experts are not"),
        ({"split__count": 3}, "one of the 3 files of a split model.*--merge"),
        (edited("blk.1.ffn_up.weight", None), r"missing +blk\.1\.ffn_up\.weight"),
        (edited("blk.0.attn_q.bias", ONES[0]), r"unexpected +blk\.0\.attn_q\.bias"),
        (edited("blk.0.attn_v.weight", ONES * np.nan), r"blk\.0\.attn_v\.weight holds NaN"),
        (edited("blk.0.attn_v.weight", ONES[:, 1:]), r"\(24, 47\), expected \(24, 48\)"),
    ],
)
def test_unsupported_and_incomplete_files(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "x.gguf", hf_model(), tokenizer=False, **options)
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_gguf(path, hf_model(head_dim=16, num_hidden_layers=1))
    return path


def test_a_file_cut_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data, tensors = good.read_bytes(), gguf.GGUFReader(good).tensors
    table = min(data.index(t.name.encode()) for t in tensors) - 8
    starts = [t.data_offset for t in tensors]
    places = {0, 3, 4, 8, 23, 24, 25, *range(24, table, 97), *range(table, min(starts), 7)}
    places |= {start + near for start in starts for near in (-1, 0, 1)} | {len(data) - 1}
    for length in sorted(places):
        (tmp_path / "x.gguf").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf is not a readable GGUF file"):
            load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("x.gguf", b"GGUF\0\0\0\3", "it is big-endian"),
        ("x.gguf", b"GGML\3\0\0\0", "magic invalid"),
        ("x.bin", b"\x93NUMPY\0\0", r"x\.bin is not .*give the directory that holds config\.json"),
    ],
)
def test_files_of_another_type(
    name: str, start: bytes, words: str, good: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(start + good.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / name)
