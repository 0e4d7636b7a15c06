"""Models from GGUF files (llama.cpp), dequantised tensor by tensor. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.model import Model
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.gguf_config import ROPE_DIVISORS, gguf_config
from zflora_jax.hf.gguf_reader import GGUFFile
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


def load_gguf(path: Path, dtype: str, scan_layers: bool, sharding: Any = None) -> Model:
    """Load the model in a GGUF file.

    Args:
      path: the file.
      dtype: "float32" or "bfloat16", of the parameters; each tensor is dequantised in float32 and
        cast on its own.
      scan_layers: whether the layers are stacked on a leading axis.
      sharding: (leaf name, shape) -> where `gather` puts a leaf; None: whole, on the first device.

    Returns:
      The model, with the tokenizer that the metadata describe (None with a warning if it is of an
      unknown kind).

    Raises:
      ConfigError: the forward pass has no code for the model.
      CheckpointError: the file is damaged, or its tensors are missing, unexpected, misshapen or not
        finite.
    """
    file, what = GGUFFile(path), str(path)
    tensors = {_hf_name(name): t for name, t in file.tensors.items() if name != ROPE_DIVISORS}
    config = gguf_config(file).replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    check_layer_count(tensors, config.num_layers, what)
    table = hf_table(config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(table, shapes, what, config.num_layers)

    def read(name: str, place: Place, slices: Slices) -> np.ndarray:
        # A block of quantised numbers cannot be cut, so the tensor is read whole.
        tensor = tensors[name]
        array = file.dequantised(tensor)
        if config.traits.gguf_pairs and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            array = _half_split(array, heads)
        return place.to_native(as_finite(array, config.execution.dtype, tensor.name, what))[slices]

    params = unflatten(gather(table, read, config.execution.dtype, sharding))
    return Model(config, params, tokenizer=gguf_tokenizer(file, config))


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
