"""Describes a run, a LoRA adapter, an export or a model. Only headers are read, no weights."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.widths import count_params
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import ConfigError, to_dict
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.storage import as_path
from zflora_jax.experiments.run_report import read_report
from zflora_jax.hf.directory import local_copy
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.hub import packaged
from zflora_jax.hf.load import model_config
from zflora_jax.hf.peft import CONFIG, WEIGHTS, refuse_pickled
from zflora_jax.hf.restore import MANIFEST, read_export
from zflora_jax.hf.shards import Shards, read_json
from zflora_jax.reporting.metrics import METRICS_FILE, read_metrics
from zflora_jax.training.workdir import STARTS_FILE, read_config, saved_steps

Facts = dict[str, Any]

_SHAPE = (
    *("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings", "sliding_window"),
)
_PEFT = ("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora")


def describe(path: str | os.PathLike[str]) -> Facts:
    """Describes a directory, a file or a preset.

    Args:
      path: A run, an adapter, an export or a model; or a preset's name.

    Returns:
      Facts by name, scalars only. "kind" comes first: "run", "adapter (PEFT)", "export", "model" or
      "model (GGUF)". "widths" are those of the three streams, base -> fused.

    Raises:
      ConfigError: There is nothing of these kinds at the path; the message says what was found.
    """
    source = as_path(path).expanduser()
    # A model in a bucket is copied without its weights.
    there = source if (source / STARTS_FILE).is_file() else local_copy(path, ["*.json", WEIGHTS])
    return _described(there, os.fspath(path)) | {"path": str(source)}


def _described(there: Path, path: str) -> Facts:
    if not there.is_dir():
        return _model(path)
    if (there / MANIFEST).is_file():
        return _export(there)
    if (there / CONFIG).is_file():
        return _peft(there)
    if (there / "config.json").is_file():
        is_run = {"adapter", "train"} <= set(read_json(there / "config.json"))
        return _run(there) if is_run else _model(path)
    found = ", ".join(sorted(p.name for p in there.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"{path} is no run and no model (config.json), no adapter ({CONFIG}) and no export"
        f" ({MANIFEST}); it holds {found}."
    )


def _run(workdir: Path) -> Facts:
    run = read_config(workdir)
    facts: Facts = {
        "kind": "run",
        "base": run.model,
        "base stored as": ", ".join(f"{k} {v}" for k, v in to_dict(run.quantize).items()),
        "task": run.data.task,
        "dtype": run.train.dtype,
        "seed": run.train.seed,
        "learning rate": run.optim.learning_rate,
        **_settings(run.adapter),
    }
    try:
        base = model_config(run.model)
        facts["widths"] = _widths(vars(base), fused_config(base, run.adapter))
        facts["trainable parameters"] = count_params(base, run.adapter)
        facts["base parameters"] = count_base(base)
    except ValueError as error:  # the base has been moved
        facts["widths"] = f"unknown: {error}"
    steps = saved_steps(workdir)
    facts["steps"] = f"{steps[-1] if steps else 0} of {run.steps} saved"
    facts["checkpoints"] = ", ".join(map(str, steps)) or "none"
    if (workdir / METRICS_FILE).is_file():
        for record in read_metrics(workdir / METRICS_FILE):  # the newest of each split stays
            if record.get("loss") is not None:
                facts[f"{record['split']} loss"] = f"{record['loss']:.4f} at step {record['step']}"
    if (report := read_report(workdir)) is None:
        return facts | {"report": "none: the run has not finished"}
    report |= report.get("environment", {})
    names = ("seconds", "base_fingerprint", "data_fingerprint", "commit", "device", "date")
    return facts | {name: report.get(name) for name in names}


def _export(directory: Path) -> Facts:
    export = read_export(directory, quantised=True)
    base, native = export.base, export.native_config
    facts: Facts = {"kind": "export", "dtype": export.dtype, "kernels": export.quant}
    if export.adapter is not None:
        facts |= _settings(export.adapter) | {"widths": _widths(vars(base), native)}
    facts |= {"base": base.name, **(export.figures or {})}
    codes = base.codes_fingerprint
    facts |= {"codes_fingerprint": codes} if codes else {"base_fingerprint": base.fingerprint}
    facts |= {"padding of hidden_size": export.padding, **_shape(native)}
    return facts | {"parameters": count_base(export.form.config)}


def _peft(directory: Path) -> Facts:
    refuse_pickled(directory)
    settings = read_json(directory / CONFIG)
    shown = {name: settings[name] for name in _PEFT if name in settings}
    shapes = Shards(directory, [WEIGHTS]).shapes.values()
    facts = {"kind": "adapter (PEFT)"} | shown | {"parameters": sum(map(math.prod, shapes))}
    return {k: ", ".join(v) if isinstance(v, list) else v for k, v in facts.items()}


def _model(source: str) -> Facts:
    config, file = model_config(source), packaged(source) or Path(source).expanduser()
    facts: Facts = {"kind": "model", **_shape(config), "parameters": count_base(config)}
    if file.suffix == ".gguf" and file.is_file():
        types = Counter(tensor.type.name for tensor in GGUFFile(file).tensors.values())
        facts |= {"kind": "model (GGUF)", "file": file.name}
        facts["tensors"] = ", ".join(f"{count} {name}" for name, count in types.most_common())
    return facts


def _shape(config: LlamaConfig) -> Facts:
    return {"family": config.traits.title, **{name: getattr(config, name) for name in _SHAPE}}


def _settings(adapter: AdapterConfig) -> Facts:
    """The settings that say most, and those that are not at their default."""
    facts = {name: getattr(adapter, name) for name in ("method", "rank", "scale", "targets")}
    usual = vars(AdapterConfig(adapter.method))
    for name, value in vars(adapter).items():
        if value != usual[name] and name not in (*facts, "alpha"):
            facts[name] = str(dict(value) if name.endswith("_pattern") else value)
    return facts


def _widths(base: Mapping[str, Any], fused: LlamaConfig) -> str:
    """The widths of the three streams, base -> fused. base: The fields of its config."""
    fields = {"residual": "hidden_size", "head": "head_dim", "MLP": "intermediate_size"}
    return ", ".join(
        f"{name} {base[field]} -> {getattr(fused, field)}" for name, field in fields.items()
    )
