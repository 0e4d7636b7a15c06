"""The form of a model in a compressed-tensors directory: widths that groups divide, and the powers
of two that let an adapter's rows share the base's scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zflora_jax.adapters.methods import base_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import KERNELS, kernel_shapes
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.hf.compressed_types import Quant, check_quant
from zflora_jax.hf.state_scale import scales_state
from zflora_jax.hf.stock import StockForm, round_up, stock_form, widths_report
from zflora_jax.nn.quantize_model import group_of
from zflora_jax.ops.quantized import QuantizedArray

_WORD = 4  # codes of 8 bits in a word, which rows fill
# Whose class in transformers refuses a hidden size that the heads do not divide.
_DIVIDED_BY_HEADS = ("llama",)


@dataclass(frozen=True)
class CompressedForm:
    """The form of a model in a compressed-tensors directory.

    Attributes:
      quant: of the kernels.
      groups: kernel -> inputs of a group, 0: all.
      native: the model's own config.
      base: that of its base.
      stock: the stock form of the model with filled heads and MLP units.
      units: kernel that writes ("up", "v") -> what an adapter's channels are stored times, in each
        layer [channels] or [kv heads, channels]; the rows that read them are divided by it.
      figures: what a report says of the rows.
    """

    quant: Quant
    groups: dict[str, int]
    native: LlamaConfig
    base: LlamaConfig
    stock: StockForm
    units: dict[str, list[np.ndarray]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> LlamaConfig:
        """The config with the widths of the directory."""
        return self.stock.config

    @property
    def text(self) -> str:
        """What the kernels are stored as."""
        sizes = map(str, sorted(set(self.groups.values()), reverse=True))
        grouped = f"W4A16 in groups of {' and '.join(sizes)}"
        return grouped if self.quant.kind == "int4" else self.quant.text

    def report(self) -> dict[str, Any]:
        """The widths of the directory, what was filled, and how rows were scaled."""
        config, native = self.config, self.native
        report: dict[str, Any] = {**widths_report(native, config)}
        if self.quant.kind == "int4":
            sizes = sorted(set(self.groups.values()), reverse=True)
            of = {n: ", ".join(k for k in KERNELS if self.groups[k] == n) for n in sizes}
            report["groups of inputs"] = "; ".join(f"{n}: {kernels}" for n, kernels in of.items())
        if scales_state(native):
            report["eps_z"] = self.stock.eps_z
        return report | self.figures


def compressed_form(model: Model, quant: str, dtype: str, eps_z: float | None) -> CompressedForm:
    """The form of a model in a compressed-tensors directory, without what depends on rows that
    share a scale (`compressed_rows.with_shared_scales`).

    Args:
      model: a base or fused model, not packed; its kernels numbers, or codes of this kind.
      quant: a key of `QUANTS`.
      dtype: of what is not quantised.
      eps_z: None: chosen from the weights for `dtype`.

    Raises:
      ConfigError: a setting is wrong, the kernels are codes of another kind, or their inputs
        cannot be put in groups.
    """
    row, config = check_quant(quant, dtype), model.config
    widened = model.adapter is not None and METHODS[model.adapter.method].widens
    base = base_config(config, model.adapter) if widened and model.adapter else config
    groups = _groups(model, quant, row, base)
    eps_z = stock_form(model, dtype, eps_z).eps_z
    residual = math.lcm(*(groups[k] or _WORD for k in KERNELS if KERNELS[k][0] == "residual"))
    native = config.replace(
        intermediate_size=round_up(config.intermediate_size, groups["down"] or _WORD)
    )
    if config.base_head_dim is not None:
        native = native.replace(head_dim=round_up(config.head_dim, groups["o"] or 2))
    if config.family in _DIVIDED_BY_HEADS:
        residual = math.lcm(residual, config.num_heads)
    return CompressedForm(row, groups, config, base, StockForm(native, eps_z, residual))


def _groups(model: Model, quant: str, row: Quant, base: LlamaConfig) -> dict[str, int]:
    """The group size of every kernel: that of its codes, or what the base's inputs divide into."""
    how = QuantizeConfig(row.kind, group=row.group)  # type: ignore[arg-type]
    found: dict[str, int] = {}
    for name, leaf in trees.flatten(model.params).items():
        kernel = name.split("/")[-2]
        if kernel not in KERNELS or not name.endswith("/kernel"):
            continue
        if isinstance(leaf, QuantizedArray):
            _require_codes(name, leaf, quant, row, how)
            found[kernel] = leaf.group
        else:
            width = kernel_shapes(base)[kernel][0][-1]
            found[kernel] = group_of(name, row.kind, how, width)
    return found


def _require_codes(
    name: str, leaf: QuantizedArray, quant: str, row: Quant, how: QuantizeConfig
) -> None:
    """ConfigError for codes that this quantisation cannot take over."""
    wanted = leaf.group
    if row.group is not None and leaf.kind == row.kind:
        wanted = group_of(name, row.kind, how, leaf.base)
    require(
        leaf.kind == row.kind and bool(leaf.group) == (row.kind == "int4") and leaf.group == wanted,
        f"quant={quant!r} is {row.text}, and {name} is stored as {leaf.kind}, a scale for"
        f" {leaf.group or 'all'} inputs. Choose the quant of these codes (int8 without groups:"
        " 'int8' or 'w8a8'; int4: 'int4'), quantise the base otherwise, or make numbers of it"
        " (zf.dequantize_model), which are then rounded a second time.",
    )
