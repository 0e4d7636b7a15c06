"""config.json: every spelling of transformers is read alike, unsupported settings are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from support.huggingface import LLAMA3

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.hf.config import from_hf_config, to_hf_config

OLD_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "rope_type"} | {"type": "llama3"}
PLAIN = {"rope_type": "default", "rope_theta": 7.0}


def hf_config(**changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "llama", **sizes, **layers, **changes}


@pytest.mark.parametrize(
    ("changes", "theta", "scaled"),
    [
        ({}, 10000.0, False),
        ({"rope_theta": 5.0, "rope_scaling": None}, 5.0, False),
        ({"rope_theta": 5.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}, 5.0, True),
        ({"rope_theta": 5, "rope_scaling": OLD_LLAMA3}, 5.0, True),
        ({"rope_parameters": {"rope_theta": 7.0, **LLAMA3}}, 7.0, True),
        ({"rope_theta": 5.0, "rope_scaling": {}, "rope_parameters": PLAIN}, 7.0, False),
        ({"rope_theta": 5.0, "rope_scaling": LLAMA3, "rope_parameters": PLAIN}, 5.0, True),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}}, 5.0, False),
    ],
)
def test_rope_spellings(changes: dict[str, Any], theta: float, scaled: bool) -> None:
    ours = from_hf_config(hf_config(**changes))
    assert (ours.rope_theta, ours.rope_scaling is not None) == (theta, scaled)
    theirs = transformers.LlamaConfig(**hf_config(**changes)).rope_parameters
    assert theirs["rope_theta"] == theta and (theirs["rope_type"] == "llama3") == scaled


def test_config_round_trip_and_both_spellings() -> None:
    config = LlamaConfig(
        **{"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "head_dim": 32},
        **{"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "max_position_embeddings": 777},
        **{"rms_norm_eps": 3e-6, "rope_theta": 1234.5, "tie_word_embeddings": True},
        **{"bos_token_id": 3, "eos_token_ids": (4, 5), "pad_token_id": 6},
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    )
    written = json.loads(json.dumps(to_hf_config(config, "bfloat16")))
    assert from_hf_config(written) == config
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    rope = {"rope_theta": written["rope_theta"], **written["rope_scaling"]}
    assert written["rope_parameters"] == rope
    version4 = {k: v for k, v in written.items() if k != "rope_parameters"}
    version5 = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf_config(version4) == from_hf_config(version5) == config
    assert transformers.LlamaConfig(**written).rope_parameters["factor"] == 8.0
    with pytest.raises(ConfigError, match="base_hidden_size"):
        to_hf_config(config.replace(base_hidden_size=40), "float32")


def test_stop_tokens_come_from_generation_config() -> None:
    config = hf_config(eos_token_id=7, bos_token_id=None)
    assert from_hf_config(config).eos_token_ids == (7,)
    assert from_hf_config(config, {"eos_token_id": [8, 9]}).eos_token_ids == (8, 9)
    assert from_hf_config(config, {"do_sample": True}).eos_token_ids == (7,)
    for none in (None, -1):  # -1 in older files
        assert from_hf_config(hf_config(eos_token_id=none)).eos_token_ids == ()
        assert from_hf_config(hf_config(pad_token_id=none)).pad_token_id is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model_type", "gemma"), ("attention_bias", True), ("mlp_bias", True)],
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("partial_rotary_factor", 0.5),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("rope_type", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_type", {"type": "linear", "factor": 2.0}),
        ("rope_type", {"rope_type": "llama3"}),
        ("rope_type", {"rope_type": "longrope"}),
        ("auto_map", {"AutoModelForCausalLM": "x.Y"}),
        ("num_hidden_layers", "two"),
        ("num_kv_heads", 3),
        ("rms_norm_eps", "x"),
        ("hidden_size", 15),
    ],
)
def test_unsupported_settings_are_refused_by_name(key: str, value: Any) -> None:
    keys = {"rope_type": "rope_scaling", "num_kv_heads": "num_key_value_heads"}
    with pytest.raises(ConfigError, match=key):
        from_hf_config(hf_config(**{keys.get(key, key): value}))


def test_harmless_keys_are_ignored() -> None:
    extra = {"use_cache": False, "attention_dropout": 0.1, "_name_or_path": "x"}
    # SmolLM3's pretraining was split in two; Phi-3 names a copy of the stock class
    extra |= {"transformers_version": "4.1", "is_llama_config": True, "pretraining_tp": 2}
    extra |= {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}
    assert from_hf_config(hf_config(**extra)) == from_hf_config(hf_config())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_used_window_without_length_is_that_of_transformers(family: str) -> None:
    given = {"use_sliding_window": True, "max_window_layers": 0}
    stock = transformers.AutoConfig.for_model(family, **given)
    config = stock.to_dict()
    del config["sliding_window"], config["layer_types"]
    assert from_hf_config(config).sliding_window == stock.sliding_window == 4096
    assert from_hf_config(config | {"use_sliding_window": False}).sliding_window is None
