"""Exports with quantised kernels in the compressed-tensors format, for vLLM and transformers.

The model's codes are copied; floats are quantised here, the base's inputs separately from an
adapter's. int4 has groups of inputs, so an adapter's rows get separate groups. int8 has one scale
per output channel, shared with the base. An adapter's channel is therefore stored times a power of
two, and the rows that read it are divided by that power: eps_z for the residual state, a separate
one for each adapter unit of the MLP and adapter dim of the values.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.adapters.methods import base_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import KERNELS, kernel_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require, require_in
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.hf.keys import as_finite, hf_table, quantized
from zflora_jax.hf.shards import FLOATS, Shards, Spec
from zflora_jax.hf.stock import (
    CHOICES,
    HFContent,
    StockForm,
    module_of,
    native_leaf,
    round_up,
    state_shares,
    stock_form,
    stored_form,
)
from zflora_jax.nn.quantize_model import group_of
from zflora_jax.ops.quantized import QuantizedArray, cut, quantize_block

DTYPES = ("float32", "bfloat16")  # of unquantised tensors; vLLM casts scales to it too
CODES = ("I8", "I32", "I64")  # safetensors' dtypes of codes, words and shapes
MOST = 127  # the largest code of 8 bits that has a negative
_WORD = 4  # codes of 8 bits in a word
# Factors for a stored unit; 1 first, so that it stays if its rows are zeros.
_UNITS = tuple(sorted((2.0**k for k in range(-10, 11)), key=lambda power: abs(np.log2(power))))


@dataclass(frozen=True)
class Quant:
    """A way to store the layers' kernels."""

    kind: str  # type of their codes
    bits: int  # bits of a code
    format: str  # compressed-tensors' name of the layout
    parts: tuple[str, ...]  # names of a kernel's tensors, in place of "weight"; the codes first
    text: str  # for messages and help


_PACKED = ("pack-quantized", ("weight_packed", "weight_shape", "weight_scale"))
_PLAIN = ("int-quantized", ("weight", "weight_scale"))  # consumers round activations to 8 bits
QUANTS = {
    "int8": Quant("int8", 8, *_PACKED, "W8A16, one scale for each output channel"),
    "w8a8": Quant("int8", 8, *_PLAIN, "the codes of int8, activations rounded to 8 bits"),
    "int4": Quant("int4", 4, *_PACKED, "W4A16 in the groups of the model's codes, of floats in 64"),
}


def check_quant(quant: str, dtype: str | None = None) -> Quant:
    """Looks up a quantisation; ConfigError if it is unknown or excludes `dtype`."""
    require_in(
        QUANTS,
        quant,
        f"quant={quant!r} of a Hugging Face directory",
        " The types of llama.cpp (q8_0, q4_0, ...) go with --format gguf.",
    )
    require(
        dtype is None or dtype in DTYPES,
        f"quant={quant!r} with dtype={dtype!r}: scales become too small for it. Choose"
        f" {' or '.join(DTYPES)}, or leave dtype out.",
    )
    return QUANTS[quant]


@dataclass(frozen=True)
class CompressedForm:
    """The form of a model in a compressed-tensors directory."""

    quant: Quant
    groups: dict[str, int]  # kernel -> inputs of a group, 0: all
    native: LlamaConfig  # the model's config
    base: LlamaConfig  # its base's config
    stock: StockForm  # with filled heads and MLP units
    # "heads" or "mlp" -> factors of the adapter's stored units, per layer [R, e]
    units: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def powers(self, stream: str, layer: int) -> np.ndarray:
        """Factors of an adapter's stored channels of a stream, [heads or 1, e or 1]."""
        if stream in self.units:
            return self.units[stream][layer]
        return np.full((1, 1), self.stock.eps_z if stream == "residual" else 1, np.float32)


def compressed_form(model: Model, quant: str, dtype: str, eps_z: float | None) -> CompressedForm:
    """The form of a model, for the arguments of `compressed` and with its errors."""
    row, config = check_quant(quant, dtype), model.config
    widened = model.adapter is not None and METHODS[model.adapter.method].widens
    base = base_config(config, model.adapter) if widened and model.adapter else config
    groups = _groups(model, quant, base)
    chosen = stock_form(model, dtype, eps_z).eps_z
    inputs = round_up(config.intermediate_size, groups["down"] or _WORD)
    native = config.replace(intermediate_size=inputs)
    if config.base_head_dim is not None:
        native = native.replace(head_dim=round_up(config.head_dim, groups["o"] or 2))
    multiple = [groups[k] or _WORD for k in KERNELS if KERNELS[k][0] == "residual"]
    multiple += [config.num_heads] * config.traits.heads_divide
    stock = StockForm(native, chosen, math.lcm(*multiple))
    form = CompressedForm(row, groups, config, base, stock)
    return form if row.kind == "int4" or base == config else _shared_scales(form, model, eps_z)


def _groups(model: Model, quant: str, base: LlamaConfig) -> dict[str, int]:
    """Each kernel's group size: that of its codes, or one that divides the base's inputs."""
    row, found = QUANTS[quant], dict[str, int]()
    how = QuantizeConfig(row.kind)  # type: ignore[arg-type]
    for name, leaf in trees.flatten(model.params).items():
        kernel = name.split("/")[-2]
        if kernel not in KERNELS or not name.endswith("/kernel"):
            continue
        if not isinstance(leaf, QuantizedArray):
            found[kernel] = group_of(name, row.kind, how, kernel_shapes(base)[kernel][0][-1])
            continue
        found[kernel] = leaf.group
        require(
            leaf.kind == row.kind and bool(leaf.group) == (row.kind == "int4"),
            f"quant={quant!r} is {row.text}, and {name} is stored as {leaf.kind}, a scale for"
            f" {leaf.group or 'all'} inputs. Choose the quant of these codes (int8 without groups:"
            " 'int8' or 'w8a8'; int4: 'int4'), or make floats of the base (zf.dequantize_model).",
        )
    return found


@dataclass(frozen=True)
class _Kernel:
    """A kernel of one layer, the base's inputs separate from an adapter's.

    R, N: the leading input and output axes (heads), else 1; w, e, o: the last axes.
    """

    codes: np.ndarray  # [R, w, N, o] int8: the base's rows, with an adapter's outputs
    scales: np.ndarray  # [R or 1, groups, N, o] float32
    rows: np.ndarray  # an adapter's rows, [R, e, N, o] float32
    own: tuple[np.ndarray, np.ndarray] | None  # the rows' separate codes and scales (int4)
    outputs: int  # number of the base's outputs in o

    @property
    def shared(self) -> np.ndarray:
        """[N, o]: True where the rows must use the base's scale: where the base has codes, except
        for an adapter's outputs, which may be rounded again.
        """
        used = np.max(np.abs(self.codes), axis=(0, 1), initial=0) > 0
        used[:, self.outputs :] = False
        return used

    def joined(self, powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes [R, w + e, N, o] and scales, with the rows divided by `powers` [R, e, 1, 1]."""
        codes, scales = self.codes, self.scales
        if self.own is not None:
            codes = np.concatenate([codes, self.own[0]], axis=1)
            return codes, np.concatenate([scales, self.own[1] / powers], axis=1)
        if not self.rows.size:
            return codes, scales
        rows = self.rows / powers
        need = np.abs(rows).max(axis=(0, 1)) / MOST
        wider = ~self.shared & (need > scales[0, 0])
        if wider.any():
            again = np.rint(codes * (scales / np.where(wider, need, 1)))
            codes = np.where(wider, again, codes).astype(np.int8)
            scales = np.where(wider, need, scales).astype(np.float32)
        own = np.clip(np.rint(rows / np.where(scales > 0, scales, 1)), -MOST, MOST)
        return np.concatenate([codes, own.astype(np.int8)], axis=1), scales


def _kernel(form: CompressedForm, model: Model, name: str) -> _Kernel:
    """Splits a kernel of `hf_table`; floats are quantised. Processes call this together."""
    place = hf_table(form.native)[name]
    base = hf_table(form.base)[name].shape
    kernel, leaf, reads = module_of(place), native_leaf(model, place), place.in_axes or 1
    writes, width, kind = len(place.shape) - reads, base[reads - 1], form.quant.kind
    extra: Any = None
    rows: Any = np.zeros((*place.shape[: reads - 1], 0, *place.shape[reads:]))
    if isinstance(leaf, QuantizedArray):
        as_finite(np.asarray(leaf.scales), np.float32, f"the scales of {name}", "the model")
        top = cut(leaf, leaf.axis, slice(0, leaf.base))
        if leaf.base < leaf.shape[leaf.axis]:
            extra = cut(leaf, leaf.axis, slice(leaf.base, None))
            rows = extra.astype(np.float32)
    else:
        x, at = as_finite(leaf, np.float32, name, "the model"), (slice(None),) * (reads - 1)
        axes = {"reads": reads, "writes": writes, "group": form.groups[kernel]}
        top = quantized(x[(*at, slice(width))], kind, **axes)
        rows = x[(*at, slice(width, None))]
        if rows.size and kind == "int4":
            extra = jax.jit(quantize_block)(rows, top)

    def plain(part: Any, dtype: Any = np.float32) -> np.ndarray:
        shape = [1] * (2 - reads) + list(part.shape[:reads]) + [1] * (2 - writes)
        return np.asarray(part).astype(dtype).reshape(*shape, *part.shape[reads:])

    own = None
    if kind == "int4" and extra is not None:
        own = plain(extra.codes, np.int8), plain(extra.scales)
    return _Kernel(plain(top.codes, np.int8), plain(top.scales), plain(rows), own, base[-1])


def _shared_scales(form: CompressedForm, model: Model, eps_z: float | None) -> CompressedForm:
    """The form with the powers of units and, unless the user gave it, eps_z.

    A power is judged by the whole error of its rows, because clipping a few rows costs less than
    rounding all others more coarsely. eps_z minimises
    that error plus the one that norms make by summing over the state and the adapter dims.
    """

    def error_of(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Squared errors [R, e] of rows [R, e, outputs] stored with these scales."""
        stored = np.clip(np.rint(rows / scales), -MOST, MOST) * scales
        return np.sum((stored - rows) ** 2, axis=-1)

    units: dict[str, list[np.ndarray]] = {}
    error, energies, counts = np.zeros(len(CHOICES)), np.zeros(2), np.zeros(2)  # rows, base
    for name, place in hf_table(form.native).items():
        kernel = module_of(place)
        parts = _kernel(form, model, name) if kernel in KERNELS else None
        if parts is None or not parts.rows.size:
            continue
        stream, shared = KERNELS[kernel][0], parts.shared
        rows, scales = parts.rows[..., shared], parts.scales[0, 0][shared]
        choices = CHOICES if stream == "residual" else _UNITS
        found = np.stack([error_of(rows, power * scales) for power in choices])
        if stream == "residual":
            base = parts.codes[..., shared] * scales
            error += found.reshape(len(found), -1).sum(axis=1)
            energies += np.sum(rows**2), np.sum(base**2)
            counts += rows.size, base.size
            continue
        if stream == "heads":  # the heads of a group read one value
            found = found.reshape(len(_UNITS), form.native.num_kv_heads, -1, found.shape[-1]).sum(2)
        best = np.asarray(_UNITS, np.float32)[found.argmin(axis=0)]
        units.setdefault(stream, []).append(best)
    stock = form.stock
    if eps_z is None and counts[0]:
        shares = state_shares(model)
        # Error of inputs times the rows, relative to the products with the base's
        part = shares["residual"] / counts[0] / (energies[1] / counts[1])
        effect = np.sqrt(part * error / (1 + part * energies[0]))
        for share in shares.values():
            effect += 1 - 1 / np.sqrt(1 + share * np.square(CHOICES))
        stock = replace(stock, eps_z=CHOICES[int(effect.argmin())])
    return replace(form, stock=stock, units=units)


def compressed(model: Model, quant: str, dtype: str, eps_z: float | None) -> HFContent:
    """The content of a directory with quantised kernels.

    Args:
      model: A base or fused model, not packed.
      quant: Key of `QUANTS`.
      dtype: Data type of embedding, head, norms and biases.
      eps_z: Scale of the stored state; None: chosen from the weights.

    Raises:
      ConfigError: A setting is wrong, or the kernels cannot be stored in this form.
      CheckpointError: A value or scale is not finite.
    """
    form = compressed_form(model, quant, dtype, eps_z)
    row, table = form.quant, hf_table(form.stock.config)
    floats = stored_form(model, form.stock, dtype)
    specs = dict[str, Spec]()
    kernels = {name for name, place in table.items() if module_of(place) in KERNELS}
    scale_dtype = "bfloat16" if row.kind == "int4" and dtype == "bfloat16" else "float32"
    for name, (shape, _) in floats.specs.items():
        if name not in kernels:
            specs[name] = shape, dtype
            continue
        (rows, width), group = shape, form.groups[module_of(table[name])]
        parts = {
            "weight": (shape, "int8"),
            "weight_packed": ((rows, -(-width * row.bits // 32)), "int32"),
            "weight_scale": ((rows, width // group if group else 1), scale_dtype),
            "weight_shape": ((2,), "int64"),
        }
        specs |= {name.removesuffix("weight") + part: parts[part] for part in row.parts}

    # The tensors of a kernel are asked for one after the other.
    kernel_of = functools.lru_cache(maxsize=1)(functools.partial(_stock_kernel, form, model))

    def tensor(name: str) -> np.ndarray:
        stem, _, part = name.rpartition(".")
        if f"{stem}.weight" not in kernels or part == "bias":
            return floats.tensor(name)
        codes, scales = kernel_of(f"{stem}.weight")
        if part == "weight_shape":
            return np.array(codes.shape, np.int64)
        if part == "weight_scale":
            return as_finite(scales, np.dtype(scale_dtype), name, "the model")
        return pack(codes, row.bits) if part == "weight_packed" else codes

    config = {**floats.config, "quantization_config": _quantization_config(form)}
    stored: dict[str, Any] = {"stored_config": form.stock.native, "multiple": form.stock.multiple}
    report = {**floats.report, "quant": f"{quant}: {row.text}"}
    stored = {"quant": quant, **stored, **floats.manifest}
    return HFContent(form.stock, config, specs, tensor, report, stored)


def _stock_kernel(form: CompressedForm, model: Model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in] int8 and scales [out, groups] float32 of a kernel in stock form."""
    place = hf_table(form.stock.config)[name]
    kernel, layer = module_of(place), int(name.split(".")[2])
    parts, (reads, writes) = _kernel(form, model, name), KERNELS[kernel]
    powers = form.powers(reads, layer)
    powers = np.repeat(powers, len(parts.codes) // len(powers) or 1, axis=0)
    codes, scales = parts.joined(powers[..., None, None])
    columns = np.ones(codes.shape[2:], np.float32)
    if kernel not in ("q", "k", "gate"):
        columns[:, parts.outputs :] = form.powers(writes, layer)
    elif form.stock.rotated(kernel):
        columns *= form.stock.head_scale(kernel, form.stock.eps_z)[: codes.shape[-1]]
    width, group = place.shape[(place.in_axes or 1) - 1], form.groups[kernel]

    def filled(part: np.ndarray, inputs: int, value: int) -> np.ndarray:
        """Pads a part to the stored widths, [out, in]."""
        pads = [(0, 0), (0, inputs - part.shape[1]), (0, 0), (0, place.shape[-1] - part.shape[3])]
        part = np.pad(part, pads, constant_values=value)
        if form.stock.rotated(kernel):
            part = part[..., form.stock.head_order]
        return np.ascontiguousarray(part.transpose(2, 3, 0, 1).reshape(-1, part[:, :, 0, 0].size))

    return filled(codes, width, 0), filled(scales * columns, width // group if group else 1, 1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] int8 as words int32: the first code, counted from the lowest, in the lowest
    bits; rows end with zeros.
    """
    each = 32 // bits
    counted = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint32)
    counted = np.pad(counted, [(0, 0), (0, -codes.shape[1] % each)])
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words = counted.reshape(len(codes), -1, each) << shifts
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def unpack(words: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `pack`: int8 codes [out, width]."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    counted = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    codes = counted.astype(np.int16) - (1 << (bits - 1))
    return codes.astype(np.int8).reshape(len(words), -1)[:, :width]


def _quantization_config(form: CompressedForm) -> dict[str, Any]:
    """The quantization_config of config.json, as llm-compressor writes it."""
    row = form.quant
    sizes = sorted(set(form.groups.values()), reverse=True)
    common: dict[str, Any] = {"actorder": None, "block_structure": None, "observer_kwargs": {}}
    common |= {"symmetric": True, "type": "int"}
    rounded = {"num_bits": 8, "strategy": "token", "group_size": None, "dynamic": True}
    activations = common | rounded | {"observer": None} if row.format == _PLAIN[0] else None
    schemes = {}
    for i, size in enumerate(sizes):
        kernels = [kernel for kernel in KERNELS if form.groups[kernel] == size]
        names = [f"re:.*{kernel}_proj$" for kernel in kernels]
        weights: dict[str, Any] = {"num_bits": row.bits, "strategy": "group" if size else "channel"}
        weights |= {"group_size": size or None, "dynamic": False, "observer": "minmax"}
        schemes[f"group_{i}"] = {
            "format": row.format,
            "input_activations": activations,
            "output_activations": None,
            "targets": names if len(sizes) > 1 else ["Linear"],
            "weights": common | weights,
        }
    return {
        "config_groups": schemes,
        "format": row.format,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "model.embed_tokens", "re:.*norm$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


class CompressedShards(Shards):
    """Tensors of an export with quantised kernels, as floats under their names without `quant`."""

    def __init__(self, directory: Path, quant: str) -> None:
        super().__init__(directory, dtypes=(*FLOATS, *CODES))
        self._quant = check_quant(quant)
        scaled = [name for name in self.shapes if name.endswith(".weight_scale")]
        self._stems = {name.removesuffix("weight_scale") for name in scaled}
        for stem in self._stems:
            found = [self.shapes.pop(stem + part) for part in self._quant.parts]
            rows, words = shape = found[0]
            if "weight_shape" in self._quant.parts:
                shape = tuple(map(int, super().read(stem + "weight_shape")))
                if (rows, words) != (shape[0], -(-shape[1] * self._quant.bits // 32)):
                    raise CheckpointError(
                        f"{directory}: {stem}weight_packed is {rows} x {words} words, and"
                        f" {stem}weight_shape says {shape}."
                    )
            self.shapes[stem + "weight"] = shape

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Reads rows of a tensor; of a quantised one as code times scale, float32."""
        stem = name.removesuffix("weight")
        if stem not in self._stems:
            return super().read(name, rows)
        width = self.shapes[name][1]
        scales = super().read(stem + "weight_scale", rows).astype(np.float32)
        codes = super().read(stem + self._quant.parts[0], rows)
        if "weight_shape" in self._quant.parts:
            codes = unpack(codes, self._quant.bits, width)
        values = codes * np.repeat(scales, width // scales.shape[1], axis=1)
        return np.asarray(values, np.float32)
