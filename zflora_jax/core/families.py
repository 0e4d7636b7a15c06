"""Model families as data: their differences from Llama, their names elsewhere, their formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family of decoders with RMSNorm before attention and a gated MLP.

    Attributes:
      architecture: Class in transformers, as config.json names it.
      title: Name in texts.
      qkv_bias: Whether q, k and v have biases.
      qk_norm: Whether each head of q and k goes through an RMSNorm before RoPE.
      window: Whether attention may be limited to a sliding window.
      window_switch: Whether config.json switches the window on (use_sliding_window) and lists the
        layers that have it (layer_types); False: only `sliding_window` counts.
      nope: Whether some layers may be without RoPE.
      heads_divide: Whether transformers needs a hidden size that is a multiple of the heads.
      gguf: Architecture in llama.cpp.
      gguf_as_llama: Whether llama.cpp's architecture "llama" can hold the family too.
      gguf_wide_heads: Whether llama.cpp reads the RoPE divisors that widened heads need.
      gguf_pairs: Whether llama.cpp stores the two halves of rotated heads interleaved.
      defaults: Defaults of transformers for config.json that differ from Llama's.
    """

    architecture: str
    title: str
    qkv_bias: bool = False
    qk_norm: bool = False
    window: bool = False
    window_switch: bool = False
    nope: bool = False
    heads_divide: bool = False
    gguf: str = "llama"
    gguf_as_llama: bool = False
    gguf_wide_heads: bool = False
    gguf_pairs: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,  # where use_sliding_window asks for one
}

# model_type in config.json -> its family. The defaults are those of transformers 5.24.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "Llama", heads_divide=True, gguf_wide_heads=True),
    "mistral": Family(
        "MistralForCausalLM",
        "Mistral",
        window=True,
        gguf_wide_heads=True,
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
        window_switch=True,
        gguf="qwen2",
        gguf_as_llama=True,
        gguf_wide_heads=True,
        gguf_pairs=False,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3",
        qk_norm=True,
        window=True,
        window_switch=True,
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
