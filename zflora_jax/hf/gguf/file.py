"""The GGUF container: names, types and bytes of its tensors, read with checks for damage.

A quantisation is a row of `QUANTS`. Blocks (ggml's block_q8_0, block_q4_0, block_q4_1) hold 32
weights: a float16 scale, for q4_1 a float16 minimum, then 32 int8 codes; or 16 bytes, of which byte
n has code n in its low and code n + 16 in its high half, q4_0's offset by 8.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES
from zflora_jax.hf.keys import as_finite
from zflora_jax.ops.quantized import KINDS, QuantizedArray


@dataclass(frozen=True)
class Tensor:
    """One stored tensor, a view of the mapped file."""

    name: str  # such as "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # outputs first; the file lists the axes backwards
    type: Any  # a `gguf.GGMLQuantizationType`
    data: np.ndarray  # as `gguf.dequantize` takes it; blocks are uint8 [*shape[:-1], row bytes]


class GGUFFile:
    """A GGUF file, mapped into memory, with its tensors by name in the order of the file.
    CheckpointError if it is truncated, damaged, big-endian or no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.errstate(over="raise"):  # offsets are unsigned integers, which would wrap
                reader = _reader()(path)
            self._fields = reader.fields
            self.tensors = {
                t.name: Tensor(t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data)
                for t in reader.tensors
            }
        except Exception as error:  # numpy, the enums and the reader each raise their own
            raise CheckpointError(
                f"{path} is not a readable GGUF file ({error}); it is truncated or damaged, or of"
                " another type. Download it again, or give the directory that holds config.json."
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The number, bool, str or list under a metadata key, such as "llama.block_count";
        CheckpointError for text that is not UTF-8.
        """
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the metadata key {key} cannot be read ({error}); the file is"
                " damaged. Download it again."
            ) from None

    def below(self, prefix: str) -> dict[str, Any]:
        """The metadata whose keys start with `prefix`, in the order of the file."""
        return {key: self.get(key) for key in self._fields if key.startswith(prefix)}

    def dequantised(self, tensor: Tensor) -> np.ndarray:
        """A tensor in float32; CheckpointError for a type that the `gguf` package cannot
        dequantise.
        """
        from gguf import dequantize

        try:
            return dequantize(tensor.data, tensor.type)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} cannot be dequantised: {error}."
            ) from error


@functools.cache
def _reader() -> Any:
    """The `gguf` package's reader, which checks no length, with a check of every read."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(
            self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
        ) -> np.ndarray:
            if self.byte_order != "I":
                raise ValueError("it is big-endian; see gguf-convert-endian")
            if isinstance(self.data, np.memmap):
                # A plain array is sliced several times as fast.
                self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it ends before byte {end} that its header refers to")
            return self.data[offset:end].view(dtype)

    return Reader


# --- names ----------------------------------------------------------------------------------------

# A metadata key: llama.cpp multiplies q and k by it when it rotates them, every dim of a head.
ATTENTION_FACTOR = "rope.scaling.attn_factor"
ROPE_DIVISORS = "rope_freqs.weight"  # divisors of the inverse frequencies, one for each pair

# Metadata key of the architecture -> field of LlamaConfig.
SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}

# GGUF name -> Hugging Face name.
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
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
_TO_GGUF = {hf: name for name, hf in (_LAYER | _TOP).items()}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that has none stays as it is."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    if name in _TO_GGUF:
        return _TO_GGUF[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    module, parameter = rest.rsplit(".", 1)
    return f"blk.{layer}.{_TO_GGUF[module]}.{parameter}"


def tensor_module(name: str) -> str:
    """The module of a GGUF tensor without its layer: "attn_q", "token_embd", ..."""
    return name.split(".")[-2]


def has_pairs(architecture: str) -> bool:
    """Whether llama.cpp interleaves the two halves of rotated heads of an architecture."""
    return any(f.gguf_pairs for f in FAMILIES.values() if f.gguf == architecture)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of q or k, [heads * k, ...], from llama.cpp's order (0, k/2, 1, k/2 + 1,
    ... of each head) into Hugging Face's.
    """
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_split`."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


# --- types ----------------------------------------------------------------------------------------

SIZE = 32  # weights per block
KEPT = ("q8_0", "q4_0", "q4_1")  # types whose blocks can be kept


@dataclass(frozen=True)
class Quant:
    """The types that the tensors of a file get, names of `gguf.GGMLQuantizationType`."""

    matrix: str  # of the layers' matrices
    table: str  # of the embedding and the head
    file_type: str  # name of the file's `gguf.LlamaFileType`
    dtype: str = "bfloat16"  # whose rounding eps_z may disturb the logits by


QUANTS = {
    "f32": Quant("F32", "F32", "ALL_F32", "float32"),
    "f16": Quant("F16", "F16", "MOSTLY_F16", "float16"),
    "bf16": Quant("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": Quant("Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "q4_0": Quant("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
    "q4_1": Quant("Q4_1", "Q8_0", "MOSTLY_Q4_1"),
}
KEEP = "keep"  # `gguf.keep` chooses the type of each tensor


@dataclass(frozen=True)
class Planned:
    """A tensor of a file before its values are known."""

    name: str
    shape: tuple[int, ...]  # outputs first
    type: Any  # a `gguf.GGMLQuantizationType`
    wanted: str  # the type that the quantisation asks for; another where no block divides a row

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of the encoded tensor, uint8."""
        from gguf.quants import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.type))

    def check(self, array: np.ndarray | QuantizedArray) -> None:
        """ValueError for another shape, CheckpointError for a value that is not finite in this
        type.
        """
        if array.shape != self.shape:
            raise ValueError(f"{self.name} is {array.shape}; announced: {self.shape}.")
        if isinstance(array, QuantizedArray):
            for scales in (array.scales, array.mins):
                if scales is not None:
                    as_finite(scales, np.float16, f"a scale of {self.name}", "the model")
            return
        # The scales of blocks are float16; values beyond its range would be near its end if scaled.
        range_of = {"F32": "float32", "BF16": "bfloat16"}.get(self.type.name, "float16")
        as_finite(array, np.dtype(range_of), self.name, "the model")

    def encode(self, array: np.ndarray | QuantizedArray) -> np.ndarray:
        """The bytes, uint8 `byte_shape`, of float32 values in GGUF's layout, or of codes [out, in]
        of this type with their scales.
        """
        if isinstance(array, QuantizedArray):
            return to_blocks(array)
        from gguf import quantize

        data = quantize(array, self.type)
        return np.ascontiguousarray(data).view(np.uint8).reshape(self.byte_shape)


def plan_tensor(name: str, shape: tuple[int, ...], quant: Quant) -> Planned:
    """Chooses the type of a tensor by its GGUF name and its shape, outputs first."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = quant.table if tensor_module(name) in ("token_embd", "output") else quant.matrix
    if len(shape) == 1:
        wanted = "F32"  # norms, biases and RoPE divisors: llama.cpp computes with them as they are
    block = GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0]
    found = "F16" if shape[-1] % block else wanted  # as llama-quantize does
    return Planned(name, shape, GGMLQuantizationType[found], wanted)


def types_report(tensors: list[Planned]) -> dict[str, str]:
    """How many tensors have which type, and which could not have the wanted one."""
    counts = Counter(tensor.type.name for tensor in tensors)
    fallen = {
        f"{tensor_module(t.name)} as {t.type.name} (rows of {t.shape[-1]})": None
        for t in tensors
        if t.type.name != t.wanted
    }
    types = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return {"types": types, "fallback": ", ".join(fallen) or "none"}


def from_blocks(data: np.ndarray, kind: str) -> QuantizedArray:
    """Codes [out, in] and scales [out, in / 32], groups along the last axis, of a tensor's bytes,
    uint8 [out, bytes per row]. kind: Its type, one of `KEPT`.
    """
    mins = KINDS[kind].has_mins
    head = 4 if mins else 2
    blocks = data.reshape(len(data), -1, head + (SIZE if kind == "q8_0" else SIZE // 2))
    halves = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
    body = blocks[..., head:]
    if kind == "q8_0":
        codes = np.ascontiguousarray(body).view(np.int8)
    else:
        both = np.concatenate([body & 15, body >> 4], axis=-1).astype(np.int8)
        signed = KINDS[kind].codes == "int4"
        codes = (both - 8).astype(ml_dtypes.int4) if signed else both.astype(ml_dtypes.uint4)
    codes = codes.reshape(len(data), -1)
    least = halves[..., 1] if mins else None
    return QuantizedArray(codes, halves[..., 0], least, kind, 1, 0, SIZE, codes.shape[1])


def to_blocks(w: QuantizedArray) -> np.ndarray:
    """The inverse of `from_blocks`: bytes [out, bytes per row] of codes [out, in]."""
    rows = len(w.codes)
    scales = [np.asarray(part, np.float16) for part in (w.scales, w.mins) if part is not None]
    head = np.stack(scales, axis=-1).view(np.uint8)
    body: np.ndarray
    if w.kind == "q8_0":
        body = np.asarray(w.codes, np.int8).view(np.uint8).reshape(rows, -1, SIZE)
    else:
        least = 8 if KINDS[w.kind].codes == "int4" else 0
        codes = (np.asarray(w.codes).astype(np.int8) + least).astype(np.uint8)
        halves = codes.reshape(rows, -1, 2, SIZE // 2)
        body = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return np.concatenate([head, body], axis=-1).reshape(rows, -1)
