"""config.json <-> LlamaConfig, in the spellings of transformers 4 (rope_theta, rope_scaling,
torch_dtype) and 5 (rope_parameters, dtype).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zflora_jax.core.families import FAMILIES
from zflora_jax.core.fields import ConfigError, from_dict, require, to_dict
from zflora_jax.core.model_config import LlamaConfig, RopeScaling

# Features without code in the forward pass: key -> values that switch them off. Other keys of a
# config.json do not change the forward pass.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "is_encoder_decoder": (False, None),
}
# Keys that may be left out -> the type of their value.
_TYPES = {
    **{"architectures": list, "layer_types": list, "no_rope_layers": list},
    **{"max_window_layers": int, "no_rope_layer_interval": int, "sliding_window": int},
    **{"use_sliding_window": bool, "tie_word_embeddings": bool},
}
_MOST_LAYERS = 10_000  # before a list of so many is made
# LlamaConfig's field -> key of config.json: whole numbers that it must have, and others with the
# default of transformers.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_OTHERS: dict[str, tuple[str, Any]] = {
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}


def from_hf_config(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, rope: bool = True
) -> LlamaConfig:
    """Reads a config.json. Keys that do not change the forward pass are ignored.

    Args:
      hf: Object in config.json.
      generation: Object in generation_config.json; its stop tokens win, as in transformers.
      rope: Whether to read the RoPE settings, which this project's exports keep in zflora.json.

    Returns:
      The config; for missing keys, the default of the family's config in transformers.

    Raises:
      ConfigError: Names a feature without code in the forward pass.
    """
    _refuse(hf)
    hf = {**FAMILIES[hf["model_type"]].defaults, **hf}
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    values = {field: hf[key] for field, key in _SIZES.items()}
    values |= {field: hf.get(key, default) for field, (key, default) in _OTHERS.items()}
    values["tie_word_embeddings"] = bool(values["tie_word_embeddings"])  # null, too
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = heads
    if values["head_dim"] is None:
        require(
            heads >= 1 and hidden % heads == 0,
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}"
            " and there is no head_dim.",
        )
        values["head_dim"] = hidden // heads
    theta, scaling = _rope(hf) if rope else (10000.0, None)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    bos, eos, pad = (_tokens(hf, generation, key, default) for key, default in tokens.items())
    values |= {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": eos,
        "pad_token_id": pad[0] if pad else None,
        "family": hf["model_type"],
        "sliding_window": _window(hf),
        "nope_layers": _nope_layers(hf),
    }
    return from_dict(LlamaConfig, values, "config.json")


def _refuse(hf: Mapping[str, Any]) -> None:
    """Raises ConfigError that names a feature without code in the forward pass."""
    require(
        not {"adapter", "train"} <= hf.keys(),
        "config.json holds the settings of a training run, not a model: give its directory with"
        " --workdir (zf.load_run).",
    )
    require("model_type" in hf, f"config.json has no model_type; expected {' or '.join(FAMILIES)}.")
    require(
        not hf.get("quantization_config"),
        f"config.json: quantization_config={str(hf.get('quantization_config'))[:60]}...:"
        " packed weights are for vLLM and transformers. Load their source: a float export (without"
        " --quant), the run, or the float checkpoint on the hub.",
    )
    for key, allowed in _ONLY.items():
        require(
            hf.get(key, allowed[-1]) in allowed,
            f"config.json: {key}={hf.get(key)!r} is not supported; only"
            f" {' or '.join(map(repr, allowed))}.",
        )
    for key, kind in _TYPES.items():
        value = hf.get(key)
        require(
            value is None or isinstance(value, kind),
            f"config.json: {key}={value!r:.60}: expected {kind.__name__}, or null.",
        )
    stock = FAMILIES[hf["model_type"]].architecture
    architectures = hf.get("architectures") or [stock]
    require(
        stock in architectures,
        f"config.json: architectures={architectures!r} is not supported; only {[stock]}.",
    )
    code = hf.get("auto_map")
    code = code.get("AutoModelForCausalLM", stock) if isinstance(code, Mapping) else code or stock
    require(  # some files name a copy of the stock class
        str(code).rpartition(".")[2] == stock,
        f"config.json: auto_map names modelling code, {code}; only the stock {stock} is supported.",
    )
    for key in _SIZES.values():
        value = hf.get(key)
        require(isinstance(value, int), f"config.json: {key}={value!r}: expected a whole number.")
    layers = hf["num_hidden_layers"]
    require(layers <= _MOST_LAYERS, f"config.json: num_hidden_layers={layers} is too large.")


def _window(hf: Mapping[str, Any]) -> int | None:
    """The sliding window of all layers, None without one."""
    window, layers, kinds = hf.get("sliding_window"), hf["num_hidden_layers"], hf.get("layer_types")
    family = FAMILIES[hf["model_type"]]
    switched = family.window_switch or not family.window  # Mistral's code does not read the switch
    if switched and not hf.get("use_sliding_window", not family.window_switch):
        window = None
    if family.window_switch and kinds is None:
        first = hf.get("max_window_layers")
        first = 28 if first is None else first
        kinds = ["sliding_attention"] * (first < layers) + ["full_attention"] * (first > 0)
    if family.window_switch and "sliding_attention" not in (kinds or ()):
        window = None
    require(
        not window or family.window,
        f"config.json: sliding_window={window!r} is not supported for {hf['model_type']}; only"
        " None.",
    )
    require(
        window is None or all(kind == "sliding_attention" for kind in kinds or ()),
        f"config.json: a sliding window of {window} in some layers only is not supported; it must"
        " be in all of them or in none (layer_types, max_window_layers).",
    )
    require(
        window is None or window >= 1,
        f"config.json: sliding_window={window!r}: must be at least 1, or null.",
    )
    return window


def _nope_layers(hf: Mapping[str, Any]) -> list[int]:
    """The layers without RoPE."""
    if not FAMILIES[hf["model_type"]].nope:
        return []
    given, layers = hf.get("no_rope_layers"), range(hf["num_hidden_layers"])
    if given is None and (every := hf.get("no_rope_layer_interval", 4)):
        given = [int((i + 1) % every != 0) for i in layers]
    require(
        isinstance(given, list) and len(given) >= len(layers),
        f"config.json: no_rope_layers={given!r}: expected 1 (with RoPE) or 0 for each of the"
        f" {len(layers)} layers.",
    )
    return [i for i, rotated in zip(layers, given or (), strict=False) if not rotated]


def _tokens(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None, key: str, default: int | None
) -> list[Any]:
    """The token ids of a key; those of generation_config.json win."""
    value = (generation or {}).get(key)
    value = hf.get(key, default) if value is None else value
    found = value if isinstance(value, list) else [value]
    return [token for token in found if token not in (None, -1)]  # -1: "none" in older files


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). A rope_scaling wins over rope_parameters; theta may be at the top level."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    require(isinstance(rope, Mapping), f"config.json: rope_scaling={rope!r}: expected a table.")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        rope.get("partial_rotary_factor", 1) == 1,
        f"config.json: partial_rotary_factor={rope.get('partial_rotary_factor')!r} is not"
        " supported; only 1.",
    )
    if kind == "default":
        return theta, None
    require(
        kind == "llama3",
        f"config.json: rope_type {kind!r} is not supported; only 'default' and 'llama3'."
        + " (If other software saved an export of this project again: copy zflora.json and the"
        " folder zflora/ of the export into the directory.)" * (kind == "longrope"),
    )
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in fields if name not in rope]
    require(not missing, f"config.json: rope_type 'llama3' needs {', '.join(missing)}.")
    return theta, from_dict(RopeScaling, {name: rope[name] for name in fields}, "rope_scaling")


def to_hf_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of the family's stock class, for transformers 4 and 5.

    Args:
      config: Config of a model in stock form; ConfigError if it is widened.
      dtype: Data type of the stored tensors.
    """
    if config.widened:
        raise ConfigError(
            "config.json cannot express base_hidden_size and base_head_dim; export with save_hf,"
            " which puts a fused model into stock form."
        )
    scaling, rope = config.rope_scaling, {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": "llama3", **to_dict(scaling)}
    eos = config.eos_token_ids
    return {
        **{key: getattr(config, field) for field, key in _SIZES.items()},
        **{key: getattr(config, field) for field, (key, _) in _OTHERS.items()},
        **_family_keys(config),
        "architectures": [config.traits.architecture],
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "dtype": dtype,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": config.family,
        "pad_token_id": config.pad_token_id,
        # Both spellings: without its spelling, transformers 4 reads theta 10000, unscaled.
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_scaling": rope if scaling is not None else None,
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
    }


def _family_keys(config: LlamaConfig) -> dict[str, Any]:
    """The keys that only some families have."""
    window, layers, traits = config.sliding_window, config.num_layers, config.traits
    found: dict[str, Any] = {"sliding_window": window} if traits.window else {}
    if traits.window_switch:
        kind = "full_attention" if window is None else "sliding_attention"
        found["use_sliding_window"] = window is not None
        found["max_window_layers"] = layers if window is None else 0
        found["layer_types"] = [kind] * layers
    if traits.nope:
        found["no_rope_layers"] = [int(i not in config.nope_layers) for i in range(layers)]
        found["no_rope_layer_interval"] = 4
        found["layer_types"] = ["full_attention"] * layers
        found["use_sliding_window"] = False
    return found
