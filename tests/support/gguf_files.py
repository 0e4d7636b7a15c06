"""GGUF files of tiny models, quantised by the gguf package, and vocabularies for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.byte_tokenizer import byte_tokenizer
from support.models import tiny_model
from zflora_jax import Model, load_model
from zflora_jax.hf.gguf.write import gguf_form

PIECES = ["<unk>", "<|startoftext|>", "<|endoftext|>"]  # other names than Llama 2's
PIECES += [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]


def sentencepiece(writer: Any, **flags: bool) -> None:
    """A vocabulary as old converters wrote it: no ids of BOS and EOS, no flags but the given."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([0.0] * 259 + [-1000.0] * 3 + [-1.0, -2.0, -3.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 6])
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)


def byte_level(writer: Any, pre="default", flag=None, kind="gpt2", last="<pad>") -> None:
    """The byte tokenizer's vocabulary. flag: Whether texts start with BOS; None: it is not said."""
    vocab = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*sorted(vocab, key=vocab.get)[:258], last])
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    if flag is not None:
        writer.add_add_bos_token(flag)


def empty_file(path: Path) -> None:
    """A file of another program, without settings and tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()


def gguf_file(path: Path, model: Model, kinds: dict[str, str], rest: str) -> Path:
    """`model` as the gguf package writes it: matrices quantised as `kinds` says of their name or
    their tensor's kind, the others as `rest`.
    """
    form = gguf_form(model, "float32")
    writer = gguf.GGUFWriter(path, form.architecture)
    for key, value in form.metadata().items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, array in form.tensors(model):
        found = kinds.get(name, kinds.get(name.split(".")[-2], rest)) if array.ndim > 1 else "F32"
        kind = gguf.GGMLQuantizationType[found]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return path


def kept_file(path: Path, kind: str, **changes: Any) -> Model:
    """A base of blocks of `kind`, its table of Q8_0, loaded with them."""
    model = tiny_model(**({"head_dim": 32} | changes))
    gguf_file(path, model, {"token_embd": "Q8_0", "output": "Q8_0"}, kind.upper())
    return load_model(path, quantize="keep")
