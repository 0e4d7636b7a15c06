"""Models from GGUF files (llama.cpp): dequantised tensor by tensor, or with the file's own blocks.
Needs no torch.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.gguf_blocks import KEPT, SIZE, from_blocks
from zflora_jax.hf.gguf_config import ROPE_DIVISORS, gguf_config
from zflora_jax.hf.gguf_reader import GGUFFile, Tensor
from zflora_jax.hf.gguf_tokenizer import gguf_tokenizer
from zflora_jax.hf.keys import (
    Place,
    Slices,
    as_finite,
    check_layer_count,
    check_tensors,
    gather,
    hf_table,
)
from zflora_jax.hf.quantized_leaves import QuantizedLeaves, native_blocks, whole_groups
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel.sharding import placement

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


log = logging.getLogger(__name__)


def load_gguf(
    path: Path, dtype: str, scan_layers: bool, mesh: Any = None, how: QuantizeConfig | None = None
) -> Model:
    """Load the model in a GGUF file.

    Args:
      path: the file.
      dtype: "float32" or "bfloat16", of the parameters; each tensor is dequantised in float32 and
        cast on its own.
      scan_layers: whether the layers are stacked on a leading axis.
      mesh: that the parameters are divided over; None: whole, on the first device.
      how: what is stored as codes; None: nothing. What it asks to keep and the file has in blocks
        of other kinds than `gguf_blocks.KEPT` becomes numbers, and the log says so.

    Returns:
      The model, with the tokenizer that the metadata describe (None with a warning if it is of an
      unknown kind).

    Raises:
      ConfigError: the forward pass has no code for the model.
      CheckpointError: the file is damaged, or its tensors are missing, unexpected, misshapen or not
        finite.
    """
    file, what = GGUFFile(path), str(path)
    named = {_hf_name(name): t for name, t in file.tensors.items() if name != ROPE_DIVISORS}
    config = gguf_config(file).replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    check_layer_count(named, config.num_layers, what)
    table = hf_table(config)
    shapes = {name: tensor.shape for name, tensor in named.items()}
    check_tensors(table, shapes, what, config.num_layers)
    tensors = _Tensors(file, named, config)
    leaves = QuantizedLeaves(
        config, how or QuantizeConfig(), mesh, tensors.read, tensors.kind, tensors.blocks
    )
    sharding = None if mesh is None else partial(placement, mesh)
    params = unflatten(gather(table, tensors.read, dtype, sharding, leaves))
    if leaves.left:
        log.warning(
            "%s: %s are not in blocks of %s, so they are read as %s numbers",
            *(what, ", ".join(leaves.left), ", ".join(KEPT).upper(), dtype),
        )
    return Model(config, params, tokenizer=gguf_tokenizer(file, config))


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file by Hugging Face's names, read into native layout."""

    file: GGUFFile
    named: dict[str, Tensor]
    config: LlamaConfig

    def read(self, name: str, place: Place, slices: Slices) -> np.ndarray:
        """Numbers. A block of quantised ones cannot be cut, so the tensor is read whole."""
        tensor = self.named[name]
        array = self.file.dequantised(tensor)
        if heads := self._heads(name):
            array = _half_split(array, heads)
        array = as_finite(array, self.config.execution.dtype, tensor.name, str(self.file.path))
        return place.to_native(array)[slices]

    def kind(self, name: str, place: Place) -> str | None:
        """The kind of a tensor's blocks, None where they cannot be kept."""
        found = self.named[name].kind.name.lower()
        return found if found in KEPT and whole_groups(place, SIZE) else None

    def blocks(self, name: str, place: Place) -> QuantizedArray:
        """The blocks as codes and scales."""
        tensor = self.named[name]
        found = from_blocks(tensor.data, tensor.kind.name.lower())
        for scales in (found.scales, found.mins):
            if scales is not None:
                as_finite(scales, np.float16, f"a scale of {tensor.name}", str(self.file.path))
        if heads := self._heads(name):
            found = jax.tree.map(lambda part: _half_split(part, heads), found)
        return native_blocks(found, place)

    def _heads(self, name: str) -> int:
        """How many heads' rows a tensor has in llama.cpp's order; 0 for none."""
        if not self.config.traits.gguf_pairs:
            return 0
        heads = {"q_proj.weight": self.config.num_heads, "k_proj.weight": self.config.num_kv_heads}
        return next((count for end, count in heads.items() if name.endswith(end)), 0)


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    return (
        f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
        if match and match[2] in _LAYER
        else name
    )


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of q or k, [heads * k, in], from llama.cpp's order into Hugging Face's.

    llama.cpp interleaves the two halves of each rotated head: rows 0, k/2, 1, k/2+1, ...
    """
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)
