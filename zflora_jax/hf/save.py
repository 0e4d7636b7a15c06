"""Exports: base or fused models as directories that stock transformers and vLLM load."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax import __version__
from zflora_jax.adapters.fuse import unfuse
from zflora_jax.adapters.methods import base_config
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.architecture import count_base, param_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model, require_there
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.compressed import compressed
from zflora_jax.hf.directory import export_target, refuse_foreign, whole_directory
from zflora_jax.hf.hub import base_name, locate, packaged
from zflora_jax.hf.keys import as_finite, hf_table
from zflora_jax.hf.restore import FORMAT, MANIFEST, SIDE_FILE, WIDTHS, BaseFacts, Manifest
from zflora_jax.hf.shards import INDEX, read_json, tensor_bytes, write_tensors
from zflora_jax.hf.stock import HFContent, StockForm, module_of, native_tensor, round_up, to_stock
from zflora_jax.hf.tokenizer import write_generation_config, write_tokenizer_files
from zflora_jax.nn.quantize_model import is_quantized, stored_text
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel.distributed import from_process_0, on_main
from zflora_jax.reporting.files import write_json

DTYPES = ("float32", "bfloat16", "float16")
# vLLM's Qwen2 derives the head size from hidden_size; its Llama reads head_dim, and biases if asked
QWEN2_IN_VLLM = '{"architectures": ["LlamaForCausalLM"], "qkv_bias": true}'


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
    """Writes a base or fused model as a directory for transformers (4.57 and 5) and vLLM.

    The directory appears whole or not at all, and replaces only an export of this project with
    nothing added. Processes that share the model call this together: they gather one tensor of one
    layer at a time, and process 0 writes it.

    Args:
      path: The directory to write, or its URL (s3://, gs://).
      model: A model that is not packed; its layers may be stacked or not.
      dtype: Data type of the stored tensors, "float32", "bfloat16" or "float16"; None: that of the
        parameters. Arithmetic is in float32, cast once.
      base_fingerprint: `trees.fingerprint` of the base's parameters, for zflora.json. It is needed
        for lora, ffa and full, and computed for methods that widen.
      max_shard_bytes: Size limit of a file, in bytes.
      card: Figures for README.md and zflora.json, such as {"accuracy after": 0.71}.
      eps_z: Scale of the stored residual state, a power of two from 2^-10 to 1. None: the largest
        that disturbs the logits less than rounding to `dtype`, estimated from the weights. Tools
        that quantise an export to int8 by channel or token need at least 2^-4.
      quant: "int8", "w8a8" or "int4" (`compressed.QUANTS`): kernels as codes, in a directory that
        `load_model` does not read. None: as floats.

    Returns:
      {"path", "dtype", "parameters", "widths", "filled with zeros", "bytes", "files"}; also "eps_z"
      if there is a state, "misread by" if servers would miscompute the export, and "quant" if it
      is given.

    Raises:
      ConfigError: The model is packed or donated, or its family or a setting cannot be used.
      CheckpointError: A value is not finite in `dtype`, or the directory must not be replaced.
    """
    target = export_target(path)
    require_there(model.params)
    dtype = dtype or own_dtype(model)
    require(dtype in DTYPES, f"dtype={dtype!r}: exports are {', '.join(DTYPES)}.")
    stored = compressed(model, quant, dtype, eps_z) if quant else to_stock(model, dtype, eps_z)
    report: dict[str, Any] = {"path": str(target), "dtype": dtype, **stored.report}
    if wrong := misread(model):
        report["misread by"] = "; ".join(wrong)
    with contextlib.ExitStack() as stack:
        # None in all processes but the one that writes; they help to gather the tensors.
        whole = whole_directory(target, _own_files, MANIFEST)
        staging = on_main(lambda: stack.enter_context(whole))
        _write_shards(staging, stored, max_shard_bytes)
        if quant is None:
            _write_side_file(staging, model, stored.form, dtype)
        manifest = _manifest(model, stored, dtype, base_fingerprint, dict(card or {}))
        report |= on_main(lambda: _finish(staging, model, stored.config, report, manifest)) or {}
        on_main(stack.close)  # now it is in its place, or uploaded
    return from_process_0(report)


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError, before a model is loaded, if `save_hf` must not replace `path`."""
    refuse_foreign(export_target(path), _own_files, MANIFEST)


def _finish(
    folder: Path | None,
    model: Model,
    hf_config: Mapping[str, Any],
    report: Mapping[str, Any],
    manifest: Manifest,
) -> dict[str, Any]:
    """Writes all files except tensors, the manifest last; returns their names and bytes."""
    assert folder is not None  # in process 0
    write_json(folder / "config.json", hf_config)
    text = model_card(model, report, manifest.figures)
    (folder / "README.md").write_text(text, encoding="utf-8")
    base = None
    with contextlib.suppress(CheckpointError):  # moved away, or the hub cannot be reached
        base = None if model.source is None else locate(model.source)
    base = base if base is not None and base.is_dir() else None
    write_tokenizer_files(folder, model.tokenizer, base)
    values = {"bos_token_id": model.config.bos_token_id, "pad_token_id": model.config.pad_token_id}
    write_generation_config(folder, base, values, model.config.eos_token_ids)
    written = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    files = sorted([*written, MANIFEST])
    digests = {name: _digest(folder / name) for name in written if not _is_tensors(name)}
    manifest = replace(manifest, files=tuple(files), digests=digests)
    write_json(folder / MANIFEST, to_dict(manifest))
    return {"bytes": sum((folder / name).stat().st_size for name in files), "files": files}


def misread(model: Model) -> list[str]:
    """Lists the servers that refuse or miscompute an export that transformers reads correctly, with
    reasons. Checked were vLLM 0.32 (run), and the sources of tpu-inference b8692ff, sglang-jax
    cddbf6f and MaxText, with RoPE and norms of the first two run (docs/export.md).
    """
    config, found = model.config, []
    if options := serve_options(config):
        found.append(f"vLLM (refuses Qwen2's head size without {options})")
    heads, scaled = config.base_head_dim is not None, config.rope_scaling is not None
    qwen = config.family in ("qwen2", "qwen3")
    if heads and qwen and config.head_dim != 64 and config.head_dim % 128:
        found.append("vLLM on TPUs (Qwen's heads need 64 or 128 dims; set MODEL_IMPL_TYPE=vllm)")
    if scaled:
        found.append("sglang-jax (ignores Llama 3's RoPE scaling, of the base too)")
    elif heads and config.rope_theta < 1e5:
        found.append("sglang-jax (logits are 1% off at rope_theta below 1e5)")
    if model.adapter is not None and METHODS[model.adapter.method].widens:
        found.append("MaxText (takes widths and RoPE from its own table of models)")
    return found


def serve_options(config: LlamaConfig) -> str:
    """The options that `vllm serve` needs for an export of a native config; "" for none."""
    computed = round_up(config.hidden_size, config.num_heads) // config.num_heads
    other = config.family == "qwen2" and computed != config.head_dim
    return f"--hf-overrides '{QWEN2_IN_VLLM}'" if other else ""


def own_dtype(model: Model) -> str:
    """The dtype of the parameters; of the activations if the embedding is stored as codes."""
    table = model.params["embed"]["embedding"]
    return model.config.execution.dtype if isinstance(table, QuantizedArray) else str(table.dtype)


def _own_files(directory: Path) -> set[str] | None:
    """The unedited files in the manifest of an export; None for any other
    directory.
    """
    try:
        manifest = read_json(directory / MANIFEST)
    except CheckpointError:
        return None
    files, digests = manifest.get("files"), manifest.get("digests")  # the rest: any version's
    if manifest.get("format") != FORMAT or not files:
        return None

    def ours(name: str) -> bool:
        if not isinstance(digests, dict) or name == MANIFEST or _is_tensors(name):
            return True
        return (directory / name).is_file() and digests.get(name) == _digest(directory / name)

    return {name for name in map(str, files) if ours(name)}


def _is_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write_shards(folder: Path | None, stored: HFContent, limit: int) -> None:
    """Writes model.safetensors, or shards with an index; nothing if `folder` is None."""
    from huggingface_hub import split_state_dict_into_shards_factory as split

    pattern, specs = "model{suffix}.safetensors", dict(stored.specs)
    plan = split(
        specs, get_storage_size=tensor_bytes, filename_pattern=pattern, max_shard_size=limit
    )
    for file, names in plan.filename_to_tensors.items():
        path = None if folder is None else folder / file
        write_tensors(path, {n: specs[n] for n in names}, stored.tensor)
    if plan.is_sharded and folder is not None:
        metadata = {"total_parameters": count_base(stored.form.config), **plan.metadata}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": plan.tensor_to_filename})


def _write_side_file(folder: Path | None, model: Model, form: StockForm, dtype: str) -> None:
    """Stores the native floats that stock form rounds, for `load_model`."""
    table = hf_table(model.config).items()
    specs = {n: (place.hf_shape, dtype) for n, place in table if form.restored(module_of(place))}
    if not specs:
        return

    def tensor(name: str) -> np.ndarray:
        place, x = native_tensor(model, name)
        return as_finite(place.to_hf(x), np.dtype(dtype), name, "the model")

    path = None if folder is None else folder / SIDE_FILE
    if path is not None:
        path.parent.mkdir()
    write_tensors(path, specs, tensor)


def _manifest(
    model: Model, stored: HFContent, dtype: str, given: str | None, figures: dict[str, Any]
) -> Manifest:
    """The content of zflora.json without its files. given: Fingerprint of the base; None: that of
    the base that the model holds unchanged, if any. Processes call this together.
    """
    adapter, config, form = model.adapter, model.config, stored.form
    merged = adapter is not None and not METHODS[adapter.method].widens
    base = config if adapter is None or merged else base_config(config, adapter)
    if given is None and not merged:
        if is_quantized(model):  # codes and scales have corners of several shapes
            given = trees.fingerprint((model if adapter is None else unfuse(model)[0]).params)
        else:
            given = trees.fingerprint(model.params, param_shapes(base))
    fingerprints: tuple[str | None, ...] = (given,)
    if is_quantized(model) and "quant" not in stored.manifest:  # the base comes back as floats
        fingerprints = None, given
    facts = BaseFacts(base_name(model), *(getattr(base, name) for name in WIDTHS), *fingerprints)
    return Manifest(
        project_version=__version__,
        dtype=dtype,  # type: ignore[arg-type]
        adapter=adapter,
        base=facts,
        native_config=config,
        padding=form.width - config.hidden_size,
        eps_z=form.eps_z,
        figures=figures,
        **stored.manifest,
    )


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

Load it with transformers (`AutoModelForCausalLM.from_pretrained`) or vLLM (`{serve}`){needs}.

These weights derive from the base model; its licence and terms apply to them.
"""


def model_card(model: Model, report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """The README.md of an export, from its report and further rows of the table."""
    base, adapter, file = base_name(model), model.adapter, packaged(model.source or "")
    settings = {} if adapter is None else to_dict(adapter)
    title, quantised = base or model.config.traits.title, "quant" in report
    table = {
        "base": (base or "not recorded") + (f", as the blocks of {file.name}" if file else ""),
        "parameters": f"{report['parameters']:,}",
        "dtype": report["dtype"],
        "kernels": report.get("quant"),
        "widths": report.get("widths"),
        **{f"adapter.{key}": value for key, value in settings.items()},
        **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows.items()},
    }
    cells = {k: str(v).replace("|", "\\|") for k, v in table.items() if v is not None}
    return _CARD.format(
        hub=f"base_model: {base.partition('@')[0]}\n" if base and "/" in base else "",
        title=f"{title}, {adapter.method} adapter fused in" if adapter else title,
        description=_description(model, report),
        table="\n".join(f"| {k} | {v} |" for k, v in cells.items()),
        serve=f"vllm serve {serve_options(model.config)}".strip(),
        needs=", after `pip install compressed-tensors`" if quantised else "",
    )


def _description(model: Model, report: Mapping[str, Any]) -> str:
    family, stock = model.config.traits.title, f"a stock {model.config.traits.architecture}"
    if model.adapter is None:
        return f"A {family} saved by zflora_jax."
    row, text = METHODS[model.adapter.method], f"A {family} fine-tuned by zflora_jax"
    if not row.widens:
        return f"{text}, merged into the base's kernels: {stock} of the base's shape."
    text += (
        ". The adapter is fused: it lives in extra channels of the ordinary kernels, so this is"
        f" {stock} with slightly wider layers. The method is a reconstruction of {row.source}, not"
        " the paper's own code."
    )
    if "quant" in report:
        return text
    base = "the base model bit for bit"
    if is_quantized(model):
        base = f"the base in {report['dtype']}, as its codes ({stored_text(model)}) define it"
    return f"{text} zflora_jax takes it out again (`load_model`, `unfuse`), which gives {base}."
