"""Exports: base or fused models as directories that stock transformers and vLLM load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.fuse import unfuse
from zflora_jax.adapters.methods import base_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base, param_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.compressed import compressed
from zflora_jax.hf.directory import export_target, whole_directory
from zflora_jax.hf.hub import base_name, locate, packaged, project_version
from zflora_jax.hf.keys import as_finite, hf_table
from zflora_jax.hf.restore import FORMAT, MANIFEST, SIDE_FILE, SIDE_FOLDER, VERSION, read_manifest
from zflora_jax.hf.shards import INDEX, SINGLE, tensor_bytes, write_tensors
from zflora_jax.hf.stock import StockForm, Stored, module_of, native_tensor, to_stock
from zflora_jax.hf.tokenizer import write_generation_config, write_tokenizer_files
from zflora_jax.nn.quantize_model import is_quantized, stored_text
from zflora_jax.ops.quantized import QuantizedArray
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
    quant: str | None = None,
) -> dict[str, Any]:
    """Writes a base or fused model as a directory of its family's stock class (LlamaForCausalLM,
    ...; transformers 4.57 and 5, vLLM).

    The directory appears whole or not at all, and replaces only an export of this project with
    nothing added. Processes that share the model call this together: they gather one tensor of one
    layer at a time, and process 0 writes it.

    Args:
      path: The directory to write, or its URL (s3://, gs://).
      model: A model that is not packed; its layers may be stacked or not.
      dtype: Data type of the stored tensors, "float32", "bfloat16" or "float16"; None: the
        parameters' own. Arithmetic is in float32, cast once.
      base_fingerprint: `trees.fingerprint` of the base's parameters, for zflora.json: computed for
        methods that widen, to be given for lora, ffa and full. For a quantised base exported as
        floats it is recorded as codes_fingerprint.
      max_shard_bytes: Size limit of a file, in bytes.
      card: Figures for README.md and zflora.json, such as {"accuracy after": 0.71}.
      eps_z: Scale of the stored residual state, a power of two from 2^-10 to 1. None: the largest
        that disturbs the logits less than rounding to `dtype`, estimated from the weights. Tools
        that quantise an export to int8 by channel or token need at least 2^-4.
      quant: "int8", "w8a8", "int4", "int4-g32", "int4-g64" or "int4-g128" (`compressed.QUANTS`):
        kernels as codes, in a directory that `load_model` does not read. None: as floats.

    Returns:
      {"path", "dtype", "parameters", "widths", "filled with zeros", "bytes", "files"}; "eps_z"
      where there is a state; with `quant` also "quant" and its groups.

    Raises:
      ConfigError: The model is packed, its family cannot be stored so, or a setting cannot be used.
      CheckpointError: A value is not finite in `dtype`, or the directory must not be replaced.
    """
    target = export_target(path)
    dtype = dtype or _own_dtype(model)
    require(dtype in DTYPES, f"dtype={dtype!r}: exports are {', '.join(DTYPES)}.")
    require(max_shard_bytes >= 1, f"max_shard_bytes={max_shard_bytes}: must be at least 1.")
    stored = compressed(model, quant, dtype, eps_z) if quant else to_stock(model, dtype, eps_z)
    report: dict[str, Any] = {"path": str(target), "dtype": dtype, **stored.report}
    with contextlib.ExitStack() as stack:
        # None in all processes but the one that writes; they help to gather the tensors.
        whole = whole_directory(target, _own_files, MANIFEST)
        staging = on_main(lambda: stack.enter_context(whole))
        _write_shards(staging, stored, max_shard_bytes)
        if quant is None:
            _write_side_file(staging, model, stored.form, dtype)
        manifest = _manifest(model, stored, dtype, base_fingerprint or _base_fingerprint(model))
        manifest |= {"figures": dict(card or {})}
        report |= on_main(lambda: _finish(staging, model, stored.config, report, manifest)) or {}
        on_main(stack.close)  # now it is in its place, or uploaded
    return from_process_0(report)


def _finish(
    folder: Path | None,
    model: Model,
    hf_config: Mapping[str, Any],
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes all files but the tensors', the manifest last; returns its list of files, and their
    bytes.
    """
    assert folder is not None  # in process 0
    write_json(folder / "config.json", hf_config)
    text = model_card(model, report, manifest["figures"])
    (folder / "README.md").write_text(text, encoding="utf-8")
    try:
        base = None if model.source is None else locate(model.source)[0]
    except CheckpointError:  # moved away, or the hub cannot be reached
        base = None
    base = base if base is not None and base.is_dir() else None
    write_tokenizer_files(folder, model.tokenizer, base)
    values = {"bos_token_id": model.config.bos_token_id, "pad_token_id": model.config.pad_token_id}
    write_generation_config(folder, base, values, model.config.eos_token_ids)
    written = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    files = sorted([*written, MANIFEST])
    write_json(folder / MANIFEST, {**manifest, "files": files})
    return {"bytes": sum((folder / name).stat().st_size for name in files), "files": files}


def _own_dtype(model: Model) -> str:
    """The dtype of the parameters; of the activations if the embedding is stored as codes."""
    table = model.params["embed"]["embedding"]
    return model.config.execution.dtype if isinstance(table, QuantizedArray) else str(table.dtype)


def _own_files(directory: Path) -> set[str] | None:
    """The files that an export lists in its manifest; None for any other directory."""
    try:
        files = read_manifest(directory).get("files")
    except CheckpointError:
        return None
    return {str(name) for name in files} if isinstance(files, list) else None


def _write_shards(folder: Path | None, stored: Stored, limit: int) -> None:
    """Writes model.safetensors, or shards with an index; nothing where `folder` is None."""
    specs, total, room = stored.specs, 0, 0
    shards: list[list[str]] = []
    for name, spec in specs.items():
        size = tensor_bytes(spec)
        if not shards or room < size:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room, total = room - size, total + size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path = None if folder is None else folder / file
        write_tensors(path, {n: specs[n] for n in names}, stored.tensor, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1 and folder is not None:
        metadata = {"total_parameters": count_base(stored.form.config), "total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _write_side_file(folder: Path | None, model: Model, form: StockForm, dtype: str) -> None:
    """Stores the native floats that stock form rounds, for `load_model`: norm gains, and where
    heads are widened q and its bias, or k's norm.
    """
    table = hf_table(model.config).items()
    specs = {n: (place.hf_shape, dtype) for n, place in table if form.restored(module_of(place))}
    if not specs:
        return

    def tensor(name: str) -> np.ndarray:
        place, x = native_tensor(model, name)
        return as_finite(place.to_hf(x), np.dtype(dtype), name, "the model")

    path = None if folder is None else folder / SIDE_FOLDER / SIDE_FILE
    if path is not None:
        path.parent.mkdir()
    write_tensors(path, specs, tensor)


def _base_of(model: Model) -> LlamaConfig | None:
    """The config of the base that the model holds unchanged; None if a merge has changed it."""
    if model.adapter is None:
        return model.config
    widened = METHODS[model.adapter.method].widens
    return base_config(model.config, model.adapter) if widened else None


def _base_fingerprint(model: Model) -> str | None:
    """The base's, in the corner of wide leaves. Processes call this together."""
    base = _base_of(model)
    if base is None:
        return None
    if is_quantized(model):  # codes and scales have corners of several shapes
        own = model if model.adapter is None else unfuse(model)[0]
        return trees.fingerprint(own.params)
    return trees.fingerprint(model.params, param_shapes(base))


def _manifest(
    model: Model, stored: Stored, dtype: str, base_fingerprint: str | None
) -> dict[str, Any]:
    """The content of zflora.json but for its figures and files."""
    base, form = _base_of(model) or model.config, stored.form
    fingerprints = {"fingerprint": base_fingerprint}
    if is_quantized(model) and "quant" not in stored.manifest:  # the base comes back as floats
        fingerprints = {"fingerprint": None, "codes_fingerprint": base_fingerprint}
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
            **fingerprints,
        },
        "native_config": to_dict(model.config),
        "padding": form.width - model.config.hidden_size,
        "eps_z": form.eps_z,
        **stored.manifest,
    }


# --- README.md ------------------------------------------------------------------------------------


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [zflora]
{hub}---

# {title}

{description}

| | |
|---|---|
{table}

{needs}```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("<this directory>")
tokenizer = AutoTokenizer.from_pretrained("<this directory>")
```

With vLLM: `vllm serve <this directory>`.

These weights derive from the base model; its licence and terms apply to them.
"""


def model_card(model: Model, report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """The README.md of an export. report: That of the export. rows: More rows of the table, such as
    {"accuracy after": 0.71}.
    """
    base, adapter, file = base_name(model), model.adapter, packaged(model.source or "")
    title, adapted, c = base or model.config.traits.title, dict[str, Any](), model.config
    if adapter:
        settings = to_dict(adapter).items()
        adapted = {f"adapter.{key}": value for key, value in settings if value is not None}
        widths = f"{c.hidden_size}, {c.head_dim}, {c.intermediate_size}"
        adapted["widths: residual, head, MLP"] = widths
    origin = f", as the blocks of {file.name} store it" if file else ""
    table = {
        "base": f"{base or 'not recorded'}{origin}",
        "parameters": f"{report['parameters']:,}",
        "dtype": report["dtype"],
        **({"kernels": report["quant"]} if "quant" in report else {}),
        **adapted,
        **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows.items()},
    }
    needs = "The kernels are codes in the compressed-tensors format:"
    needs += " `pip install compressed-tensors`.\n\n"
    bars = {key: str(value).replace("|", "\\|") for key, value in table.items()}
    return _CARD.format(
        hub=f"base_model: {base.partition('@')[0]}\n" if base and "/" in base else "",
        title=f"{title}, {adapter.method} adapter fused in" if adapter else title,
        description=_description(model, report),
        table="\n".join(f"| {key} | {value} |" for key, value in bars.items()),
        needs=needs if "quant" in report else "",
    )


def _description(model: Model, report: Mapping[str, Any]) -> str:
    family, quantised = model.config.traits, "quant" in report
    if model.adapter is None:
        change = "with quantised kernels" if quantised else "unchanged but for its dtype"
        return f"A {family.title} saved by zflora_jax, {change}."
    method = model.adapter.method
    row, stock = METHODS[method], f"a stock {family.architecture}"
    if row.widens:
        text = (
            f"A {family.title} fine-tuned with a {method} adapter by zflora_jax. The adapter is"
            f" fused: it lives in extra channels\nof the ordinary kernels, so this is {stock} with"
            " slightly wider layers and needs no custom code."
        )
    else:
        text = (
            f"A {family.title} fine-tuned by zflora_jax (method {method}), merged into the base"
            f" kernels: {stock} of the base's shape."
        )
    if row.widens and not quantised:
        base = "the base model bit for bit"
        if is_quantized(model):
            base = f"the base in {report['dtype']}, as its codes ({stored_text(model)}) define it"
        text += (
            "\nzflora_jax can take the adapter out again (`load_model`, then `unfuse`), which gives"
            f" back {base}."
        )
    if row.source:
        text += f"\nThe method is a reconstruction of {row.source}, not the paper's own code."
    return text
