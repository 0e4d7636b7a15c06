"""The form of a model in a GGUF file: widths that quantisation divides, llama.cpp's settings.

llama.cpp quantises each row in blocks of 32 weights. So the residual stream, the MLP units and the
dims of widened heads get channels of zeros up to a multiple of 32, beyond those of stock form, and
the function stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.core.families import FAMILIES, require_format
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.gguf.names import (
    ATTENTION_FACTOR,
    ROPE_DIVISORS,
    SETTINGS,
    gguf_name,
    has_pairs,
    interleave,
)
from zflora_jax.hf.gguf.types import SIZE
from zflora_jax.hf.keys import Place, hf_table
from zflora_jax.hf.state_scale import scales_state
from zflora_jax.hf.stock import (
    StockForm,
    module_of,
    native_tensor,
    round_up,
    stock_form,
    widths_report,
)


@dataclass(frozen=True)
class GGUFForm:
    """The form of a model in a GGUF file."""

    model_config: LlamaConfig  # native
    stock: StockForm  # of the model with padded heads and MLP units

    @property
    def config(self) -> LlamaConfig:
        """The config with the widths of the file."""
        return self.stock.config

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture. Its qwen2 has no RoPE divisors, and heads that together are as
        wide as the residual stream; its llama takes biases and is the same otherwise.
        """
        config, native = self.config, self.stock.native
        plain = native.base_head_dim is None and native.rope_scaling is None
        if config.traits.gguf_as_llama and not (
            plain and config.num_heads * config.head_dim == config.hidden_size
        ):
            return "llama"
        return config.traits.gguf

    @property
    def table(self) -> dict[str, Place]:
        """Hugging Face name -> place with the widths of the file, in llama.cpp's usual order."""
        table = hf_table(self.config)
        last = [name for name in table if not name.startswith(("model.layers", "model.embed"))]
        return {name: table[name] for name in (*(n for n in table if n not in last), *last)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF name -> shape of every tensor, in the order of `tensors`."""
        shapes = {gguf_name(name): place.hf_shape for name, place in self.table.items()}
        return shapes | {name: x.shape for name, x in self.rope_divisors.items()}

    def tensors(self, model: Model) -> Iterator[tuple[str, Any]]:
        """Yields GGUF name and float32 tensor. Processes that share the model go through them
        together.
        """
        padded = hf_table(self.stock.native)
        for name, stored in self.table.items():
            yield gguf_name(name), self.tensor(model, name, stored, padded[name].shape)
        yield from self.rope_divisors.items()

    def tensor(self, model: Model, name: str, stored: Place, wanted: tuple[int, ...]) -> Any:
        """Returns one tensor, by its Hugging Face name. stored: Its place with the widths of the
        file. wanted: Its native shape with padded heads and MLP units.
        """
        place, x = native_tensor(model, name)
        if x.shape != wanted:
            x = np.pad(x, [(0, b - a) for a, b in zip(x.shape, wanted, strict=True)])
        module = module_of(place)
        return self.in_order(module, stored.to_hf(self.stock.forward(module, x)))

    def in_order(self, module: str, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of a tensor in llama.cpp's order. module: Its name by `module_of`."""
        if not has_pairs(self.architecture) or module.removesuffix("_bias") not in ("q", "k"):
            return rows
        config = self.config
        return interleave(rows, config.num_heads if module[0] == "q" else config.num_kv_heads)

    @property
    def rope_divisors(self) -> dict[str, np.ndarray]:
        """The tensor by which llama.cpp divides the angles, so that RoPE rotates a part of a head,
        or is scaled as Llama 3 does; none for plain RoPE.
        """
        native = self.stock.native
        if native.base_head_dim is None and native.rope_scaling is None:
            return {}
        return {ROPE_DIVISORS: self.stock.rope_divisors.astype(np.float32)}

    @property
    def context(self) -> int:
        """The context length: llama.cpp applies no sliding window to these architectures, and
        up to its length the function is the same without one.
        """
        config = self.model_config
        return min(config.max_position_embeddings, config.sliding_window or 1 << 62)

    def metadata(self) -> dict[str, Any]:
        """The keys that describe the architecture; int stands for uint32, float for float32."""
        config = self.config.replace(max_position_embeddings=self.context)
        values = {key: getattr(config, field) for key, field in SETTINGS.items()} | {
            "vocab_size": config.vocab_size,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
        }
        if self.stock.scores_in_rope and self.stock.native.base_head_dim is not None:
            values[ATTENTION_FACTOR] = math.sqrt(self.stock.wider)
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def report(self) -> dict[str, Any]:
        """The widths of the file, its padding, and settings that the file cannot express."""
        config, native = self.config, self.model_config
        report: dict[str, Any] = {**widths_report(native, config)}
        if self.architecture != config.traits.gguf:
            report["architecture"] = (
                f"{self.architecture} with biases: llama.cpp's {config.traits.gguf} does not take"
                " these widths"
            )
        if scales_state(native):
            report["eps_z"] = self.stock.eps_z
        if self.context < native.max_position_embeddings:
            report["context"] = (
                f"{self.context} of {native.max_position_embeddings}: the sliding window, which"
                " llama.cpp does not apply"
            )
        return report


def gguf_form(model: Model, dtype: str, eps_z: float | None = None) -> GGUFForm:
    """Returns the form of a model in a GGUF file; dtype and eps_z are those of `stock_form`. Raises
    ConfigError if the model is packed, llama.cpp cannot hold it, or eps_z cannot be used.
    """
    eps_z = stock_form(model, dtype, eps_z).eps_z
    config = model.config
    _require_readable(config)
    native = config.replace(intermediate_size=round_up(config.intermediate_size, SIZE))
    if config.hidden_size % SIZE and config.base_hidden_size is None:
        native = native.replace(base_hidden_size=config.hidden_size)  # which stock form pads
    if config.base_head_dim is not None:
        native = native.replace(head_dim=round_up(config.head_dim, SIZE))
    return GGUFForm(config, StockForm(native, eps_z, SIZE))


def _require_readable(config: LlamaConfig) -> None:
    """Raises ConfigError if llama.cpp has no code for the model."""
    require_format(config.family, "gguf", config.base_head_dim is not None)
    rows = FAMILIES.items()
    takes = [name for name, row in rows if row.gguf == "llama" or row.gguf_as_llama]
    require(
        config.rope_scaling is None or config.family in takes,
        f"Llama-3's RoPE scaling needs RoPE divisors, which llama.cpp reads for"
        f" {', '.join(takes)}, not for {config.family}. Export a Hugging Face directory"
        " (--format hf).",
    )
    layers = config.num_layers
    known = tuple(range(3, layers, 4)) if config.traits.nope else ()
    require(
        config.nope_layers == known,
        f"nope_layers={config.nope_layers}: llama.cpp takes {known} of a {config.family} of"
        f" {layers} layers to be without RoPE, and a file cannot say otherwise. Export a Hugging"
        " Face directory (--format hf).",
    )
