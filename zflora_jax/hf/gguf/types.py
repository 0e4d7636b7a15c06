"""Tensor types in GGUF files: which one each tensor gets, and its bytes.

A quantisation is a row of `QUANTS`. Blocks (ggml's block_q8_0, block_q4_0, block_q4_1) hold 32
weights: a float16 scale, for q4_1 a float16 minimum, then 32 int8 codes; or 16 bytes, of which byte
n has code n in its low and code n + 16 in its high half, q4_0's offset by 8.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from zflora_jax.core.fields import nearest, require
from zflora_jax.hf.gguf.names import tensor_module
from zflora_jax.hf.keys import as_finite
from zflora_jax.ops.quantized import KINDS, QuantizedArray

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


def check_quant(quant: str) -> None:
    """Raises ConfigError for a name that is neither in `QUANTS` nor "keep"."""
    require(
        quant in (*QUANTS, KEEP),
        f"quant={quant!r}: {nearest(quant, (*QUANTS, KEEP))}. For other types, such as q4_k_m,"
        " write an f16 file (--quant f16) and quantise it with llama.cpp: `llama-quantize FILE.gguf"
        " OUT.gguf Q4_K_M`.",
    )


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
        """Raises ValueError for another shape, CheckpointError for a value that is not finite in
        this type.
        """
        if array.shape != self.shape:
            raise ValueError(f"{self.name} is {array.shape}; announced: {self.shape}.")
        if isinstance(array, QuantizedArray):
            for scales in (array.scales, array.mins):
                if scales is not None:
                    as_finite(scales, np.float16, f"a scale of {self.name}", "the model")
            return
        # The scales of blocks are float16. Values beyond its range would be near its end even if
        # scaled.
        range_of = {"F32": "float32", "BF16": "bfloat16"}.get(self.type.name, "float16")
        as_finite(array, np.dtype(range_of), self.name, "the model")

    def encode(self, array: np.ndarray | QuantizedArray) -> np.ndarray:
        """Returns the bytes, uint8 `byte_shape`, of float32 values in GGUF's layout, or of codes
        [out, in] of this type with their scales, which are written as they are.
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
    """Returns how many tensors have which type, and which could not have the wanted one."""
    counts = Counter(tensor.type.name for tensor in tensors)
    fallen = {
        f"{tensor_module(t.name)} as {t.type.name} (rows of {t.shape[-1]})": None
        for t in tensors
        if t.type.name != t.wanted
    }
    types = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return {"types": types, "fallback": ", ".join(fallen) or "none"}


def from_blocks(data: np.ndarray, kind: str) -> QuantizedArray:
    """Returns codes [out, in] and scales [out, in / 32], groups along the last axis, of a tensor's
    bytes, uint8 [out, bytes per row]. kind: Its type, one of `KEPT`.
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
