"""GGUF files (llama.cpp): metadata -> LlamaConfig, tensors dequantised one by one, the tokenizer
built from the metadata. Needs no torch.
"""

from __future__ import annotations

import importlib
import re
import struct
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np

from zflora_jax.core.fields import from_dict, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.keys import (
    CheckpointError,
    Part,
    Place,
    as_finite,
    check_layer_count,
    check_tensors,
    gather,
    hf_table,
)
from zflora_jax.hf.rope import with_frequencies
from zflora_jax.ops.rope import rope_frequencies

# GGUF name -> Hugging Face name.
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE = "rope_freqs.weight"  # Llama-3 scaling, as divisors of the inverse frequencies

# Pre-tokenizers of llama.cpp that cut every digit apart and then split as GPT-2 does.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")

# What llama.cpp takes where a file is silent (src/llama-vocab.cpp): sentencepiece vocabularies
# ("llama") start texts with BOS and with a space, and have these ids; of byte-level ones ("gpt2")
# those with these pre-tokenizers start with BOS.
_SENTENCEPIECE = {"bos": 1, "eos": 2, "unknown": 0}
_STARTED = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
)


def load_gguf(path: Path, dtype: str, scan_layers: bool, sharding: Any = None) -> Model:
    """The Llama in a GGUF file, dequantised to `dtype`. Raises CheckpointError or ConfigError as
    `load_model` does.
    """
    reader = open_gguf(path)
    tensors = {_hf_name(t.name): t for t in reader.tensors if t.name != _ROPE}
    config = read_config(path, reader).replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    check_layer_count(tensors, r"model\.layers\.(\d+)\.", config.num_layers, str(path))
    table = hf_table(config)
    check_tensors(
        table,
        {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()},
        str(path),
        config.num_layers,
    )

    def read(
        name: str, place: Place, part: Part
    ) -> np.ndarray:  # a block of quantised numbers cannot be cut: the tensor is read whole
        from gguf import dequantize

        tensor = tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:
            raise CheckpointError(
                f"{path}: {tensor.name} cannot be dequantised: {error}."
            ) from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _half_split(
                array, config.num_heads if "q_proj" in name else config.num_kv_heads
            )
        return place.to_native(as_finite(array, config.execution.dtype, tensor.name, str(path)))[
            part
        ]

    return Model(
        config,
        unflatten(gather(table, read, config.execution.dtype, sharding)),
        tokenizer=build_tokenizer(path, reader, config),
    )


def open_gguf(path: Path) -> Any:
    """A GGUFReader whose every read stays inside the file. CheckpointError naming the file when it
    is truncated or damaged.
    """
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """numpy slices past the end come back short and counts in the header are taken on trust;
        here both raise.
        """

        @property
        def data(self) -> Any:
            """The file's bytes. As a plain array: slices of a memmap, of which a vocabulary takes a
            million, are made ten times as slowly.
            """
            return self._bytes

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._bytes: Any = mapped.view(np.ndarray)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(
                    f"it ends before byte {int(offset) + np.dtype(dtype).itemsize * int(count)}"
                    " that its header refers to"
                )
            return super()._get(int(offset), dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """Arrays of numbers are read whole: the reader would make one array object per element,
            a hundred bytes for each byte of the file. Arrays of strings go through one plain loop:
            over a vocabulary and its merges the reader takes seconds.
            """
            if int(raw_type) == GGUFValueType.ARRAY:
                item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
                if item == GGUFValueType.ARRAY:
                    raise ValueError("it holds an array of arrays")
                head = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                if item == GGUFValueType.STRING:
                    strings, end = self._strings(orig_offs + 12, int(head[1][0]))
                    return (
                        end - orig_offs,
                        [*head, *strings],
                        list(range(3, 2 + len(strings), 2)),
                        [GGUFValueType.ARRAY, item][: 1 + len(strings)],
                    )
                if (kind := self.gguf_scalar_to_np.get(item)) is not None:
                    values = self._get(orig_offs + 12, kind, int(head[1][0]))
                    return (
                        12 + int(values.nbytes),
                        [*head, values],
                        [2],
                        [GGUFValueType.ARRAY, item],
                    )
            return super()._get_field_parts(orig_offs, raw_type)

        def _strings(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
            """(length and bytes of each of `count` strings, in turn; where they end)."""
            length = np.dtype(np.uint64).newbyteorder(self.byte_order)
            number, parts, at = (
                struct.Struct(f"{'>' if length.str[0] == '>' else '<'}Q"),
                list[np.ndarray](),
                start,
            )
            for _ in range(count):
                (size,) = number.unpack_from(self._bytes, at)
                if at + 8 + size > len(self._bytes):
                    raise ValueError(
                        f"it ends before byte {at + 8 + size} that its header refers to"
                    )
                parts += (
                    self._bytes[at : at + 8].view(length),
                    self._bytes[at + 8 : at + 8 + size],
                )
                at += 8 + size
            return parts, at

    try:
        return Reader(path)
    except Exception as error:  # the reader raises whatever numpy or the enum raises
        raise CheckpointError(
            f"{path} is not a readable GGUF file ({error}); it is truncated or damaged. Download it"
            " again."
        ) from error


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return (
        f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
        if match and match[2] in _LAYER
        else name
    )


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each rotated head of q and k (rows 0, k/2, 1, k/2+1,
    ...); back to Hugging Face's order.
    """
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _metadata(path: Path, reader: Any, key: str) -> Any:
    """The value of a metadata key, None if there is none."""
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except (ValueError, IndexError) as error:  # text that is no UTF-8, a kind of value that is none
        raise CheckpointError(
            f"{path}: the metadata key {key} cannot be read ({error}); the file is damaged."
            " Download it again."
        ) from None


def read_config(path: Path, reader: Any) -> LlamaConfig:
    """The LlamaConfig of the metadata; ConfigError naming what the forward has no code for."""

    def get(key: str, default: Any = None) -> Any:
        value = _metadata(path, reader, key)
        return default if value is None else value

    def need(key: str) -> Any:
        if (value := get(key)) is None:
            raise CheckpointError(f"{path} lacks the metadata key {key}.")
        return value

    def number(key: str, default: float) -> float:
        # Stored as float32: 9.99999974e-06 was written as 1e-05.
        return float(str(np.float32(get(key, default))))

    architecture = need("general.architecture")
    require(
        architecture == "llama",
        f"{path}: architecture {architecture!r} is not supported; only 'llama'.",
    )
    require(
        not get("llama.expert_count", 0),
        f"{path}: llama.expert_count={get('llama.expert_count')}: mixtures of experts are not"
        " supported.",
    )
    scaling = get("llama.rope.scaling.type", "none")
    require(
        scaling == "none", f"{path}: RoPE scaling {scaling!r} is not supported; only Llama-3's."
    )
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    heads, hidden = need("llama.attention.head_count"), need("llama.embedding_length")
    require(
        isinstance(heads, int) and heads >= 1,
        f"{path}: llama.attention.head_count={heads!r} is not supported; expected one number for"
        " all layers.",
    )
    head_dim = get("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        require(
            get(key, head_dim) == head_dim,
            f"{path}: {key}={get(key)} differs from the head size {head_dim}; that is not"
            " supported.",
        )
    silent = _SENTENCEPIECE if get("tokenizer.ggml.model") == "llama" else {}
    eos = [get(f"tokenizer.ggml.{key}_token_id", silent.get(key)) for key in ("eos", "eot", "eom")]
    values = {
        "vocab_size": shapes.get("token_embd.weight", (0, 0))[-1],
        "hidden_size": hidden,
        "intermediate_size": need("llama.feed_forward_length"),
        "num_layers": need("llama.block_count"),
        "num_heads": heads,
        "num_kv_heads": get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": number("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": need("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": get("tokenizer.ggml.bos_token_id", silent.get("bos")),
        "eos_token_ids": [token for token in dict.fromkeys(eos) if token is not None],
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }
    config = from_dict(LlamaConfig, values, str(path))
    divisors = [t.data for t in reader.tensors if t.name == _ROPE]
    if not divisors:
        return config
    plain, given = rope_frequencies(config).astype(np.float64), np.asarray(divisors[0], np.float64)
    found = (
        with_frequencies(config, plain / given, rtol=1e-4)
        if given.shape == plain.shape and given.all()
        else None
    )
    require(
        found is not None,
        f"{path}: {_ROPE} is not Llama-3's RoPE scaling (low_freq_factor 1, high_freq_factor 4); no"
        " other is supported.",
    )
    return cast(LlamaConfig, found)


def build_tokenizer(path: Path, reader: Any, config: LlamaConfig) -> Any:
    """A PreTrainedTokenizerFast from the metadata, through transformers' own GGUF converter; None
    with a warning for a kind it does not know.
    """
    if reader.get_field("tokenizer.ggml.tokens") is None:
        return None
    keys = {
        "tokenizer_type": "model",
        "pre_tokenizer_type": "pre",
        "unk_token_id": "unknown_token_id",
        "pad_token_id": "padding_token_id",
    }
    keys |= {
        name: name
        for name in ("tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id")
    }
    found = {name: _metadata(path, reader, f"tokenizer.ggml.{key}") for name, key in keys.items()}
    data = {name: value for name, value in found.items() if value is not None}
    kind = data.get("tokenizer_type")
    if kind == "gpt2":
        data.setdefault("merges", [])  # an empty array is not stored
    if kind == "llama":
        data = {
            f"{name.removesuffix('nown')}_token_id": token for name, token in _SENTENCEPIECE.items()
        } | data
    try:
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend, extra = _converter()("llama", data)
        if data.get("pre_tokenizer_type") in _DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        special = {
            f"{name}_token": data["tokens"][data[f"{name}_token_id"]]
            for name in ("bos", "eos", "unk", "pad")
            if f"{name}_token_id" in data
        }
        given = {
            name: _metadata(path, reader, f"tokenizer.ggml.add_{name}")
            for name in ("bos_token", "eos_token", "space_prefix")
        }
        silent = {
            "bos_token": kind == "llama" or data.get("pre_tokenizer_type") in _STARTED,
            "eos_token": False,
            "space_prefix": kind == "llama",
        }
        adds = {
            name: silent[name] if value is None else bool(value) for name, value in given.items()
        }
        _start_and_end(
            backend,
            *(
                (special[name], data[f"{name}_id"]) if adds[name] and name in special else None
                for name in ("bos_token", "eos_token")
            ),
        )
        if kind == "llama" and not adds["space_prefix"]:
            _without_prefix(backend)
        extra = extra | {
            f"add_{name}": adds[name] and name in special for name in ("bos_token", "eos_token")
        }
        settings = {
            "model_max_length": config.max_position_embeddings,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **(extra | special | settings | {"clean_up_tokenization_spaces": False}),
        )
    except Exception as error:
        warnings.warn(
            f"{path}: its tokenizer ({data.get('tokenizer_type')!r}) could not be built"
            f" ({type(error).__name__}: {error}); the model has none.",
            stacklevel=4,
        )
        return None
    if (template := _metadata(path, reader, "tokenizer.chat_template")) is not None:
        tokenizer.chat_template = template
    return tokenizer


def _start_and_end(backend: Any, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """Have `backend` add these (token, id) to texts. Said by its post-processor, which every
    release of transformers reads and an export keeps.
    """
    from tokenizers import processors

    first, last = ([token[0]] if token else [] for token in (bos, eos))
    template = [*first, "$A", *last]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, *(f"{part}:1" for part in (*first, "$B", *last))],
        special_tokens=[t for t in (bos, eos) if t],
    )


def _without_prefix(backend: Any) -> None:
    """No space before a text's first word, and none taken off the decoded text."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _converter() -> Any:
    """transformers' GGUF metadata -> tokenizers converter. Imported by its module: the public way
    (AutoTokenizer with gguf_file) needs torch.
    """
    try:
        return importlib.import_module(
            "transformers.integrations.gguf.gguf_tokenizer_mapping"
        ).convert_gguf_tokenizer
    except ImportError:  # transformers before 5.24
        return importlib.import_module("transformers.integrations.ggml").convert_gguf_tokenizer
