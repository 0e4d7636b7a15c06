"""LlamaConfig from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES, require_format
from zflora_jax.core.fields import from_dict, require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.gguf_names import ATTENTION_FACTOR, ROPE_DIVISORS
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.rope import longrope_powers, rotated_dims, with_frequencies

# The token ids that llama.cpp assumes where the file of a sentencepiece vocabulary is silent
# (src/llama-vocab.cpp).
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def gguf_config(file: GGUFFile) -> LlamaConfig:
    """Read the LlamaConfig of a GGUF file.

    Args:
      file: the opened file.

    Raises:
      ConfigError: the forward pass has no code for a feature of the model; it is named.
      CheckpointError: a metadata key is missing, or it or the RoPE divisors cannot be read.
    """
    family = gguf_family(file)

    def of(key: str) -> str:
        return f"{file.get('general.architecture')}.{key}"

    _refuse(file, of)
    shape = file.tensors["token_embd.weight"].shape if "token_embd.weight" in file.tensors else (0,)
    heads, hidden = _need(file, of("attention.head_count")), _need(file, of("embedding_length"))
    require(
        isinstance(heads, int) and heads >= 1,
        f"{file.path}: {of('attention.head_count')}={heads!r} is not supported; expected one number"
        " for all layers.",
    )
    head_dim, layers = (
        file.get(of("attention.key_length"), hidden // heads),
        _need(file, of("block_count")),
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        require(
            file.get(of(key), head_dim) == head_dim,
            f"{file.path}: {of(key)}={file.get(of(key))} differs from the head size {head_dim};"
            " that is not supported.",
        )
    silent = SENTENCEPIECE_IDS if file.get("tokenizer.ggml.model") == "llama" else {}
    eos = [
        file.get(f"tokenizer.ggml.{key}_token_id", silent.get(key)) for key in ("eos", "eot", "eom")
    ]
    values = {
        "vocab_size": shape[0],
        "hidden_size": hidden,
        "intermediate_size": _need(file, of("feed_forward_length")),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": file.get(of("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(file, of("attention.layer_norm_rms_epsilon"), 1e-5),
        "rope_theta": _number(file, of("rope.freq_base"), 10000.0),
        "max_position_embeddings": _need(file, of("context_length")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", silent.get("bos")),
        "eos_token_ids": [token for token in dict.fromkeys(eos) if token is not None],
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "family": family,
        # The file says nothing of them: llama.cpp knows every fourth layer to be without RoPE.
        "nope_layers": tuple(range(3, layers, 4)) if FAMILIES[family].nope else (),
    }
    return _with_scaling(file, from_dict(LlamaConfig, values, str(file.path)))


def gguf_family(file: GGUFFile) -> str:
    """The family of the model in a file. One of several with the same name in llama.cpp is "llama",
    as a window is not in the file; a llama with biases of q, k and v is a Qwen2.

    Raises:
      ConfigError: the forward pass has no code for the architecture, or there is no model.
    """
    require(
        file.get("general.type") != "adapter",
        f"{file.path} holds an adapter for llama.cpp (--lora), no model. Give the base's file, or"
        " the adapter as a PEFT directory.",
    )
    architecture = _need(file, "general.architecture")
    known = [name for name, family in FAMILIES.items() if family.gguf == architecture]
    readable = [family.gguf for family in FAMILIES.values() if family.refused["gguf"] is None]
    names = ", ".join(map(repr, dict.fromkeys(readable)))
    require(
        bool(known),
        f"{file.path}: architecture {architecture!r} is not supported; only {names}.",
    )
    require_format(known[0], "gguf")
    biases = {f"blk.0.attn_{kernel}.bias" for kernel in "qkv"}
    return "qwen2" if architecture == "llama" and biases <= file.tensors.keys() else known[0]


def _refuse(file: GGUFFile, of: Callable[[str], str]) -> None:
    """ConfigError where the forward pass has no code for a feature. of: the name of a key."""
    experts = file.get(of("expert_count"), 0)
    require(
        not experts,
        f"{file.path}: {of('expert_count')}={experts}: mixtures of experts are not supported.",
    )
    # llama.cpp's rules: a factor means linear scaling where no type is named, and none is 0 or 1.
    factor = file.get(of("rope.scaling.factor"), file.get(of("rope.scale_linear"), 1))
    scaling = file.get(of("rope.scaling.type"), "none" if factor in (0, 1) else "linear")
    require(
        scaling == "none",
        f"{file.path}: RoPE scaling {scaling!r} (factor {factor:g}) is not supported; only"
        " Llama-3's.",
    )


def _with_scaling(file: GGUFFile, config: LlamaConfig) -> LlamaConfig:
    """`config` with what the file's divisors of the frequencies stand for: Llama-3's RoPE scaling,
    and in files of this project heads of which RoPE turns a part.
    """
    tensor = file.tensors.get(ROPE_DIVISORS)
    if tensor is None:
        _check_factor(file, config)
        return config
    divisors = file.dequantised(tensor).astype(np.float64)
    dims = rotated_dims(divisors)
    if dims is not None:
        config = config.replace(base_head_dim=dims)
    _check_factor(file, config)
    found = None
    if divisors.shape == (config.head_dim // 2,) and divisors.all():
        wanted = 1 / (divisors * longrope_powers(config))
        found = with_frequencies(config, wanted[: config.rotary_dim // 2], rtol=1e-4)
    require(
        found is not None,
        f"{file.path}: {ROPE_DIVISORS} is not Llama-3's RoPE scaling (low_freq_factor 1,"
        " high_freq_factor 4); no other is supported.",
    )
    return cast(LlamaConfig, found)


def factor_of_scores(file: GGUFFile) -> float:
    """What llama.cpp multiplies both q and k by as it rotates them."""
    return float(file.get(f"{file.get('general.architecture')}.{ATTENTION_FACTOR}", 1.0))


def _check_factor(file: GGUFFile, config: LlamaConfig) -> None:
    """ConfigError for a factor of q and k that is not that of heads which this project widened."""
    factor, wider = factor_of_scores(file), (config.head_dim / config.rotary_dim) ** 0.25
    require(
        factor == 1 or abs(factor - wider) < 1e-6,
        f"{file.path}: {ATTENTION_FACTOR}={factor} is not supported; only {wider}, which is that of"
        f" heads of {config.head_dim} dims of which RoPE turns {config.rotary_dim}.",
    )


def _need(file: GGUFFile, key: str) -> Any:
    if (value := file.get(key)) is None:
        raise CheckpointError(f"{file.path} lacks the metadata key {key}.")
    return value


def _number(file: GGUFFile, key: str, default: float) -> float:
    # Stored as float32: 9.99999974e-06 was written as 1e-05.
    return float(str(np.float32(file.get(key, default))))
