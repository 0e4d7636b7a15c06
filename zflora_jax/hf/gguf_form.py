"""The form of a model in a GGUF file: widths that quantisation divides, llama.cpp's settings.

Formats of llama.cpp quantise each row in blocks of 32 numbers. So the residual stream, the MLP
units and the dims of widened heads get channels of zeros up to a multiple of 32, beyond those of
stock form, and the function stays the same.
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
from zflora_jax.hf.gguf_names import (
    ATTENTION_FACTOR,
    ROPE_DIVISORS,
    gguf_name,
    has_pairs,
    interleave,
)
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

BLOCK = 32  # numbers of a block; K-quants have super-blocks of 256 and fall back


@dataclass(frozen=True)
class GGUFForm:
    """The form of a model in a GGUF file.

    Attributes:
      model_config: of the model, native.
      stock: the stock form of the model with filled heads and MLP units.
    """

    model_config: LlamaConfig
    stock: StockForm

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
        stock = config.num_heads * config.head_dim == config.hidden_size
        stock = stock and native.base_head_dim is None and native.rope_scaling is None
        return "llama" if config.traits.gguf_as_llama and not stock else config.traits.gguf

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF name -> shape of every tensor but the RoPE divisors, in llama.cpp's usual order."""
        return {gguf_name(name): place.hf_shape for name, place in self.table.items()}

    @property
    def table(self) -> dict[str, Place]:
        """Hugging Face name -> place with the widths of the file, in the order of `shapes`."""
        table = hf_table(self.config)
        last = [name for name in table if not name.startswith(("model.layers", "model.embed"))]
        return {name: table[name] for name in (*(n for n in table if n not in last), *last)}

    def tensors(self, model: Model) -> Iterator[tuple[str, np.ndarray]]:
        """GGUF name and float32 tensor, in the order of `shapes`. Processes that share the model go
        through them together.
        """
        filled = hf_table(self.stock.native)
        for name, stored in self.table.items():
            yield gguf_name(name), self.tensor(model, name, stored, filled[name].shape)

    def tensor(self, model: Model, name: str, stored: Place, wanted: tuple[int, ...]) -> Any:
        """One tensor, see `tensors`.

        Args:
          model: the model.
          name: Hugging Face's name of the tensor.
          stored: its place, with the widths of the file.
          wanted: its native shape with filled heads and MLP units.
        """
        place, x = native_tensor(model, name)
        if x.shape != wanted:
            x = np.pad(x, [(0, b - a) for a, b in zip(x.shape, wanted, strict=True)])
        module = module_of(place)
        return self.in_order(module, stored.to_hf(self.stock.forward(module, x)))

    def in_order(self, module: str, rows: np.ndarray) -> np.ndarray:
        """The rows of a tensor in llama.cpp's order. module: its name by `module_of`."""
        if not has_pairs(self.architecture) or module.removesuffix("_bias") not in ("q", "k"):
            return rows
        return interleave(
            rows, self.config.num_heads if module[0] == "q" else self.config.num_kv_heads
        )

    @property
    def rope_divisors(self) -> dict[str, np.ndarray]:
        """The tensor that makes RoPE turn a part of a head, or scales it as Llama 3 does; none for
        plain RoPE. llama.cpp divides the angles by it.
        """
        native = self.stock.native
        if native.base_head_dim is None and native.rope_scaling is None:
            return {}
        return {ROPE_DIVISORS: self.stock.rope_divisors.astype(np.float32)}

    @property
    def context(self) -> int:
        """The context length: llama.cpp gives these architectures no sliding window, and without
        one the function is the same up to its length.
        """
        config = self.model_config
        return min(config.max_position_embeddings, config.sliding_window or 1 << 62)

    def metadata(self) -> dict[str, Any]:
        """The keys that describe the architecture; int stands for uint32, float for float32."""
        config = self.config
        values = {
            "vocab_size": config.vocab_size,
            "context_length": self.context,
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_heads,
            "attention.head_count_kv": config.num_kv_heads,
            # Without these llama.cpp divides the hidden width by the number of heads.
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope_theta),
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        }
        if self.stock.scores_in_rope and self.stock.native.base_head_dim is not None:
            values[ATTENTION_FACTOR] = math.sqrt(self.stock.wider)
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def report(self) -> dict[str, Any]:
        """The widths of the file, what was filled, and what the file cannot say."""
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
    """The form of a model in a GGUF file.

    Args:
      model: a base or fused model, not packed.
      dtype: whose rounding eps_z may disturb the logits by, as in `stock_form`.
      eps_z: None: chosen from the weights.

    Raises:
      ConfigError: the model is packed, llama.cpp cannot hold it, or eps_z cannot be used.
    """
    eps_z = stock_form(model, dtype, eps_z).eps_z
    config = model.config
    _require_readable(config)
    native = config.replace(intermediate_size=round_up(config.intermediate_size, BLOCK))
    if config.hidden_size % BLOCK and config.base_hidden_size is None:
        native = native.replace(base_hidden_size=config.hidden_size)  # which stock form fills
    if config.base_head_dim is not None:
        native = native.replace(head_dim=round_up(config.head_dim, BLOCK))
    return GGUFForm(config, StockForm(native, eps_z, BLOCK))


def _require_readable(config: LlamaConfig) -> None:
    """ConfigError for what llama.cpp has no code for."""
    require_format(config.family, "gguf", config.base_head_dim is not None)
    layers, row = config.num_layers, FAMILIES
    takes = [name for name in row if row[name].gguf == "llama" or row[name].gguf_as_llama]
    require(
        config.rope_scaling is None or config.family in takes,
        f"Llama-3's RoPE scaling needs RoPE divisors, which llama.cpp reads for"
        f" {', '.join(takes)}, not for {config.family}. Export a Hugging Face directory"
        " (--format hf).",
    )
    known = tuple(range(3, layers, 4)) if config.traits.nope else ()
    require(
        config.nope_layers == known,
        f"nope_layers={config.nope_layers}: llama.cpp takes {known} of a {config.family} of"
        f" {layers} layers to be without RoPE, and a file cannot say otherwise. Export a Hugging"
        " Face directory (--format hf).",
    )
