"""Reference implementation: small models of transformers, and GGUF files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from support.byte_tokenizer import byte_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 13)).astype(np.int32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
SIZES = {"vocab_size": 259, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
SETTINGS = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def hf_model(seed: int = 0, family: str = "llama", **changes: Any) -> Any:
    """A small model of transformers with random weights, biases and norm gains, large enough that
    attention is far from uniform.
    """
    rope = {"rope_theta": 500.0, **changes.pop("rope", {"rope_type": "default"})}
    settings = SETTINGS | changes | {"rope_parameters": rope, "attn_implementation": "eager"}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(float("norm" in name) + 0.3 * torch.randn_like(parameter))
    return model


def hf_logits(model: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def open_stock(folder: Path) -> Any:
    """The model in a directory, in float32, as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def write_gguf(
    path: Path, model: Any, tokenizer: Any = True, edit: Any = None, **metadata: Any
) -> None:
    """A float32 GGUF of a model of transformers, q and k interleaved where llama.cpp's converter
    does that. tokenizer: whether, or what writes it.
    """
    c = model.config
    writer = gguf.GGUFWriter(str(path), metadata.pop("arch", c.model_type))
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(metadata.pop("blocks", c.num_hidden_layers))
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if callable(tokenizer):
        tokenizer(writer)
    elif tokenizer:
        bpe = byte_tokenizer()
        vocab = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
        writer.add_tokenizer_model(metadata.pop("tokenizer_model", "gpt2"))
        writer.add_tokenizer_pre("default")
        writer.add_token_list(vocab)
        writer.add_token_types([1] * 256 + [3] * 3)
        writer.add_token_merges([])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_pad_token_id(258)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    tensors = {}
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array, (module, _, parameter) = tensor.numpy(), name.rpartition(".")
        block = ""
        if name.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            block = f"blk.{layer}."
        if module in heads and not c.model_type.startswith("qwen"):
            halves = array.reshape(heads[module], 2, -1, array.shape[-1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        tensors[f"{block}{NAMES[module]}.{parameter}"] = array
    if edit:
        edit(tensors)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
