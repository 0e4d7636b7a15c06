"""Families of decoders, as data: what sets each apart from Llama, and how others spell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family. All are decoders with RMSNorm before attention and a gated MLP.

    Attributes:
      architecture: transformers' class, in config.json.
      title: in texts.
      qkv_bias: whether q, k and v have biases.
      qk_norm: whether the heads of q and k go through an RMSNorm each, before RoPE.
      window: whether attention may be limited to a sliding window.
      nope: whether some layers may be without RoPE.
      gguf: llama.cpp's name of the architecture.
      gguf_pairs: whether llama.cpp stores the two halves of rotated heads interleaved.
      defaults: what transformers takes for keys that config.json lacks, where it is not Llama's.
    """

    architecture: str
    title: str
    qkv_bias: bool = False
    qk_norm: bool = False
    window: bool = False
    nope: bool = False
    gguf: str = "llama"
    gguf_pairs: bool = True
    defaults: dict[str, Any] = field(default_factory=dict)


_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,  # where use_sliding_window asks for one
}

# model_type in config.json -> its family. The defaults are those of transformers 5.24.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "Llama"),
    "mistral": Family(
        "MistralForCausalLM",
        "Mistral",
        window=True,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2",
        qkv_bias=True,
        window=True,
        gguf="qwen2",
        gguf_pairs=False,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3",
        qk_norm=True,
        window=True,
        gguf="qwen3",
        gguf_pairs=False,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "SmolLM3",
        nope=True,
        gguf="smollm3",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "tie_word_embeddings": True,
        },
    ),
}
