"""Quantisations of GGUF files: which GGML type each tensor gets, and its bytes.

A quantisation is a row of `QUANTS`. `plan_tensor` names the type of a tensor from its name and
shape, `Planned.encode` makes the bytes, and nothing else writes numbers into a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zflora_jax.hf.gguf_blocks import to_blocks
from zflora_jax.hf.gguf_kquants import quantize_q4_k, quantize_q6_k
from zflora_jax.hf.gguf_names import tensor_kind
from zflora_jax.hf.keys import as_finite
from zflora_jax.ops.quantized import QuantizedArray


@dataclass(frozen=True)
class Quant:
    """Which type the tensors of a file get. Types are names of `gguf.GGMLQuantizationType`.

    Attributes:
      matrix: of matrices that the other attributes do not name.
      file_type: name of the file's `gguf.LlamaFileType`.
      dtype: whose rounding eps_z may disturb the logits by.
      kinds: type by kind of tensor, as `tensor_kind` names it.
      output: of the table that gives the logits: "output", or tied "token_embd".
      careful: type by kind in the layers of `_is_careful`.
    """

    matrix: str
    file_type: str
    dtype: str = "bfloat16"
    kinds: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    careful: Mapping[str, str] = field(default_factory=dict)


_TABLES = {"token_embd": "Q8_0", "output": "Q8_0"}
QUANTS = {
    "f32": Quant("F32", "ALL_F32", "float32"),
    "f16": Quant("F16", "MOSTLY_F16", "float16"),
    "bf16": Quant("BF16", "MOSTLY_BF16"),
    "q8_0": Quant("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": Quant("Q4_0", "MOSTLY_Q4_0", kinds=_TABLES),
    "q4_1": Quant("Q4_1", "MOSTLY_Q4_1", kinds=_TABLES),
    # The mixture that llama-quantize calls Q4_K_M.
    "q4_k_m": Quant(
        "Q4_K", "MOSTLY_Q4_K_M", output="Q6_K", careful={"attn_v": "Q6_K", "ffn_down": "Q6_K"}
    ),
}

KEEP = "keep"  # no row: `gguf_keep` says which type each tensor has
TYPES = (*QUANTS, KEEP)

# The type of rows that are no multiple of a type's block: llama-quantize's choice. F16 has no
# blocks.
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"} | dict.fromkeys(
    ("Q4_0", "Q4_1", "Q5_0", "Q8_0"), "F16"
)
_OWN = {"Q4_K": quantize_q4_k, "Q6_K": quantize_q6_k}  # the `gguf` package has the others


@dataclass(frozen=True)
class Planned:
    """A tensor of a file, before its numbers are known.

    Attributes:
      name: GGUF's.
      shape: outputs first.
      kind: its `gguf.GGMLQuantizationType`.
      wanted: the name of the type that the quantisation has for it; another than kind's where a
        row is no multiple of its block.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    wanted: str

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of the encoded tensor."""
        from gguf.quants import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.kind))

    def check(self, array: np.ndarray | QuantizedArray) -> None:
        """Check that the numbers of the tensor, or its codes and scales, are those that `encode`
        takes.

        Raises:
          ValueError: they have another shape.
          CheckpointError: a number is not finite in this type.
        """
        if array.shape != self.shape:
            raise ValueError(f"{self.name} is {array.shape}; announced: {self.shape}.")
        if isinstance(array, QuantizedArray):
            for scales in (array.scales, array.mins):
                if scales is not None:
                    as_finite(scales, np.float16, f"a scale of {self.name}", "the model")
            return
        # The scales of blocks are float16. Numbers beyond it would be near its end even if scaled.
        range_of = {"F32": "float32", "BF16": "bfloat16"}.get(self.kind.name, "float16")
        as_finite(array, np.dtype(range_of), self.name, "the model")

    def encode(self, array: np.ndarray | QuantizedArray) -> np.ndarray:
        """The bytes of the tensor, uint8 `byte_shape`.

        Args:
          array: its numbers, float32 in GGUF's layout, or codes [out, in] of this type with their
            scales, which are written as they are; `check` accepts them.
        """
        if isinstance(array, QuantizedArray):
            return to_blocks(array)
        from gguf import quantize

        own = _OWN.get(self.kind.name)
        data = quantize(array, self.kind) if own is None else own(array)
        return np.ascontiguousarray(data).view(np.uint8).reshape(self.byte_shape)


def plan_tensor(
    name: str, shape: tuple[int, ...], quant: Quant, *, layers: int, tied: bool
) -> Planned:
    """Choose the type of a tensor.

    Args:
      name: GGUF's.
      shape: outputs first.
      quant: the quantisation of the file.
      layers: of the model.
      tied: whether the embedding is the head too.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind, wanted = tensor_kind(name), quant.matrix
    if len(shape) == 1:
        wanted = "F32"  # norms, biases and RoPE divisors: llama.cpp computes with them as they are
    elif kind in quant.kinds:
        wanted = quant.kinds[kind]
    elif quant.output and kind == ("token_embd" if tied else "output"):
        wanted = quant.output
    elif kind in quant.careful and _is_careful(int(name.split(".")[1]), layers):
        wanted = quant.careful[kind]
    found = wanted
    while shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[found]][0]:
        found = _FALLBACK[found]
    return Planned(name, shape, GGMLQuantizationType[found], wanted)


def _is_careful(layer: int, layers: int) -> bool:
    """Whether llama-quantize gives a layer more bits: the first and the last eighth, and every
    third between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def types_report(tensors: list[Planned]) -> dict[str, str]:
    """How many tensors have which type, and which could not have the type of the quantisation."""
    counts: dict[str, int] = {}
    fallen: dict[tuple[str, str, int], list[str]] = {}
    for tensor in tensors:
        kind = tensor.kind.name
        counts[kind] = counts.get(kind, 0) + 1
        if kind != tensor.wanted:
            kinds = fallen.setdefault((tensor.wanted, kind, tensor.shape[-1]), [])
            kinds.append(tensor_kind(tensor.name))
    texts = [
        f"{wanted} -> {kind}: {len(kinds)} tensors with rows of {width}"
        f" ({', '.join(dict.fromkeys(kinds))})"
        for (wanted, kind, width), kinds in fallen.items()
    ]
    report = {"types": ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))}
    return report | {"fallback": "; ".join(texts) or "none"}
