"""Models from GGUF files: the config, and tensors dequantised or as the file's own blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES, require_format
from zflora_jax.core.fields import ConfigError, from_dict, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.gguf.file import (
    ATTENTION_FACTOR,
    KEPT,
    ROPE_DIVISORS,
    SETTINGS,
    SIZE,
    GGUFFile,
    Tensor,
    from_blocks,
    half_split,
    has_pairs,
    hf_name,
)
from zflora_jax.hf.gguf.tokenizer import SENTENCEPIECE_IDS, gguf_tokenizer
from zflora_jax.hf.keys import (
    Place,
    QuantizedLeaves,
    Slices,
    as_finite,
    check_layer_count,
    check_tensors,
    gather,
    hf_table,
    native_blocks,
    whole_groups,
)
from zflora_jax.hf.stock import NO_ROTATION, StockForm, longrope_powers, module_of
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.ops.rope import rope_frequencies
from zflora_jax.parallel.sharding import placement

log = logging.getLogger(__name__)


def load_gguf(
    path: Path, dtype: str, scan_layers: bool, mesh: Any = None, how: QuantizeConfig | None = None
) -> Model:
    """Loads the model in a GGUF file; arguments, result and errors are those of `load.load_model`.
    Each tensor is dequantised in float32 and cast; the log names tensors that `how` asks to keep
    but cannot.
    """
    file = GGUFFile(path)
    if (parts := file.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path} is one of the {parts} files of a split model. Join them with llama.cpp's"
            " `llama-gguf-split --merge FIRST_FILE JOINED.gguf` and load the joined file."
        )
    named = {hf_name(name): t for name, t in file.tensors.items() if name != ROPE_DIVISORS}
    config = gguf_config(file).replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    check_layer_count(named, config.num_layers, str(path))
    table = hf_table(config)
    shapes = {name: tensor.shape for name, tensor in named.items()}
    check_tensors(table, shapes, str(path), config.num_layers)
    tensors = _Tensors(file, named, config)
    leaves = QuantizedLeaves(
        config, how or QuantizeConfig(), mesh, tensors.read, tensors.in_file, tensors.blocks
    )
    sharding = None if mesh is None else partial(placement, mesh)
    params = unflatten(gather(table, tensors.read, dtype, sharding, leaves))
    if leaves.left:
        log.warning(
            "%s: dequantised to %s, as only blocks of %s are kept: %s",
            *(path, dtype, ", ".join(KEPT).upper(), leaves.left_text),
        )
    return Model(config, params, tokenizer=gguf_tokenizer(file, config))


def has_blocks(path: Path) -> bool:
    """Whether a GGUF file has tensors of a type that can be kept; only headers are read."""
    return any(tensor.type.name.lower() in KEPT for tensor in GGUFFile(path).tensors.values())


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file by their Hugging Face names, read into native layout."""

    file: GGUFFile
    named: dict[str, Tensor]
    config: LlamaConfig

    def read(self, name: str, place: Place, slices: Slices) -> np.ndarray:
        """A block of a dequantised tensor, which is read whole."""
        tensor = self.named[name]
        array = self.file.dequantised(tensor)
        if heads := self._heads(name):
            array = half_split(array, heads)
        # The q of wider heads is scaled, which is undone before the one cast.
        dtype = np.float32 if self.config.base_head_dim else self.config.execution.dtype
        array = place.to_native(as_finite(array, dtype, tensor.name, str(self.file.path)))
        return self._stock.inverse_heads(module_of(place), array)[slices]

    def in_file(self, name: str, place: Place) -> tuple[str, str | None]:
        """The type of a tensor, and why its blocks cannot be kept; see `QuantizedLeaves`."""
        kind = self.named[name].type.name
        if kind.lower() not in KEPT:
            return kind, ""
        if not whole_groups(place, SIZE):
            return kind, f", whose blocks of {SIZE} go across heads of {self.config.head_dim}"
        if self._reordered(place) and not self._stock.scores_in_rope:
            return kind, ", which holds a factor of the widened heads"
        return kind, None

    def blocks(self, name: str, place: Place) -> QuantizedArray:
        """The blocks of a tensor as codes and scales."""
        tensor = self.named[name]
        found = from_blocks(tensor.data, tensor.type.name.lower())
        for scales in (found.scales, found.mins):
            if scales is not None:
                as_finite(scales, np.float16, f"a scale of {tensor.name}", str(self.file.path))
        if heads := self._heads(name):
            found = jax.tree.map(lambda part: half_split(part, heads), found)
        if self._reordered(place):
            native, dims = np.argsort(self._stock.head_order), self.config.head_dim
            found = jax.tree.map(
                lambda part: part.reshape(heads, dims, -1)[:, native].reshape(part.shape), found
            )
        return native_blocks(found, place)

    @property
    def _stock(self) -> StockForm:
        return StockForm(self.config, 1.0, scores_in_rope=_factor_of_scores(self.file) != 1)

    def _reordered(self, place: Place) -> bool:
        """Whether a tensor has the dims of wider heads in the order of stock form."""
        return self.config.base_head_dim is not None and module_of(place) in ("q", "k")

    def _heads(self, name: str) -> int:
        """Number of heads whose rows a tensor has in llama.cpp's order; 0 for none."""
        if not has_pairs(self.file.get("general.architecture")):
            return 0
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        return next((count for module, count in heads.items() if f".{module}." in name), 0)


# --- the config -----------------------------------------------------------------------------------


_FLOATS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}  # where a file does not say


def gguf_config(file: GGUFFile) -> LlamaConfig:
    """Reads the config of a model. ConfigError for a feature without code in the forward pass,
    CheckpointError for a missing metadata key.
    """
    family = _family(file)
    _refuse(file)
    found = {field: file.get(_key(file, key)) for key, field in SETTINGS.items()}
    for key, field in SETTINGS.items():
        if found[field] is None and field not in ("num_kv_heads", "head_dim", *_FLOATS):
            raise CheckpointError(f"{file.path} lacks the metadata key {_key(file, key)}.")
        require(
            isinstance(found[field], int | float | None) and found[field] != 0,
            f"{file.path}: {_key(file, key)}={found[field]!r} is not supported; expected one number"
            " above 0 for all layers.",
        )
    heads = found["num_heads"]
    silent = {"num_kv_heads": heads, "head_dim": found["hidden_size"] // heads} | _FLOATS
    values = {field: silent[field] if x is None else x for field, x in found.items()}
    # Stored as float32: 9.99999974e-06 was written as 1e-05.
    values |= {field: float(str(np.float32(values[field]))) for field in _FLOATS}
    for name in ("attention.value_length", "rope.dimension_count"):
        size = file.get(_key(file, name), values["head_dim"])
        require(
            size == values["head_dim"],
            f"{file.path}: {_key(file, name)}={size} differs from the head size"
            f" {values['head_dim']}; that is not supported.",
        )
    ids = SENTENCEPIECE_IDS if file.get("tokenizer.ggml.model") == "llama" else {}
    end_keys = [f"{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = [file.get(f"tokenizer.ggml.{key}", ids.get(key)) for key in end_keys]
    embedding, layers = file.tensors.get("token_embd.weight"), values["num_layers"]
    values |= {
        "vocab_size": 0 if embedding is None else embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", ids.get("bos_token_id")),
        "eos_token_ids": [token for token in dict.fromkeys(ends) if token is not None],
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "family": family,
        # Not in the file: llama.cpp takes every fourth layer to be without RoPE.
        "nope_layers": tuple(range(3, layers, 4)) if FAMILIES[family].nope else (),
    }
    return _with_scaling(file, from_dict(LlamaConfig, values, str(file.path)))


def _factor_of_scores(file: GGUFFile) -> float:
    """The factor by which llama.cpp multiplies both q and k when it rotates them."""
    return float(file.get(_key(file, ATTENTION_FACTOR), 1.0))


def _family(file: GGUFFile) -> str:
    """The family of a model. Of several with one name in llama.cpp it is "llama", as a window is
    not in the file; a llama with biases of q, k and v is a Qwen2.
    """
    require(
        file.get("general.type") != "adapter",
        f"{file.path} holds an adapter for llama.cpp (--lora), no model. Give the base's file, or"
        " the adapter as a PEFT directory.",
    )
    architecture = file.get("general.architecture")
    if architecture is None:
        raise CheckpointError(f"{file.path} lacks the metadata key general.architecture.")
    known = [name for name, family in FAMILIES.items() if family.gguf == architecture]
    readable = [family.gguf for family in FAMILIES.values() if family.refused["gguf"] is None]
    names = ", ".join(map(repr, dict.fromkeys(readable)))
    require(
        bool(known), f"{file.path}: architecture {architecture!r} is not supported; only {names}."
    )
    require_format(known[0], "gguf")
    biases = {f"blk.0.attn_{kernel}.bias" for kernel in "qkv"}
    return "qwen2" if architecture == "llama" and biases <= file.tensors.keys() else known[0]


def _refuse(file: GGUFFile) -> None:
    """ConfigError if the forward pass has no code for a feature."""
    key = _key(file, "expert_count")
    experts = file.get(key, 0)
    require(not experts, f"{file.path}: {key}={experts}: mixtures of experts are not supported.")
    # llama.cpp's rules: a factor without a type means linear scaling, and 0 and 1 mean none.
    factor = file.get(
        _key(file, "rope.scaling.factor"), file.get(_key(file, "rope.scale_linear"), 1)
    )
    silent = "none" if factor in (0, 1) else "linear"
    scaling = file.get(_key(file, "rope.scaling.type"), silent)
    require(
        scaling == "none",
        f"{file.path}: RoPE scaling {scaling!r} (factor {factor:g}) is not supported; only"
        " Llama-3's.",
    )


def _with_scaling(file: GGUFFile, config: LlamaConfig) -> LlamaConfig:
    """`config` with the RoPE settings that the file's divisors stand for: Llama-3's scaling, and in
    files of this project heads of which RoPE rotates a part.
    """
    tensor = file.tensors.get(ROPE_DIVISORS)
    divisors = None if tensor is None else file.dequantised(tensor).astype(np.float64)
    dims = None if divisors is None else _rotated_dims(divisors)
    if dims is not None:
        config = config.replace(base_head_dim=dims)
    factor, wider = _factor_of_scores(file), (config.head_dim / config.rotary_dim) ** 0.25
    require(
        factor == 1 or abs(factor - wider) < 1e-6,
        f"{file.path}: {ATTENTION_FACTOR}={factor} is not supported; only {wider}, which belongs to"
        f" heads of {config.head_dim} dims of which RoPE rotates {config.rotary_dim}.",
    )
    if divisors is None:
        return config
    if divisors.shape == (config.head_dim // 2,) and divisors.all():
        wanted = 1 / (divisors * longrope_powers(config))
        found = _with_frequencies(config, wanted[: config.rotary_dim // 2], rtol=1e-4)
        if found is not None:
            return found
    raise ConfigError(
        f"{file.path}: {ROPE_DIVISORS} is not Llama-3's RoPE scaling (low_freq_factor 1,"
        " high_freq_factor 4); no other is supported."
    )


def _key(file: GGUFFile, name: str) -> str:
    """The metadata key of a setting of the file's architecture."""
    return f"{file.get('general.architecture')}.{name}"


def _rotated_dims(divisors: np.ndarray) -> int | None:
    """The number of head dims that RoPE rotates by `divisors`, one for each pair of dims; None
    unless the last pairs, and only they, are switched off.
    """
    off = divisors >= NO_ROTATION / 10
    ours = divisors.ndim == 1 and off.any() and not off.all() and np.all(off[:-1] <= off[1:])
    return 2 * int((~off).sum()) if ours else None


def _with_frequencies(config: LlamaConfig, wanted: np.ndarray, rtol: float) -> LlamaConfig | None:
    """The config without RoPE scaling, or with Llama-3's (low_freq_factor 1, high_freq_factor 4, as
    in all published models), whose inverse frequencies are `wanted` [k/2] within a relative
    tolerance; None where neither's are.
    """
    plain = rope_frequencies(config.replace(rope_scaling=None)).astype(np.float64)
    if plain.shape != wanted.shape or not np.isfinite(wanted).all() or not (wanted > 0).all():
        return None
    for scaling in (None, _llama3(plain, wanted)):
        found = config.replace(rope_scaling=scaling)
        if np.allclose(rope_frequencies(found), wanted, rtol=rtol, atol=0):
            return found
    return None


def _llama3(plain: np.ndarray, wanted: np.ndarray) -> RopeScaling | None:
    """The Llama-3 scaling that brings the frequencies `plain` closest to `wanted`."""
    factor = float(np.round(np.max(plain / wanted), 3))
    if factor <= 1:
        return None
    smooth = (wanted / plain - 1 / factor) / (1 - 1 / factor)
    band = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original = np.median((3 * smooth + 1)[band] * 2 * np.pi / plain[band]) if band.any() else 8192
    return RopeScaling(factor, 1.0, 4.0, max(1, round(float(original))))
