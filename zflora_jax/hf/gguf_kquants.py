"""Q4_K and Q6_K, which the `gguf` package reads but does not write.

Both store super-blocks of 256 numbers with one float16 scale, and sub-blocks with small integers
that multiply it. A sub-block's scale is searched for: a few candidates around the one that the
largest number asks for, each with the best scale for its codes, and the least weighted squared
error wins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SUPER = 256  # numbers of a super-block
_AT_ONCE = 1 << 12  # super-blocks: the search needs some twenty float32 arrays of this many

_Q4_STEPS = np.linspace(-1.0, 1.0, 11)  # added to the 15 steps of a sub-block
_Q6_STEPS = np.linspace(-0.9, 0.9, 13)  # added to the 32 steps on one side of zero


def quantize_q4_k(array: np.ndarray) -> np.ndarray:
    """Quantise to Q4_K: x = d scale code - m min, codes 0..15 and 6 bit scale and min for 32
    numbers each.

    Args:
      array: float32 [..., n], n a multiple of 256.

    Returns:
      uint8 [..., n / 256 * 144], as the file holds it.
    """
    return _in_pieces(array, _q4_k, 144)


def quantize_q6_k(array: np.ndarray) -> np.ndarray:
    """Quantise to Q6_K: x = d scale code, codes -32..31 and an 8 bit scale for 16 numbers each.

    Args:
      array: float32 [..., n], n a multiple of 256.

    Returns:
      uint8 [..., n / 256 * 210], as the file holds it.
    """
    return _in_pieces(array, _q6_k, 210)


def _in_pieces(
    array: np.ndarray, quantise: Callable[[np.ndarray], np.ndarray], size: int
) -> np.ndarray:
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, SUPER)
    out = np.empty((len(blocks), size), np.uint8)
    for start in range(0, len(blocks), _AT_ONCE):
        out[start : start + _AT_ONCE] = quantise(blocks[start : start + _AT_ONCE])
    return out.reshape(*array.shape[:-1], -1)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """uint8 [B, 144] of float32 [B, 256]."""
    x = blocks.reshape(-1, 8, 32)
    scale, least = _affine(x)
    d, whole = _integers(scale, 63)
    m, offset = _integers(least, 63)
    step = (d * whole)[..., None]
    start = (m * offset)[..., None]
    codes = np.rint(_ratio(x + start, step)).clip(0, 15).astype(np.uint8)
    # Two sub-blocks share 32 bytes: the low halves of the bytes are the first one's.
    pairs = codes.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    head = np.concatenate([_half(d), _half(m)], axis=-1)
    return np.concatenate([head, _six_bits(whole, offset), packed], axis=-1)


def _affine(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, least), both at least 0, with x near scale * code - least for codes 0..15.

    x: float32 [B, 8, 32]. Large numbers weigh more, as an error of theirs does in a product.
    """
    weight = np.sqrt(np.mean(x * x, -1, keepdims=True)) + np.abs(x)
    low = np.minimum(x.min(-1, keepdims=True), 0)
    span = x.max(-1, keepdims=True) - low
    w, wx = weight.sum(-1), (weight * x).sum(-1)
    best = np.full(w.shape, np.inf, np.float32)
    scale, least = np.zeros_like(w), np.zeros_like(w)
    for step in _Q4_STEPS:
        codes = np.rint(_ratio((x - low) * (15 + step), span)).clip(0, 15)
        # Weighted least squares of x = a code + b, with b at most 0: the format has no other.
        wl, wll = (weight * codes).sum(-1), (weight * codes * codes).sum(-1)
        wxl = (weight * x * codes).sum(-1)
        a = _ratio(w * wxl - wx * wl, w * wll - wl * wl)
        b = _ratio(wll * wx - wl * wxl, w * wll - wl * wl)
        a, b = np.where(b > 0, _ratio(wxl, wll), a), np.minimum(b, 0)
        error = (weight * np.square(a[..., None] * codes + b[..., None] - x)).sum(-1)
        better = (error < best) & (a >= 0)
        best = np.where(better, error, best)
        scale, least = np.where(better, a, scale), np.where(better, -b, least)
    return scale, least


def _integers(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(float16 numbers [B, 1] as float32, integers 0..most) whose product is near `values`
    [B, n].
    """
    unit = (values.max(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    return unit, np.rint(_ratio(values, unit)).clip(0, most).astype(np.uint8)


def _six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """uint8 [B, 12] of eight scales and eight mins of 6 bits.

    The first four of each fill the low 6 bits of bytes 0-3 and 4-7. Of the last four, the low 4
    bits are in bytes 8-11, the high 2 bits in the free bits of 0-3 and 4-7.
    """
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = mins[:, :4] | ((mins[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=-1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """uint8 [B, 210] of float32 [B, 256]."""
    x = blocks.reshape(-1, 16, 16)
    scale = _symmetric(x)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)
    d = (largest / -128).astype(np.float16).astype(np.float32)  # -128: int8 has one more below 0
    whole = np.rint(_ratio(scale, d)).clip(-128, 127)
    codes = np.rint(_ratio(x, (d * whole)[..., None])).clip(-32, 31).astype(np.int8) + 32
    # Each half of 128 numbers: four rows of 32. Rows 0 and 2 share bytes for their low 4 bits, and
    # so do 1 and 3; the high 2 bits of all four share a byte.
    rows = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (rows[:, :, :2] & 15) | ((rows[:, :, 2:] & 15) << 4)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = np.bitwise_or.reduce((rows >> 4) << shifts, axis=2)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), whole.astype(np.int8).view(np.uint8)]
    return np.concatenate([*parts, _half(d)], axis=-1)


def _symmetric(x: np.ndarray) -> np.ndarray:
    """Scales with x near scale * code for codes -32..31, float32 [B, 16] of [B, 16, 16]."""
    weight = x * x
    at = np.abs(x).argmax(-1)[..., None]
    largest = np.take_along_axis(x, at, -1)
    best, scale = np.full(x.shape[:-1], -np.inf, np.float32), np.zeros(x.shape[:-1], np.float32)
    for step in _Q6_STEPS:
        codes = np.rint(_ratio(x * -(32 + step), largest)).clip(-32, 31)
        wxl, wll = (weight * x * codes).sum(-1), (weight * codes * codes).sum(-1)
        gain = _ratio(
            wxl * wxl, wll
        )  # by how much the best scale for these codes reduces the error
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, _ratio(wxl, wll), scale)
    return scale


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape, np.float32), where=b != 0)


def _half(x: np.ndarray) -> np.ndarray:
    """The bytes of float16 numbers, uint8 [B, 2] of [B, 1]."""
    return x.astype(np.float16).view(np.uint8)
