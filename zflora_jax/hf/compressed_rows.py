"""An adapter's rows on the base's scales, for formats of one scale for each output channel.

A row that reads an adapter's channel shares the scale of each output with the base's rows, whose
codes do not change. The channel may be stored times any power of two if the rows that read it are
divided by it: so the power is chosen that stores the rows with the smallest error. Of the residual
state there is one, eps_z; every adapter unit of the MLP and every adapter dim of the values has its
own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from zflora_jax.core.architecture import KERNELS
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model import Model
from zflora_jax.hf.compressed_form import CompressedForm
from zflora_jax.hf.keys import as_finite, hf_table
from zflora_jax.hf.quantized_leaves import quantized
from zflora_jax.hf.state_scale import CHOICES, state_share
from zflora_jax.hf.stock import module_of, native_leaf
from zflora_jax.ops.quantized import QuantizedArray, dequantize
from zflora_jax.ops.quantized_blocks import cut, quantize_block

MOST = 127  # the largest code of 8 bits that has a negative
# What a unit may be stored times: 1, then its neighbours, so that rows of zeros leave it alone.
_UNITS = tuple(sorted((2.0**k for k in range(-10, 11)), key=lambda power: abs(np.log2(power))))


@dataclass(frozen=True)
class Split:
    """A kernel of one layer, the rows that read the base's channels apart from an adapter's.

    R, N: the leading input and output axes (heads), else 1; w, e, o: the last axes.

    Attributes:
      codes: of the base's rows, [R, w, N, o] int8; columns that write an adapter's channels too.
      scales: [R or 1, groups, N, o] float32.
      rows: an adapter's, [R, e, N, o] float32.
      row_codes: those of int4, [R, e, N, o] int8, which has groups for them; else None.
      row_scales: [R, groups, N, o] float32.
      outputs: how many of o are the base's.
    """

    codes: np.ndarray
    scales: np.ndarray
    rows: np.ndarray
    row_codes: np.ndarray | None
    row_scales: np.ndarray | None
    outputs: int

    @property
    def shared(self) -> np.ndarray:
        """[N, o]: whether the rows have to take the base's scale. A channel without any input of
        the base has none, and one that an adapter added may be rounded again.
        """
        used = np.max(np.abs(self.codes), axis=(0, 1), initial=0) > 0
        used[:, self.outputs :] = False
        return used


def split_kernel(form: CompressedForm, model: Model, name: str) -> Split:
    """Take a kernel apart; numbers are quantised here. Processes that share the model call this
    together.

    Args:
      form: of the model.
      model: what is exported.
      name: Hugging Face's, of the kernel.

    Raises:
      CheckpointError: a number or a scale is not finite.
    """
    place = hf_table(form.native)[name]
    base = hf_table(form.base)[name].shape
    kernel, leaf, reads = module_of(place), native_leaf(model, place), place.in_axes or 1
    writes, width, kind = len(place.shape) - reads, base[reads - 1], form.quant.kind
    extra: Any = None
    if isinstance(leaf, QuantizedArray):
        top = cut(leaf, extra=False)
        _require_finite(name, leaf)
        if leaf.base < leaf.shape[leaf.axis]:
            extra = cut(leaf, extra=True)
        rows = np.zeros((0,)) if extra is None else np.asarray(dequantize(extra))
    else:
        x = as_finite(leaf, np.float32, name, "the model")
        at = (slice(None),) * (reads - 1)
        axes = {"reads": reads, "writes": writes, "group": form.groups[kernel]}
        top = quantized(x[(*at, slice(width))], kind, **axes)
        rows = x[(*at, slice(width, None))]
        if rows.size and kind == "int4":
            extra = jax.jit(quantize_block)(rows, top)

    def plain(part: Any, dtype: Any) -> np.ndarray:
        array = np.asarray(part).astype(dtype)
        shape = [1] * (2 - reads) + list(array.shape[:reads]) + [1] * (2 - writes)
        return array.reshape(*shape, *array.shape[reads:])

    in_groups = kind == "int4" and extra is not None
    if not rows.size:
        rows = np.zeros((*place.shape[: reads - 1], 0, *place.shape[reads:]))
    return Split(
        plain(top.codes, np.int8),
        plain(top.scales, np.float32),
        plain(rows, np.float32),
        plain(extra.codes, np.int8) if in_groups else None,
        plain(extra.scales, np.float32) if in_groups else None,
        base[-1],
    )


def _require_finite(name: str, leaf: QuantizedArray) -> None:
    if not np.isfinite(np.asarray(leaf.scales, np.float32)).all():
        raise CheckpointError(
            f"the model: the scales of {name} hold NaN or infinite values; quantise the base again."
        )


def with_shared_scales(form: CompressedForm, model: Model, eps_z: float | None) -> CompressedForm:
    """The form with eps_z and the scales of units chosen from the weights; int4, whose rows have
    groups of their own, and a model without such rows are left alone.

    Args:
      form: of `compressed_form`.
      model: what is exported.
      eps_z: what the user gave; None: the one of the smallest `_Errors.effect`.
    """
    if form.quant.kind != "int8" or form.base == form.native:
        return form
    units: dict[str, list[np.ndarray]] = {}
    state, others = _Errors(CHOICES), _Errors(_UNITS)
    for name, place in hf_table(form.native).items():
        kernel = module_of(place)
        if kernel not in KERNELS:
            continue
        parts = split_kernel(form, model, name)
        if not parts.rows.size:
            continue
        if KERNELS[kernel][0] == "residual":
            state.add(parts)
            continue
        found = others.add(parts)
        if kernel == "o":  # the heads of a group read one value
            found = found.reshape(len(_UNITS), form.native.num_kv_heads, -1, found.shape[-1]).sum(2)
        best = np.asarray(_UNITS, np.float32)[found.argmin(axis=0)]
        units.setdefault("v" if kernel == "o" else "up", []).append(best)
    chosen = form.stock.eps_z
    if eps_z is None and state.energy:
        chosen = CHOICES[int(state.effect(state_share(model)).argmin())]
    stock = replace(form.stock, eps_z=chosen)
    return replace(form, stock=stock, units=units, figures=state.report(chosen))


class _Errors:
    """The error of rows on the base's scales, for every power of two that they may be divided by.
    A few rows meet an output whose scale is small, and clipping those costs less than rounding all
    others more coarsely: so the powers are judged by the whole error.
    """

    def __init__(self, powers: tuple[float, ...]) -> None:
        self.powers, self.energy, self.count = powers, 0.0, 0
        self.base_energy, self.base_count = 0.0, 0
        self.error, self.clipped = np.zeros(len(powers)), np.zeros(len(powers), int)

    def add(self, parts: Split) -> np.ndarray:
        """Count the rows of a kernel; returns their squared errors [powers, R, e]."""
        shared = parts.shared
        rows, scales = parts.rows[..., shared], parts.scales[0, 0][shared]
        self.energy, self.count = self.energy + float(np.sum(rows**2)), self.count + rows.size
        numbers = parts.codes[..., shared] * scales
        self.base_energy += float(np.sum(numbers**2))
        self.base_count += numbers.size
        errors = np.zeros((len(self.powers), *rows.shape[:-1]))
        for i, power in enumerate(self.powers):
            codes = np.rint(rows / (power * scales))
            self.clipped[i] += int((np.abs(codes) > MOST).sum())
            stored = np.clip(codes, -MOST, MOST) * (power * scales)
            errors[i] = np.sum((stored - rows) ** 2, axis=-1)
        self.error += errors.reshape(len(errors), -1).sum(axis=1)
        return errors

    def effect(self, share: float) -> np.ndarray:
        """An estimate of the relative error that each power, as eps_z, causes in what a layer
        computes: the error of the rows times their inputs, over the base's numbers times theirs;
        and by how much the state enlarges what a norm divides by.

        Args:
          share: of `state_share`, the energy of the rows' inputs over that of the base's.
        """
        rows, base = self.error / self.count, self.base_energy / self.base_count
        return np.sqrt(share * rows / base) + share * np.square(self.powers) / 2

    def report(self, power: float) -> dict[str, Any]:
        """What is told of the rows where all are divided by `power`."""
        if not self.energy:
            return {}
        at = self.powers.index(power)
        error = float(np.sqrt(self.error[at] / self.energy))
        text = f"{100 * error:.2g}% of their size"
        if self.clipped[at]:
            text += f"; {self.clipped[at]} of {self.count} numbers clipped"
        return {"error of the state's rows": text}
