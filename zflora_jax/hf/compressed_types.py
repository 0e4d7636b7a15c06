"""Quantisations of Hugging Face directories in the compressed-tensors format: what `quant` may be,
what config.json says of it, and how codes are packed into words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.core.fields import nearest, require
from zflora_jax.ops.quantized import KINDS

PACKED, PLAIN = "pack-quantized", "int-quantized"
DTYPES = ("float32", "bfloat16")  # of what is not quantised; vLLM casts scales to it too
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Quant:
    """A way to store the layers' kernels.

    Attributes:
      kind: of their codes, a key of `KINDS`: "int8" has one scale for each output, "int4" one for
        each group of inputs.
      text: for messages and help.
      group: inputs of a group; None: the kind's own, or that of the model's codes.
      format: compressed-tensors' name of the layout.
      activations: whether the consumer rounds activations to 8 bits, token by token.
    """

    kind: str
    text: str
    group: int | None = None
    format: str = PACKED
    activations: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return KINDS[self.kind].bits

    @property
    def parts(self) -> tuple[str, ...]:
        """What a kernel's tensors end in, in place of "weight"."""
        if self.format == PLAIN:
            return ("weight", "weight_scale")
        return ("weight_packed", "weight_scale", "weight_shape")


QUANTS = {
    "int8": Quant("int8", "W8A16, one scale for each output channel"),
    "w8a8": Quant(
        "int8", "the codes of int8, activations rounded to 8 bits", format=PLAIN, activations=True
    ),
    "int4": Quant("int4", "W4A16 in groups of 64, or of the codes that the model has"),
    **{f"int4-g{n}": Quant("int4", f"W4A16 in groups of {n}", n) for n in KINDS["int4"].groups},
}


def check_quant(quant: str, dtype: str | None = None) -> Quant:
    """The row of a quantisation.

    Args:
      quant: a key of `QUANTS`.
      dtype: of what is not quantised; None: not known yet.

    Raises:
      ConfigError: there is no such `quant`, or it does not go with `dtype`.
    """
    require(
        quant in QUANTS,
        f"quant={quant!r} of a Hugging Face directory: {nearest(quant, QUANTS)}. The types of"
        " llama.cpp (q8_0, q4_k_m, ...) go with --format gguf.",
    )
    require(
        dtype is None or dtype in DTYPES,
        f"quant={quant!r} with dtype={dtype!r}: scales become too small for it. Choose"
        f" {' or '.join(DTYPES)}, or leave dtype out.",
    )
    return QUANTS[quant]


def quantization_config(quant: Quant, groups: Mapping[str, int]) -> dict[str, Any]:
    """The quantization_config of config.json, as llm-compressor writes it.

    Args:
      quant: of the kernels.
      groups: kernel -> inputs of a group, 0: all.
    """
    sizes = sorted({groups[kernel] for kernel in _PROJECTIONS}, reverse=True)
    targets = {
        size: [f"re:.*{kernel}_proj$" for kernel in _PROJECTIONS if groups[kernel] == size]
        for size in sizes
    }
    activations = _arguments(8, "token", dynamic=True) if quant.activations else None

    def scheme(size: int) -> dict[str, Any]:
        return {
            "format": quant.format,
            "input_activations": activations,
            "output_activations": None,
            "targets": ["Linear"] if len(sizes) == 1 else targets[size],
            "weights": _arguments(quant.bits, "group" if size else "channel", size or None),
        }

    return {
        "config_groups": {f"group_{i}": scheme(size) for i, size in enumerate(sizes)},
        "format": quant.format,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "model.embed_tokens", "re:.*norm$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _arguments(
    bits: int, strategy: str, group: int | None = None, *, dynamic: bool = False
) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group,
        "num_bits": bits,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
    }


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as words: the first in the lowest bits, counted from the lowest code.

    Args:
      codes: [out, in] int8.
      bits: of a code, 4 or 8.

    Returns:
      int32 [out, in * bits / 32], zeros behind the last code of a row.
    """
    each = 32 // bits
    counted = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint32)
    counted = np.pad(counted, [(0, 0), (0, -codes.shape[1] % each)])
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words = counted.reshape(len(codes), -1, each) << shifts
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def unpack(words: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `pack`: int8 codes [out, width]."""
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    counted = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    codes = counted.astype(np.int16) - (1 << (bits - 1))
    return codes.astype(np.int8).reshape(len(words), -1)[:, :width]


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, int]:
    """The shape of `pack`'s words."""
    return shape[0], -(-shape[1] * bits // 32)
