"""Model families as data: their differences from Llama, their names elsewhere, their formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zflora_jax.core.fields import require

# Hugging Face directories, those with compressed-tensors kernels, llama.cpp files, LoRA directories
FORMATS = ("hf", "compressed", "gguf", "peft")
Refusals = Mapping[str, str]  # a format -> why it cannot hold a model


@dataclass(frozen=True)
class Family:
    """A family of decoders with RMSNorm before attention and a gated MLP.

    Attributes:
      architecture: Class in transformers, as config.json names it.
      title: Name in texts.
      refused: Formats that cannot hold the family.
      refused_heads: Formats that cannot hold it with heads wider than its base's.
      qkv_bias: Whether q, k and v have biases.
      qk_norm: Whether each head of q and k goes through an RMSNorm before RoPE.
      window: Whether attention may be limited to a sliding window.
      window_switch: Whether config.json switches the window on (use_sliding_window) and lists the
        layers that have it (layer_types); False: `sliding_window` says it all.
      nope: Whether some layers may be without RoPE.
      joined: Module in transformers -> the kernels whose rows its tensor holds, in their order.
      heads_divide: Whether transformers refuses a hidden size that the heads do not divide.
      gguf: Architecture in llama.cpp.
      gguf_as_llama: Whether llama.cpp's architecture "llama" can hold the family too.
      gguf_pairs: Whether llama.cpp stores the two halves of rotated heads interleaved.
      defaults: Values that transformers takes for keys missing in config.json, unless Llama's.
    """

    architecture: str
    title: str
    refused: Refusals = field(default_factory=dict)
    refused_heads: Refusals = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    window: bool = False
    window_switch: bool = False
    nope: bool = False
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    heads_divide: bool = False
    gguf: str = "llama"
    gguf_as_llama: bool = False
    gguf_pairs: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FUSE = "Fuse a method that leaves the heads alone (zflora-minimal, lora, ffa, full)"
_GGUF_HEADS = {
    "gguf": "heads wider than the base's need RoPE divisors, which llama.cpp reads for llama,"
    f" mistral and qwen2 alone. {_FUSE}, or export a Hugging Face directory (--format hf)."
}
_PHI3_HEADS = (
    "transformers' Phi3Config takes RoPE factors only for heads of hidden_size /"
    f" num_attention_heads dims, not for heads wider than the base's. {_FUSE}."
)
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,  # where use_sliding_window asks for one
}

# model_type in config.json -> its family. The defaults are those of transformers 5.24.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "Llama", heads_divide=True),
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
        window_switch=True,
        gguf="qwen2",
        gguf_as_llama=True,
        gguf_pairs=False,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3",
        refused_heads=_GGUF_HEADS,
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
        refused_heads=_GGUF_HEADS,
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
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi-3",
        refused={
            "gguf": "GGUF files of phi3, with its joined kernels, are neither read nor written."
            " Export a Hugging Face directory (--format hf) and convert it with llama.cpp's"
            " convert_hf_to_gguf.py.",
            "peft": "PEFT adapts phi3's joined qkv_proj and gate_up_proj, while native LoRA adapts"
            " q, k, v, gate and up separately. Merge the adapter into its base (fuse, or peft's"
            " merge_and_unload) and use the model.",
        },
        refused_heads={"hf": _PHI3_HEADS, "compressed": _PHI3_HEADS},
        window=True,
        joined={"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")},
        gguf="phi3",
        gguf_pairs=False,
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
    ),
}


def refusal(family: str, name: str, wide_heads: bool = False) -> str | None:
    """Why a format cannot hold a model, None where it can.

    Args:
      family: Key of `FAMILIES`.
      name: Name of the format, one of `FORMATS`.
      wide_heads: Whether the model's heads are wider than its base's.
    """
    row = FAMILIES[family]
    return row.refused.get(name) or (row.refused_heads.get(name) if wide_heads else None)


def require_format(family: str, name: str, wide_heads: bool = False) -> None:
    """ConfigError with the text of `refusal` where there is one; the same arguments."""
    text = refusal(family, name, wide_heads)
    require(text is None, f"family {family!r} in format {name!r}: {text}")
