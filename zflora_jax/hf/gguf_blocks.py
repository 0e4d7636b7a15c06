"""GGUF's blocks of 32 numbers as codes and scales, and back, byte for byte.

Formats (ggml's block_q8_0, block_q4_0, block_q4_1): a float16 scale, for q4_1 a float16 minimum,
then 32 int8 codes; or 16 bytes, of which byte n has code n in its low and code n + 16 in its high
half, q4_0's counted from -8.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from zflora_jax.ops.quantized import KINDS, QuantizedArray

SIZE = 32  # numbers of a block
KEPT = ("q8_0", "q4_0", "q4_1")  # kinds whose blocks are kept as they are


def from_blocks(data: np.ndarray, kind: str) -> QuantizedArray:
    """The codes and scales of a tensor.

    Args:
      data: its bytes, uint8 [out, bytes of a row].
      kind: one of `KEPT`.

    Returns:
      Codes [out, in] and scales [out, in / 32], groups along the last axis.
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
    width = codes.shape[1]
    return QuantizedArray(codes, halves[..., 0], least, kind, 1, 0, SIZE, width)


def to_blocks(w: QuantizedArray) -> np.ndarray:
    """The inverse of `from_blocks`: bytes [out, bytes of a row] of codes [out, in]."""
    rows = len(w.codes)
    scales = [np.asarray(w.scales, np.float16)]
    if w.mins is not None:
        scales.append(np.asarray(w.mins, np.float16))
    head = np.stack(scales, axis=-1).view(np.uint8)
    body: np.ndarray
    if w.kind == "q8_0":
        body = np.asarray(w.codes, np.int8).view(np.uint8).reshape(rows, -1, SIZE)
    else:
        least = 8 if KINDS[w.kind].codes == "int4" else 0
        codes = (np.asarray(w.codes).astype(np.int8) + least).astype(np.uint8)
        low, high = np.split(codes.reshape(rows, -1, 2, SIZE // 2), 2, axis=2)
        body = np.squeeze(low | (high << 4), axis=2)
    return np.concatenate([head, body], axis=-1).reshape(rows, -1)
