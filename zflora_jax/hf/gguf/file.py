"""The GGUF container: its tensors with names, shapes, types and bytes, read and encoded.

A quantisation is a row of `QUANTS`. Blocks (ggml's block_q8_0, block_q4_0, block_q4_1) hold 32
weights: a float16 scale, for q4_1 a float16 minimum, then 32 int8 codes; or 16 bytes, of which byte
n has code n in its low and code n + 16 in its high half, q4_0's offset by 8.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.keys import Place, as_finite, hf_table
from zflora_jax.ops.quantized import KINDS, QuantizedArray

SIZE = 32  # weights per block
KEPT = ("q8_0", "q4_0", "q4_1")  # types whose blocks can be kept
KEEP = "keep"  # the quantisation that keeps the base's blocks


class Quant(NamedTuple):
    """The types of a file's matrices, and the dtype whose rounding bounds the effect of eps_z."""

    matrix: str  # type of the layers' matrices, a name of `gguf.GGMLQuantizationType`
    table: str  # type of the embedding and the head
    dtype: str = "bfloat16"


QUANTS = {
    "f32": Quant("F32", "F32", "float32"),
    "f16": Quant("F16", "F16", "float16"),
    "bf16": Quant("BF16", "BF16"),
    "q8_0": Quant("Q8_0", "Q8_0"),
    "q4_0": Quant("Q4_0", "Q8_0"),
    "q4_1": Quant("Q4_1", "Q8_0"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, or one to write."""

    name: str  # such as "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # outputs first; the file lists the axes backwards
    type: Any  # a `gguf.GGMLQuantizationType`
    data: Any = None  # a view of the mapped file; blocks are uint8 [*shape[:-1], row bytes]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of the encoded tensor, uint8."""
        from gguf.quants import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.type))

    def encode(self, values: np.ndarray | QuantizedArray) -> np.ndarray:
        """The bytes, uint8 `byte_shape`, of float32 values, or of codes [out, in] of this type;
        CheckpointError for a value that is not finite in it.
        """
        from gguf import quantize

        if isinstance(values, QuantizedArray):
            check_scales(values, self.name, "the model")
            return to_blocks(values)
        # The scales of blocks are float16: values beyond its range would need scales near its end.
        range_of = {"F32": "float32", "BF16": "bfloat16"}.get(self.type.name, "float16")
        as_finite(values, np.dtype(range_of), self.name, "the model")
        data = np.ascontiguousarray(quantize(values, self.type))
        return data.view(np.uint8).reshape(self.byte_shape)


def check_scales(w: QuantizedArray, name: str, what: str) -> None:
    """Raises CheckpointError for a scale or minimum that is not finite in float16."""
    for part in (w.scales, w.mins):
        if part is not None:
            as_finite(part, np.float16, f"a scale of {name}", what)


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
        """The number, bool, str or list at a metadata key, such as "llama.block_count";
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

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a metadata key of the file's architecture, such as "block_count"."""
        return self.get(f"{self.get('general.architecture')}.{name}", default)

    def below(self, prefix: str) -> dict[str, Any]:
        """The metadata whose keys start with `prefix`, in the order of the file."""
        return {key: self.get(key) for key in self._fields if key.startswith(prefix)}

    def dequantised(self, tensor: Tensor) -> np.ndarray:
        """A tensor in float32; CheckpointError for a type that `gguf` cannot dequantise."""
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


# --- names and orders -----------------------------------------------------------------------------

# A metadata key: llama.cpp multiplies q and k by it when it rotates them, every dim of a head.
ATTENTION_FACTOR = "rope.scaling.attn_factor"
ORIGINAL_CONTEXT = "rope.scaling.original_context_length"  # of Llama 3's scaling
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


@functools.lru_cache(maxsize=16)
def gguf_table(config: LlamaConfig) -> Mapping[str, Place]:
    """Name of a tensor in a GGUF file -> its place, in llama.cpp's usual order."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[config.traits.gguf.upper()], config.num_layers)
    found = {
        str(names.get_name(name, (".weight", ".bias"))): place
        for name, place in hf_table(config).items()
    }
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("output")))


def paired(
    rows: np.ndarray, config: LlamaConfig, architecture: str, module: str, inverse: bool = False
) -> np.ndarray:
    """Reorders the rows of a module ("q", "k_bias", ...) for a llama.cpp architecture: each rotated
    head becomes 0, k/2, 1, k/2 + 1, ...; other rows stay. inverse: Convert from that order.
    """
    pairs = any(f.gguf_pairs for f in FAMILIES.values() if f.gguf == architecture)
    counts = {"q": config.num_heads, "k": config.num_kv_heads}
    heads = counts.get(module.removesuffix("_bias"))
    if heads is None or not pairs:
        return rows
    half = len(rows) // heads // 2
    given = rows.reshape(heads, *((half, 2) if inverse else (2, half)), *rows.shape[1:])
    return given.swapaxes(1, 2).reshape(rows.shape)


# --- blocks ---------------------------------------------------------------------------------------


def from_blocks(data: np.ndarray, kind: str) -> QuantizedArray:
    """Reads codes [out, in] and scales [out, in / 32], in groups along the last axis, from a
    tensor's bytes, uint8 [out, bytes per row]. kind: Its type, one of `KEPT`.
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
