"""Names of tensors and settings in GGUF files, and llama.cpp's order of the rows of q and k."""

from __future__ import annotations

import re

import numpy as np

from zflora_jax.core.families import FAMILIES

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
    """Returns the Hugging Face name of a GGUF tensor; a name that has none stays as it is."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """Returns the GGUF name of a Hugging Face tensor."""
    if name in _TO_GGUF:
        return _TO_GGUF[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    module, parameter = rest.rsplit(".", 1)
    return f"blk.{layer}.{_TO_GGUF[module]}.{parameter}"


def tensor_module(name: str) -> str:
    """Returns the module of a GGUF tensor without its layer: "attn_q", "token_embd", ..."""
    return name.split(".")[-2]


def has_pairs(architecture: str) -> bool:
    """Whether llama.cpp stores the two halves of rotated heads of an architecture interleaved."""
    return any(f.gguf_pairs for f in FAMILIES.values() if f.gguf == architecture)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of q or k from llama.cpp's order into Hugging Face's.

    llama.cpp interleaves the two halves of each rotated head: rows 0, k/2, 1, k/2+1, ...

    Args:
      rows: Kernel [heads * k, in], or bias [heads * k].
      heads: Number of heads.
    """
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `half_split`."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
