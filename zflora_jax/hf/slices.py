"""The part of an export that an adapter adds, as a file for a server that runs another task of the
same base (docs/serve.md).

A kernel [out, in] of an export is the base's except for the rows that write an adapter's channels
and the columns that read them. In widened heads these lie in several ranges.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from zflora_jax import __version__
from zflora_jax.adapters.methods import base_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, kernel_shapes, param_shapes
from zflora_jax.core.fields import ConfigError, require, require_in
from zflora_jax.core.model import Model, require_there
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.keys import hf_table
from zflora_jax.hf.restore import WIDTHS
from zflora_jax.hf.save import DTYPES, own_dtype
from zflora_jax.hf.stock import HFContent, StockForm, choose_eps_z, module_of, to_stock
from zflora_jax.nn.quantize_model import is_quantized
from zflora_jax.parallel.distributed import on_main
from zflora_jax.reporting.files import atomic_write, local_path

FORMAT, VERSION, SUFFIX = "zflora_jax slices", 1, ".safetensors"


def save_slices(
    path: str | os.PathLike[str],
    model: Model,
    *,
    dtype: str | None = None,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """Writes the rows and columns that a fused adapter adds to the kernels of an export, as the
    tensors NAME.rows [rows, in] and NAME.columns [out, columns] of one safetensors file.

    A server can load it if its export has the same base, method, widths, dtype and eps_z. Processes
    that share the model call this together; process 0 writes.

    Args:
      path: The file, whose name ends in .safetensors.
      model: A fused model with float kernels.
      dtype: Data type of the export, see `save_hf`.
      eps_z: Scale of the export's residual state, see `save_hf`; None: chosen from the weights. All
        tasks of one server need the same value: give the smallest of theirs.

    Returns:
      {"path", "dtype", "eps_z", "sha256", "own_eps_z": the one chosen from the weights, "bytes"}.

    Raises:
      ConfigError: The model has no adapter that widens it, is packed or quantised, or a setting
        cannot be used.
      CheckpointError: A value is not finite in `dtype`.
    """
    from safetensors.numpy import save

    target, adapter = slices_target(path), _fused_adapter(model)
    dtype = dtype or own_dtype(model)
    require_in(DTYPES, dtype, f"dtype={dtype!r}")
    stored = to_stock(model, dtype, eps_z)
    base = base_config(model.config, adapter)
    added = added_lines(stored.form, base)
    tensors = _cut(stored, added)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "project_version": __version__,
        "method": adapter.method,
        "dtype": dtype,
        "eps_z": stored.form.eps_z,
        "widths": {name: getattr(model.config, name) for name in WIDTHS},
        "base": trees.fingerprint(model.params, param_shapes(base)),
        "rows": {name: ranges(rows) for name, (rows, _) in added.items()},
        "columns": {name: ranges(columns) for name, (_, columns) in added.items()},
    }
    facts["sha256"] = digest(facts, tensors)
    data = save(tensors, {"zflora": json.dumps(facts)})
    on_main(lambda: atomic_write(target, data))
    report = {"path": str(target)} | {key: facts[key] for key in ("dtype", "eps_z", "sha256")}
    return report | {"own_eps_z": choose_eps_z(model, dtype), "bytes": len(data)}


def _fused_adapter(model: Model) -> AdapterConfig:
    """The adapter whose rows and columns a model's float kernels have."""
    require_there(model.params)
    adapter = model.adapter
    if adapter is None or not METHODS[adapter.method].widens:
        raise ConfigError(
            "slices are the channels that a widening method adds, and this model has"
            f" {adapter and adapter.method}: fuse one, such as 'zflora-minimal'."
        )
    require(not is_quantized(model), "slices of a quantised base are not written: export it whole.")
    return adapter


def _cut(
    stored: HFContent, added: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    tensors = dict[str, np.ndarray]()
    for name, (rows, columns) in added.items():
        x = stored.tensor(name)
        tensors |= {f"{name}.rows": x[rows], f"{name}.columns": x[:, columns]}
    return {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}


def digest(facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) over the facts, and names, shapes, dtypes and values of tensors."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, x in tensors.items():
        found.update(f"{name} {x.shape} {x.dtype}".encode() + x.tobytes())
    return found.hexdigest()


def slices_target(path: str | os.PathLike[str]) -> Any:
    """The path of the file; ConfigError for another name."""
    target = local_path(path, "out")
    require(
        target.suffix == SUFFIX and not target.is_dir(),
        f"out={os.fspath(path)!r}: slices are a file whose name ends in {SUFFIX}.",
    )
    return target


def added_lines(form: StockForm, base: LlamaConfig) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor of every kernel -> its rows and its columns that are not the base's, sorted."""
    native, table = kernel_shapes(form.native), hf_table(form.config)
    of_base = kernel_shapes(base)
    by_kernel = dict[str, tuple[np.ndarray, np.ndarray]]()
    for kernel in KERNELS:
        inputs, outputs = native[kernel]
        marks = []
        for axis, width in enumerate(of_base[kernel]):  # of inputs, of outputs
            mark = np.zeros(inputs + outputs, np.float32)
            at = len(inputs) - 1 if axis == 0 else mark.ndim - 1
            mark[(slice(None),) * at + (slice(width[-1], None),)] = 1
            marks.append(mark)
        name = next(n for n, place in table.items() if module_of(place) == kernel)
        reads, writes = (form.stored(name, mark) != 0 for mark in marks)
        by_kernel[kernel] = np.flatnonzero(writes.any(1)), np.flatnonzero(reads.any(0))
    modules = {name: module_of(place) for name, place in table.items()}
    return {name: by_kernel[kernel] for name, kernel in modules.items() if kernel in by_kernel}


def ranges(lines: np.ndarray) -> list[list[int]]:
    """Sorted numbers as [start, stop) ranges."""
    parts = np.split(lines, np.flatnonzero(np.diff(lines) > 1) + 1)
    return [[int(part[0]), int(part[-1]) + 1] for part in parts if len(part)]
