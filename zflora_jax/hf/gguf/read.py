"""Models from GGUF files: the config, and tensors dequantised or as the file's blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES
from zflora_jax.core.fields import ConfigError, from_dict, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.gguf.file import (
    ATTENTION_FACTOR,
    KEPT,
    ORIGINAL_CONTEXT,
    ROPE_DIVISORS,
    SETTINGS,
    SIZE,
    GGUFFile,
    check_scales,
    from_blocks,
    gguf_table,
    paired,
)
from zflora_jax.hf.gguf.tokenizer import END_IDS, SENTENCEPIECE_IDS, TOKENIZER, gguf_tokenizer
from zflora_jax.hf.keys import (
    Place,
    QuantizedLeaves,
    as_finite,
    check_layer_count,
    check_shapes,
    gather,
    hf_shapes,
    native_blocks,
    whole_groups,
)
from zflora_jax.hf.stock import NO_ROTATION, StockForm, module_of
from zflora_jax.nn.quantize_model import checked_scales
from zflora_jax.ops.quantized import QuantizedArray

log = logging.getLogger(__name__)


def load_gguf(
    path: Path, dtype: str, scan_layers: bool, mesh: Any = None, how: QuantizeConfig | None = None
) -> Model:
    """Loads the model in a GGUF file; arguments, result and errors are those of `load.load_model`.
    The log names tensors that `how` asks to keep but cannot.
    """
    file = GGUFFile(path)
    config = gguf_config(file).replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    table = {name: replace(place, tensor=name) for name, place in gguf_table(config).items()}
    shapes = {name: t.shape for name, t in file.tensors.items() if name != ROPE_DIVISORS}
    check_shapes(hf_shapes(table), shapes, str(path), "its config")
    tensors = _Tensors(file, config)
    leaves = QuantizedLeaves(
        config, how or QuantizeConfig(), tensors.read, tensors.in_file, tensors.blocks
    )
    params = unflatten(gather(table, tensors.read, mesh, leaves))
    if leaves.left:
        log.warning(
            "%s: dequantised to %s, as only blocks of %s are kept: %s",
            *(path, dtype, ", ".join(KEPT).upper(), leaves.left_text),
        )
    return checked_scales(Model(config, params, tokenizer=gguf_tokenizer(file, config)))


def has_blocks(path: Path) -> bool:
    """True if a GGUF file has tensors of a type that can be kept; only headers are read."""
    return any(tensor.type.name.lower() in KEPT for tensor in GGUFFile(path).tensors.values())


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file, read into native layout."""

    file: GGUFFile
    config: LlamaConfig

    def read(self, name: str, place: Place) -> np.ndarray:
        """A dequantised tensor."""
        array = self._native_order(place, self.file.dequantised(self.file.tensors[name]))
        # The scale of wider heads' q is undone before the one cast.
        dtype = np.float32 if self.config.base_head_dim else self.config.execution.dtype
        array = place.to_native(as_finite(array, dtype, name, str(self.file.path)))
        array = self._stock.inverse_heads(module_of(place), array)
        return array.astype(self.config.execution.dtype, copy=False)

    def in_file(self, name: str, place: Place) -> tuple[str, str | None]:
        """The type of a tensor, and the reason not to keep its blocks; see `QuantizedLeaves`."""
        kind = self.file.tensors[name].type.name
        if kind.lower() not in KEPT:
            return kind, ""
        if not whole_groups(place, SIZE):
            return kind, f", whose blocks of {SIZE} go across heads of {self.config.head_dim}"
        if self._stock.rotated(module_of(place)) and not self._stock.scores_in_rope:
            return kind, ", which holds a factor of the widened heads"
        return kind, None

    def blocks(self, name: str, place: Place) -> QuantizedArray:
        """The blocks of a tensor as codes and scales."""
        tensor = self.file.tensors[name]
        found = from_blocks(tensor.data, tensor.type.name.lower())
        check_scales(found, name, str(self.file.path))
        found = native_blocks(jax.tree.map(partial(self._native_order, place), found), place)
        if self._stock.rotated(module_of(place)):
            native = np.argsort(self._stock.head_order)
            found = jax.tree.map(lambda part: part[..., native], found)
        return found

    @property
    def _stock(self) -> StockForm:
        factor = self.file.setting(ATTENTION_FACTOR, 1)
        return StockForm(self.config, 1.0, scores_in_rope=factor != 1)

    def _native_order(self, place: Place, rows: np.ndarray) -> np.ndarray:
        architecture = self.file.get("general.architecture")
        return paired(rows, self.config, architecture, module_of(place), inverse=True)


# --- the config -----------------------------------------------------------------------------------

_FLOATS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}  # where a file does not say


def gguf_config(file: GGUFFile) -> LlamaConfig:
    """Reads the config of a model. ConfigError for a feature without code in the forward pass, or a
    missing metadata key.
    """
    family, architecture = _family(file), file.get("general.architecture")
    _refuse_scaling(file)
    heads, width = file.setting("attention.head_count"), file.setting("embedding_length")
    whole = isinstance(heads, int) and isinstance(width, int) and heads
    silent = _FLOATS | {"num_kv_heads": heads, "head_dim": width // heads if whole else None}
    values = {field: file.setting(key, silent.get(field)) for key, field in SETTINGS.items()}
    for key, field in SETTINGS.items():
        require(
            isinstance(values[field], int | float) and values[field] != 0,
            f"{file.path}: {architecture}.{key}={values[field]!r} is not supported; expected one"
            " number above 0 for all layers.",
        )
    layers, blocks = values["num_layers"], (n.replace("blk", "model.layers") for n in file.tensors)
    check_layer_count(blocks, layers, str(file.path))
    # Stored as float32: 9.99999974e-06 was written as 1e-05.
    values |= {field: float(str(np.float32(values[field]))) for field in _FLOATS}
    rotated = file.setting("rope.dimension_count", values["head_dim"])
    require(
        rotated == values["head_dim"],
        f"{file.path}: rope.dimension_count={rotated} differs from the head size"
        f" {values['head_dim']}; that is not supported.",
    )
    silent_ids = SENTENCEPIECE_IDS if file.get(f"{TOKENIZER}model") == "llama" else {}
    bos, pad, *ends = (
        file.get(TOKENIZER + name, silent_ids.get(name))
        for name in ("bos_token_id", "padding_token_id", *END_IDS)
    )
    embedding = file.tensors.get("token_embd.weight")
    values |= {
        "vocab_size": 0 if embedding is None else embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": bos,
        "eos_token_ids": [token for token in dict.fromkeys(ends) if token is not None],
        "pad_token_id": pad,
        "family": family,
        # Not in the file: llama.cpp assumes no RoPE in every fourth layer.
        "nope_layers": tuple(range(3, layers, 4)) if FAMILIES[family].nope else (),
    }
    return _with_rope(file, from_dict(LlamaConfig, values, str(file.path)))


def _family(file: GGUFFile) -> str:
    """The family of a model. If several share a name in llama.cpp, it is "llama", because a window
    is not in the file; a llama with biases of q, k and v is a Qwen2.
    """
    if (parts := file.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{file.path} is one of the {parts} files of a split model. Join them with llama.cpp's"
            " `llama-gguf-split --merge FIRST_FILE JOINED.gguf` and load the joined file."
        )
    require(
        file.get("general.type") != "adapter",
        f"{file.path} holds an adapter for llama.cpp (--lora), no model. Give the base's file, or"
        " the adapter as a PEFT directory.",
    )
    experts = file.setting("expert_count", 0)
    require(
        not experts, f"{file.path}: expert_count={experts}: mixtures of experts are not supported."
    )
    architecture = file.get("general.architecture")
    known = [name for name, family in FAMILIES.items() if family.gguf == architecture]
    names = ", ".join(map(repr, dict.fromkeys(family.gguf for family in FAMILIES.values())))
    require(
        bool(known), f"{file.path}: architecture {architecture!r} is not supported; only {names}."
    )
    biases = {f"blk.0.attn_{kernel}.bias" for kernel in "qkv"}
    return "qwen2" if architecture == "llama" and biases <= file.tensors.keys() else known[0]


def _refuse_scaling(file: GGUFFile) -> None:
    """Raises ConfigError for a RoPE scaling in llama.cpp's metadata; Llama-3's is a tensor."""
    # llama.cpp's rules: a factor without a type means linear scaling, and 0 and 1 mean none.
    factor = file.setting("rope.scaling.factor", file.setting("rope.scale_linear", 1))
    scaling = file.setting("rope.scaling.type", "none" if factor in (0, 1) else "linear")
    require(
        scaling == "none",
        f"{file.path}: RoPE scaling {scaling!r} (factor {factor}) is not supported; only"
        " Llama-3's.",
    )


def _with_rope(file: GGUFFile, config: LlamaConfig) -> LlamaConfig:
    """`config` with the RoPE settings that give the file's divisors: Llama-3's scaling
    (low_freq_factor 1, high_freq_factor 4, as in all published models), and in files of this
    project partly rotated heads.
    """
    tensor = file.tensors.get(ROPE_DIVISORS)
    divisors = np.ones(1) if tensor is None else file.dequantised(tensor).astype(np.float64)
    rotated = int(np.sum(divisors < NO_ROTATION / 10))
    if 0 < rotated < divisors.size:
        config = config.replace(base_head_dim=2 * rotated)
    plain = StockForm(config, 1.0)
    factor, wider = float(file.setting(ATTENTION_FACTOR, 1)), plain.wider**0.5
    require(
        factor == 1 or abs(factor - wider) < 1e-6,
        f"{file.path}: {ATTENTION_FACTOR}={factor} is not supported; only {wider}, which belongs to"
        f" heads of {config.head_dim} dims of which RoPE rotates {config.base_head_width}.",
    )
    if tensor is None:
        return config
    if divisors.shape == plain.rope_divisors.shape:
        ratio = float(np.round(np.max(divisors / plain.rope_divisors), 3))
        original = file.setting(ORIGINAL_CONTEXT, 8192)
        scaling = RopeScaling(ratio, 1.0, 4.0, original) if ratio > 1 else None
        for found in (config, config.replace(rope_scaling=scaling)):
            if np.allclose(StockForm(found, 1.0).rope_divisors, divisors, rtol=1e-4, atol=0):
                return found
    raise ConfigError(
        f"{file.path}: {ROPE_DIVISORS} is not Llama-3's RoPE scaling (low_freq_factor 1,"
        f" high_freq_factor 4, of 8192 positions or of {ORIGINAL_CONTEXT}); no other is supported."
    )
