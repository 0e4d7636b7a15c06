"""Conversion of a model's kernels and tables to codes and scales, and back to floats."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any

import jax
import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import KERNELS, kernel_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig, quantize_config
from zflora_jax.ops.quantized import (
    KINDS,
    QuantizedArray,
    check_kind,
    code_values,
    dequantize,
    is_finite,
    quantize,
    quantized_names,
    spread,
)
from zflora_jax.parallel.devices import on_cpu
from zflora_jax.parallel.mesh import has_values_here, mesh_in_use
from zflora_jax.parallel.sharding import constrain

log = logging.getLogger(__name__)


def stored_as(name: str, how: QuantizeConfig) -> str:
    """The storage type of a leaf: "none", "keep" or a type. Norms and biases are always floats."""
    module, parameter = name.split("/")[-2:]
    if parameter == "embedding":
        return how.embedding
    if parameter != "kernel":
        return "none"
    return how.head if module == "lm_head" else how.kernels


def kernel_axes(config: LlamaConfig, name: str) -> dict[str, int]:
    """Number of input axes ("reads") and output axes ("writes") of a kernel or table; a table's
    inputs are those of a tied head.
    """
    module, parameter = name.split("/")[-2:]
    if parameter == "embedding":
        return {"reads": 1, "writes": 0}
    if module not in KERNELS:
        return {"reads": 1, "writes": 1}
    reads, writes = kernel_shapes(config)[module]
    return {"reads": len(reads), "writes": len(writes)}


def group_of(name: str, kind: str, how: QuantizeConfig, width: int) -> int:
    """The group size of leaf `name` with groups along an axis of `width`: `how.group`, or the next
    smaller one that divides the axis, e.g. for `o` if heads are smaller than a group. GGUF's types
    have a fixed one. ConfigError if none fits.
    """
    group = check_kind(kind, None if kind.startswith("q") else how.group)
    fits = [g for g in KINDS[kind].groups if g <= group and (width % g == 0 if g else not group)]
    require(
        bool(fits),
        f"{name}: its {width} inputs are no multiple of 32, which groups of {kind} need; choose"
        " int8 with quantize.group=0, or leave it as floats.",
    )
    return max(fits)


def check_tables(config: LlamaConfig, how: QuantizeConfig) -> None:
    """Raises ConfigError for a setting of a head that the model does not have."""
    require(
        not config.tie_word_embeddings or how.head in ("none", "keep"),
        f"quantize.head={how.head}: this model's head is its embedding; set quantize.embedding.",
    )


def require_stored_as(model: Model, how: QuantizeConfig) -> None:
    """Raises ConfigError if a leaf is not stored as `how` asks: evaluation and export load so."""
    for name, leaf in trees.flatten(model.params).items():
        wanted, found = stored_as(name, how), "none"
        if isinstance(leaf, QuantizedArray):
            found = f"{leaf.kind} in groups of {leaf.group}"
            if wanted in KINDS:
                group = group_of(name, wanted, how, leaf.shape[leaf.axis])
                wanted += f" in groups of {group}"
        setting = {"embed": "embedding", "lm_head": "head"}.get(name.split("/")[-2], "kernels")
        require(
            wanted in ("keep", found),
            f"{name} of the model is stored as {found.replace('none', 'floats')}, and the run says"
            f" quantize.{setting}={wanted}: set quantize.* to how the model was quantised, or load"
            " it with load_model(..., quantize=run.quantize).",
        )


def quantize_model(model: Model, how: QuantizeConfig | str) -> Model:
    """Quantises a model in memory; `hf.load.load_model` quantises tensor by tensor.

    Args:
      model: A base, not packed. One device's codes are made on the CPU, as in load_model; on a mesh
        divided parts stay where they are.
      how: Types of codes; a name is the type of the kernels.

    Returns:
      A Model whose chosen leaves are `ops.quantized.QuantizedArray`s; it shares the others.

    Raises:
      ConfigError: the model is packed, fused or stored as other codes already, or groups do not
        divide a kernel's inputs.
      CheckpointError: see `checked_scales`.
    """
    how, config = quantize_config(how), model.config
    widened = model.adapter is not None and METHODS[model.adapter.method].widens
    require(
        not config.execution.packed and not widened,
        "a packed or fused model cannot be quantised: quantise the base, then fuse, then pack.",
    )
    _require_types(config, how)
    with mesh_in_use(model.params):
        params = trees.map_with_names(partial(_quantized, config, how), model.params)
    return checked_scales(dataclasses.replace(model, params=params))


def checked_scales(model: Model) -> Model:
    """Returns `model`; CheckpointError if a scale or minimum of its codes is not finite. Logs a
    scale that has underflowed to 0.
    """
    lost: list[str] = []
    for name in quantized_names(model.params):
        leaf = trees.flatten(model.params)[name]
        finite, zero = map(trees.gathered, _ends(leaf))
        if not finite:
            raise CheckpointError(
                f"{name} holds NaN or is beyond the range of {leaf.kind}, whose scales are"
                f" {leaf.scales.dtype}: choose int8 or nf4, or leave it as floats."
            )
        lost += [f"{name} as {leaf.kind}"] if zero else []
    if lost:
        where = f"{lost[0]} ({len(lost)} such leaves)"
        log.warning("%s: values below the range of its scales are 0; choose int8 or nf4", where)
    return model


@jax.jit
def _ends(w: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """(True if all scales are finite, True if one is 0 and a value of its codes is not.)"""
    return is_finite(w), ((spread(w, w.scales) == 0) & (code_values(w.kind, w.codes) != 0)).any()


def quantized_shapes(config: LlamaConfig, how: QuantizeConfig, params: trees.Tree) -> trees.Tree:
    """The ShapeDtypeStructs of a quantised tree; ConfigError if `how` keeps a file's blocks."""
    _require_types(config, how)
    return jax.eval_shape(
        lambda tree: trees.map_with_names(partial(_quantized, config, how), tree), params
    )


def _require_types(config: LlamaConfig, how: QuantizeConfig) -> None:
    require(
        "keep" not in (how.kernels, how.embedding, how.head),
        "quantize 'keep' is for the codes of a GGUF file, which only load_model(FILE,"
        f" quantize='keep') reads: name a type, one of {', '.join(KINDS)}.",
    )
    check_tables(config, how)


def _quantized(config: LlamaConfig, how: QuantizeConfig, name: str, leaf: Any) -> Any:
    kind = stored_as(name, how)
    if kind == "none":
        return leaf
    axes = kernel_axes(config, name)
    group = group_of(name, kind, how, leaf.shape[-axes["writes"] - 1])
    if isinstance(leaf, QuantizedArray):
        require(
            (leaf.kind, leaf.group) == (kind, group),
            f"{name} is stored as {leaf.kind} in groups of {leaf.group} already, which {kind} in"
            f" groups of {group} would round a second time: start from the float model, or use"
            " zf.dequantize_model first.",
        )
        return leaf
    whole = isinstance(leaf, jax.Array) and has_values_here(leaf) and len(leaf.devices()) == 1
    if not whole:
        return _quantize(name, kind, leaf, group, **axes)
    with on_cpu():  # other devices may round a code differently
        made = _quantize(name, kind, np.asarray(leaf), group, **axes)
    return jax.device_put(made, *leaf.devices())


@partial(jax.jit, static_argnames=("name", "kind", "group", "reads", "writes"))
def _quantize(name: str, kind: str, leaf: Any, group: int, reads: int, writes: int) -> Any:
    made = quantize(leaf, kind, reads=reads, writes=writes, group=group)
    return trees.flatten(constrain(trees.unflatten({name: made})))[name]


def dequantize_model(model: Model, dtype: str | None = None) -> Model:
    """Returns a model of floats, which merging by addition and training of the base need.

    Args:
      model: A model with or without quantised leaves, not packed.
      dtype: Data type of the floats; None for that of the activations.
    """
    require(
        not model.config.execution.packed,
        "a packed model cannot be dequantised: use the model that was packed.",
    )
    to_floats = jax.jit(partial(dequantize, dtype=dtype or model.config.execution.dtype))

    def visit(name: str, leaf: Any) -> Any:
        return to_floats(leaf) if isinstance(leaf, QuantizedArray) else leaf

    with mesh_in_use(model.params):
        params = trees.map_with_names(visit, model.params)
    return dataclasses.replace(model, params=params)


def is_quantized(model: Model) -> bool:
    """True if any leaf of a model is stored as codes."""
    return bool(quantized_names(model.params))


def stored_text(model: Model) -> str:
    """A list of the kernels and tables of a model by storage type."""
    kinds: dict[str, list[str]] = {}
    for name, leaf in trees.flatten(model.params).items():
        module, parameter = name.split("/")[-2:]
        if parameter in ("kernel", "embedding"):
            names = kinds.setdefault(str(leaf.dtype), [])
            names += [] if module in names else [module]
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
