"""Exports with quantised kernels, in the compressed-tensors format: codes, scales and config.json
of stock form, for vLLM and transformers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from zflora_jax.core.architecture import KERNELS, count_base
from zflora_jax.core.model import Model
from zflora_jax.hf.compressed_form import CompressedForm, compressed_form
from zflora_jax.hf.compressed_rows import MOST, Split, split_kernel, with_shared_scales
from zflora_jax.hf.compressed_types import PLAIN, pack, packed_shape, quantization_config
from zflora_jax.hf.config import to_hf_config
from zflora_jax.hf.keys import as_finite, hf_table
from zflora_jax.hf.stock import module_of, native_tensor
from zflora_jax.hf.stored import Stored


def compressed(model: Model, quant: str, dtype: str, eps_z: float | None) -> Stored:
    """What a directory of a quantised model holds.

    Codes that the model has are copied; numbers are quantised as `ops.quantized.quantize` does it,
    the base's inputs apart from an adapter's.

    Args:
      model: a base or fused model, not packed.
      quant: "int8": W8A16, one scale for each output channel; "w8a8": the same codes for consumers
        that round activations to 8 bits; "int4": W4A16 in the groups that the model's codes have,
        else of 64 inputs; "int4-g32", "int4-g64", "int4-g128": in groups of so many.
      dtype: of embedding, head, norms and biases.
      eps_z: None: chosen from the weights.

    Raises:
      ConfigError: a setting is wrong, or the kernels cannot be stored so.
      CheckpointError: a number or scale is not finite.
    """
    form = with_shared_scales(compressed_form(model, quant, dtype, eps_z), model, eps_z)
    row, table = form.quant, hf_table(form.config)
    scales = "bfloat16" if row.kind == "int4" and dtype == "bfloat16" else "float32"
    specs = _specs(form, dtype, scales)

    @lru_cache(maxsize=1)  # the tensors of a kernel are asked for one after the other
    def kernel(name: str) -> tuple[np.ndarray, np.ndarray]:
        return _kernel(form, model, name)

    def tensor(name: str) -> np.ndarray:
        stem, _, part = name.rpartition(".")
        whole = f"{stem}.weight"
        if whole not in table or module_of(table[whole]) not in KERNELS or part == "bias":
            return as_finite(_plain(form, model, name), np.dtype(dtype), name, "the model")
        codes, found = kernel(whole)
        if part == "weight_shape":
            return np.array(codes.shape, np.int64)
        if part == "weight_scale":
            return as_finite(found, np.dtype(scales), name, "the model")
        return codes if row.format == PLAIN else pack(codes, row.bits)

    config = to_hf_config(form.config, dtype, form.stock.rope)
    config["quantization_config"] = quantization_config(row, form.groups)
    manifest = {
        "quant": quant,
        "stored_config": form.stock.native.flat(),
        "multiple": form.stock.multiple,
    }
    report = {"parameters": count_base(form.config), "quant": f"{quant}: {form.text}"}
    report |= form.report()
    return Stored(form.stock, config, specs, tensor, report, manifest)


def _specs(form: CompressedForm, dtype: str, scales: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of every tensor of the directory."""
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, place in hf_table(form.config).items():
        shape = place.hf_shape
        if module_of(place) not in KERNELS:
            specs[name] = (shape, dtype)
            continue
        size = form.groups[module_of(place)]
        stored = {
            "weight": (shape, "int8"),
            "weight_packed": (packed_shape(shape, form.quant.bits), "int32"),
            "weight_scale": ((shape[0], shape[1] // size if size else 1), scales),
            "weight_shape": ((2,), "int64"),
        }
        stem = name.removesuffix("weight")
        specs |= {stem + part: stored[part] for part in form.quant.parts}
    return specs


def _plain(form: CompressedForm, model: Model, name: str) -> np.ndarray:
    """A tensor that is not quantised, in stock form, float32."""
    place, x = native_tensor(model, name)
    wanted = hf_table(form.stock.native)[name].shape
    x = np.pad(x, [(0, b - a) for a, b in zip(x.shape, wanted, strict=True)])
    return hf_table(form.config)[name].to_hf(form.stock.forward(module_of(place), x))


def _kernel(form: CompressedForm, model: Model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in] int8 and scales [out, groups] float32 of a kernel in stock form."""
    place = hf_table(form.config)[name]
    kernel, layer = module_of(place), int(name.split(".")[2])
    parts = split_kernel(form, model, name)
    build = _in_groups if form.quant.kind == "int4" else _shared
    divisor = _divisor(form, kernel, layer, parts)
    reads = place.in_axes or 1
    codes, scales = build(parts, divisor, place.shape[reads - 1], form.groups[kernel])
    scales = scales * _columns(form, kernel, layer, codes.shape[2:])
    more = place.shape[-1] - codes.shape[-1]
    codes, scales = _filled(codes, -1, more, 0), _filled(scales, -1, more, 1)
    if form.native.base_head_dim is not None and kernel in ("q", "k"):
        codes, scales = codes[..., form.stock.head_order], scales[..., form.stock.head_order]

    def flat(part: np.ndarray) -> np.ndarray:
        outputs = part.shape[2] * part.shape[3]
        return np.ascontiguousarray(part.transpose(2, 3, 0, 1).reshape(outputs, -1))

    return flat(codes), flat(scales)


def _filled(part: np.ndarray, axis: int, more: int, value: int) -> np.ndarray:
    pads = [(0, 0)] * part.ndim
    pads[axis] = (0, more)
    return np.pad(part, pads, constant_values=value)


def _in_groups(
    parts: Split, divisor: np.ndarray, width: int, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales in groups: the base's, the adapter's, and zeros up to `width` inputs."""
    codes, scales = parts.codes, parts.scales
    if parts.row_codes is not None and parts.row_scales is not None:
        codes = np.concatenate([codes, parts.row_codes], axis=1)
        scales = np.concatenate([scales, parts.row_scales / divisor.max()], axis=1)
    codes = _filled(codes, 1, width - codes.shape[1], 0)
    return codes, _filled(scales, 1, width // group - scales.shape[1], 1)


def _shared(
    parts: Split, divisor: np.ndarray, width: int, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales where all inputs of an output share one scale."""
    codes, rows, scales = parts.codes, parts.rows / divisor, parts.scales
    need = np.abs(rows).max(axis=(0, 1), initial=0.0) / MOST
    wider = ~parts.shared & (need > scales[0, 0])
    if wider.any():
        again = np.rint(codes * (scales / np.where(wider, need, 1)))
        codes = np.where(wider, again, codes).astype(np.int8)
        scales = np.where(wider, need, scales).astype(np.float32)
    own = np.rint(rows / np.where(scales > 0, scales, 1))
    codes = np.concatenate([codes, np.clip(own, -MOST, MOST).astype(np.int8)], axis=1)
    return _filled(codes, 1, width - codes.shape[1], 0), scales


def _divisor(form: CompressedForm, kernel: str, layer: int, parts: Split) -> np.ndarray:
    """What an adapter's rows are divided by, [R, e, 1, 1]."""
    units = {"o": "v", "down": "up"}.get(kernel)
    if units is None:
        return np.full((1, 1, 1, 1), form.stock.eps_z, np.float32)
    if units not in form.units:
        return np.ones((1, 1, 1, 1), np.float32)
    found = form.units[units][layer]
    if kernel == "o":
        found = np.repeat(found, parts.codes.shape[0] // len(found), axis=0)
    return found[..., None, None]


def _columns(form: CompressedForm, kernel: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """What the columns of a kernel are stored times, broadcasting against [N, o] of `shape`."""
    native, columns = form.native, np.ones(shape, np.float32)
    if kernel in form.units:
        found = form.units[kernel][layer]
        columns[:, shape[-1] - found.shape[-1] :] = found
    elif KERNELS[kernel][1] == "residual":
        columns[:, native.norm_dim :] = form.stock.eps_z
    elif kernel in ("q", "k") and native.base_head_dim is not None:
        columns *= form.stock.head_scale(kernel, form.stock.eps_z)[: shape[-1]]
    return columns
