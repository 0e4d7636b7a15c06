"""Model shapes known by name."""

from __future__ import annotations

from typing import Any

from zflora_jax.core.fields import require_in
from zflora_jax.core.model_config import LlamaConfig, RopeScaling


def _widths(d: int, f: int, layers: int, heads: int, kv_heads: int, k: int) -> dict[str, int]:
    """Residual width, MLP units, layers, query and key heads, head dim."""
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    return dict(zip((*names, "head_dim"), (d, f, layers, heads, kv_heads, k), strict=True))


_LLAMA2 = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_ids": (2,)}
_LLAMA3 = {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128008, 128009),
}
_LLAMA32 = _LLAMA3 | {
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
    "tie_word_embeddings": True,
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
    "pad_token_id": 2,
}
_QWEN25 = {
    "family": "qwen2",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_ids": (151645, 151643),
    "pad_token_id": 151643,
}
_QWEN3 = _QWEN25 | {"family": "qwen3", "max_position_embeddings": 40960}
_MISTRAL = {
    "family": "mistral",
    "vocab_size": 32768,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
}
_ROWS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA32 | _widths(2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": _LLAMA32 | _widths(3072, 8192, 28, 24, 8, 128),
    "llama-3.1-8b": _LLAMA3
    | {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}
    | _widths(4096, 14336, 32, 32, 8, 128),
    "llama-2-7b": _LLAMA2
    | {"max_position_embeddings": 4096}
    | _widths(4096, 11008, 32, 32, 32, 128),
    "tinyllama-1.1b": _LLAMA2 | _widths(2048, 5632, 22, 32, 4, 64),
    "smollm2-135m": _SMOLLM2 | {"rope_theta": 100000.0} | _widths(576, 1536, 30, 9, 3, 64),
    "smollm2-360m": _SMOLLM2 | {"rope_theta": 100000.0} | _widths(960, 2560, 32, 15, 5, 64),
    "smollm2-1.7b": _SMOLLM2 | {"rope_theta": 130000.0} | _widths(2048, 8192, 24, 32, 32, 64),
    "smollm3-3b": {
        "family": "smollm3",
        "vocab_size": 128256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_ids": (128012,),
        "pad_token_id": 128004,
        "nope_layers": tuple(range(3, 36, 4)),
    }
    | _widths(2048, 11008, 36, 16, 4, 128),
    "mistral-7b-v0.1": _MISTRAL
    | {"vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096}
    | _widths(4096, 14336, 32, 32, 8, 128),
    "mistral-7b-v0.3": _MISTRAL | _widths(4096, 14336, 32, 32, 8, 128),
    "qwen2.5-0.5b": _QWEN25 | _widths(896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": _QWEN25 | _widths(1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": _QWEN25 | _widths(2048, 11008, 36, 16, 2, 128),
    "qwen2.5-7b": _QWEN25
    | {"vocab_size": 152064, "tie_word_embeddings": False}
    | _widths(3584, 18944, 28, 28, 4, 128),
    "qwen3-0.6b": _QWEN3 | _widths(1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": _QWEN3 | _widths(2048, 6144, 28, 16, 8, 128),
    "qwen3-4b": _QWEN3 | _widths(2560, 9728, 36, 32, 8, 128),
    "qwen3-8b": _QWEN3 | {"tie_word_embeddings": False} | _widths(4096, 12288, 36, 32, 8, 128),
    "tiny": {
        "vocab_size": 259,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_ids": (257,),
        "pad_token_id": 258,
    }
    | _widths(64, 96, 2, 4, 2, 16),
}
PRESETS: dict[str, LlamaConfig] = {name: LlamaConfig(**row) for name, row in _ROWS.items()}


def preset(name: str) -> LlamaConfig:
    """The LlamaConfig of a named model shape.

    Args:
      name: A key of `PRESETS`, e.g. "llama-3.2-1b"; ConfigError for others.
    """
    require_in(PRESETS, name, f"unknown model preset {name!r}")
    return PRESETS[name]
