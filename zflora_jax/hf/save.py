"""Exports: base or fused models as directories that stock transformers and vLLM load."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.methods import base_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base, param_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.card import base_name, model_card
from zflora_jax.hf.directory import export_target, whole_directory
from zflora_jax.hf.keys import as_finite, hf_table
from zflora_jax.hf.load import locate
from zflora_jax.hf.restore import FORMAT, MANIFEST, SIDE_FILE, SIDE_FOLDER, VERSION, read_manifest
from zflora_jax.hf.shards import INDEX, SINGLE
from zflora_jax.hf.state_scale import scales_state
from zflora_jax.hf.stock import StockForm, module_of, native_tensor, stock_form, to_stock
from zflora_jax.hf.tensor_file import write_tensors
from zflora_jax.hf.tokenizer import write_generation_config, write_tokenizer_files
from zflora_jax.parallel.distributed import from_process_0, on_main
from zflora_jax.reporting.files import write_json

DTYPES = ("float32", "bfloat16", "float16")


def save_hf(
    path: str | os.PathLike[str],
    model: Model,
    *,
    dtype: str | None = None,
    base_fingerprint: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    card: Mapping[str, Any] | None = None,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """Write a base or fused model as a directory of its family's stock class (LlamaForCausalLM,
    Qwen3ForCausalLM, ...; transformers 4.57 and 5, vLLM).

    The directory appears whole or not at all. An existing one is replaced only if it is an export
    of this project with nothing added to it; any other is left alone and refused. Processes that
    share the model call this together: they gather one tensor of one layer at a time, and process 0
    writes it.

    Args:
      path: the directory to write, or its URL (s3://, gs://).
      model: not packed; its layers may be stacked or not.
      dtype: of the stored tensors, "float32", "bfloat16" or "float16"; None: the parameters' own.
        Arithmetic is in float32, and each tensor is cast once.
      base_fingerprint: `trees.fingerprint` of the base's parameters, for zflora.json. Where the
        method widens it is computed from the model; the methods lora, ffa and full need it given.
      max_shard_bytes: size limit of a file, in bytes.
      card: figures for README.md and zflora.json, such as {"accuracy after": 0.71}.
      eps_z: scale of the stored residual state, a power of two from 2^-10 to 1. None: the largest
        that disturbs the logits less than rounding to `dtype`, estimated from the weights. Software
        that quantises to int8 by channel or token needs at least 2^-4.

    Returns:
      {"path", "dtype", "parameters", "widths", "bytes", "files"}; with a residual state "eps_z".

    Raises:
      ConfigError: the model is packed, or dtype or eps_z cannot be used.
      CheckpointError: a value is not finite in `dtype`, or the directory must not be replaced.
    """
    target = export_target(path)
    dtype = dtype or str(trees.flatten(model.params)["embed/embedding"].dtype)
    require(dtype in DTYPES, f"dtype={dtype!r}: exports are {', '.join(DTYPES)}.")
    require(max_shard_bytes >= 1, f"max_shard_bytes={max_shard_bytes}: must be at least 1.")
    form = stock_form(model, dtype, eps_z)
    report: dict[str, Any] = {"path": str(target), "dtype": dtype} | _sizes(form)
    with contextlib.ExitStack() as stack:
        # None in all processes but the one that writes; they help to gather the tensors.
        whole = whole_directory(target, _own_files, MANIFEST)
        staging = on_main(lambda: stack.enter_context(whole))
        hf_config, tensor = to_stock(model, form, dtype)
        _write_tensors(staging, form.config, tensor, dtype, max_shard_bytes)
        _write_side_file(staging, model, form, dtype)
        base = base_fingerprint or _base_fingerprint(model)
        manifest = _manifest(model, form, dtype, base) | {"figures": dict(card or {})}
        report |= on_main(lambda: _finish(staging, model, hf_config, report, manifest)) or {}
        on_main(stack.close)  # now it is in its place, or uploaded
    return from_process_0(report)


def _finish(
    folder: Path | None,
    model: Model,
    hf_config: Mapping[str, Any],
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write what is beside the tensors; last the manifest, with the list of files. Returns that
    list, and their bytes.
    """
    assert folder is not None  # of process 0
    write_json(folder / "config.json", hf_config)
    text = model_card(model, report, manifest["figures"])
    (folder / "README.md").write_text(text, encoding="utf-8")
    _write_companions(folder, model)
    written = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    files = sorted([*written, MANIFEST])
    write_json(folder / MANIFEST, {**manifest, "files": files})
    return {"bytes": sum((folder / name).stat().st_size for name in files), "files": files}


def _sizes(form: StockForm) -> dict[str, Any]:
    """What a report says of the stored model."""
    sizes = {"parameters": count_base(form.config), "widths": _widths(form.config)}
    return sizes | {"eps_z": form.eps_z} if scales_state(form.native) else sizes


def _widths(config: LlamaConfig) -> str:
    """The stored widths, with a note on those that are not a multiple of GGUF's blocks of 32."""
    inputs = {
        "hidden": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "MLP": config.intermediate_size,
    }
    odd = [name for name, width in inputs.items() if width % 32]
    advice = (
        f"; {', '.join(odd)}: no multiple of 32, as GGUF's blocks want (zflora export --format"
        " gguf fills them)"
        if odd
        else ""
    )
    return (
        f"hidden {config.hidden_size}, heads {config.num_heads} x {config.head_dim}, MLP"
        f" {config.intermediate_size}{advice}"
    )


def _own_files(directory: Path) -> set[str] | None:
    """The files that an export of this project wrote into `directory`, by its own list; None for
    any other directory.
    """
    try:
        files = read_manifest(directory).get("files")
    except CheckpointError:
        return None
    return {str(name) for name in files} if isinstance(files, list) else None


# --- tensors --------------------------------------------------------------------------------------


def _write_tensors(
    folder: Path | None,
    config: LlamaConfig,
    tensor: Callable[[str], np.ndarray],
    dtype: str,
    limit: int,
) -> None:
    """Write model.safetensors, or shards with an index; nothing where `folder` is None."""
    itemsize = np.dtype(dtype).itemsize
    shapes = {name: place.hf_shape for name, place in hf_table(config).items()}
    sizes = {name: int(np.prod(shape)) * itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > limit:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path = None if folder is None else folder / file
        write_tensors(path, {n: shapes[n] for n in names}, dtype, tensor, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(sizes.values())
    if len(shards) > 1 and folder is not None:
        write_json(
            folder / INDEX,
            {
                "metadata": {"total_parameters": total // itemsize, "total_size": total},
                "weight_map": weight_map,
            },
        )


def _write_side_file(folder: Path | None, model: Model, form: StockForm, dtype: str) -> None:
    """Store the native numbers that stock form rounds, so that `load_model` restores them bit for
    bit: norm gains, and where heads are widened q and its bias, or k's norm.
    """

    table = hf_table(model.config).items()
    shapes = {name: place.hf_shape for name, place in table if form.restored(module_of(place))}
    if not shapes:
        return

    def tensor(name: str) -> np.ndarray:
        place, x = native_tensor(model, name)
        return as_finite(place.to_hf(x), np.dtype(dtype), name, "the model")

    path = None if folder is None else folder / SIDE_FOLDER / SIDE_FILE
    if path is not None:
        path.parent.mkdir()
    write_tensors(path, shapes, dtype, tensor)


# --- files beside the tensors ---------------------------------------------------------------------


def _base_of(model: Model) -> LlamaConfig | None:
    """The config of the base whose numbers the model holds unchanged; None where a merge by
    addition has changed them.
    """
    if model.adapter is None:
        return model.config
    widened = METHODS[model.adapter.method].widens
    return base_config(model.config, model.adapter) if widened else None


def _base_fingerprint(model: Model) -> str | None:
    """Of the base, in the corner of wide leaves. Processes that share the model call this."""
    base = _base_of(model)
    return None if base is None else trees.fingerprint(model.params, param_shapes(base))


def _manifest(
    model: Model, form: StockForm, dtype: str, base_fingerprint: str | None
) -> dict[str, Any]:
    base = _base_of(model) or model.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "project_version": project_version(),
        "dtype": dtype,
        "adapter": None if model.adapter is None else to_dict(model.adapter),
        "base": {
            "name": base_name(model),
            "hidden_size": base.hidden_size,
            "head_dim": base.head_dim,
            "intermediate_size": base.intermediate_size,
            "fingerprint": base_fingerprint,
        },
        "native_config": model.config.flat(),
        "padding": form.width - model.config.hidden_size,
        "eps_z": form.eps_z,
    }


def project_version() -> str:
    """The version of this project, as exports record it."""
    try:
        return importlib.metadata.version("zflora-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0.0.0+source"


def _write_companions(folder: Path, model: Model) -> None:
    """Write the tokenizer files and generation_config.json: the base's, as far as the model still
    has the base's tokenizer and stop tokens.
    """
    base: Path | None = None
    if model.source is not None:
        try:
            base = locate(model.source)[0]
        except CheckpointError:  # moved away, or the hub cannot be reached
            base = None
    base = base if base is not None and base.is_dir() else None
    write_tokenizer_files(folder, model.tokenizer, base)
    values = {"bos_token_id": model.config.bos_token_id, "pad_token_id": model.config.pad_token_id}
    write_generation_config(folder, base, values, model.config.eos_token_ids)
