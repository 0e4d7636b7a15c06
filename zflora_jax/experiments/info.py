"""Describe a directory or file: a run, a LoRA adapter, an export of this project, or a model.

Only headers are read, no weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.widths import count_params, width_advice
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import ConfigError, from_dict
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.experiments.run_report import read_report
from zflora_jax.hf.compressed import CODES
from zflora_jax.hf.directory import local_copy
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.hub import packaged
from zflora_jax.hf.load import model_config
from zflora_jax.hf.peft import CONFIG, WEIGHTS, refuse_pickled
from zflora_jax.hf.restore import MANIFEST, read_export, read_manifest
from zflora_jax.hf.shards import FLOATS, Shards, read_json
from zflora_jax.reporting.metrics import METRICS_FILE, read_metrics
from zflora_jax.training.workdir import STARTS_FILE, read_config, saved_steps

Facts = dict[str, Any]


def describe(path: str | os.PathLike[str]) -> Facts:
    """Describe a directory, a file or a preset.

    Args:
      path: of a run, an adapter, an export or a model; or a preset's name.

    Returns:
      Facts by name, scalars only. "kind" comes first: "run", "adapter (PEFT)", "export", "model" or
      "model (GGUF)". "widths" are those of the three streams, base -> fused.

    Raises:
      ConfigError: there is nothing of these kinds at the path; the message says what was found.
    """
    source = as_path(path).expanduser()
    # A model in a bucket is copied without its weights.
    there = source if (source / STARTS_FILE).is_file() else local_copy(path, weights=False)
    return _described(there, path) | {"path": str(source)}


def _described(source: Path, path: str | os.PathLike[str]) -> Facts:
    if source.is_dir():
        if (source / MANIFEST).is_file():
            return _export(source)
        if (source / CONFIG).is_file():
            return _peft(source)
        if (source / "config.json").is_file():
            settings = read_json(source / "config.json")
            return (
                _run(source)
                if "adapter" in settings and "train" in settings
                else _model(os.fspath(path), "model")
            )
        found = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{path} is no run and no model (config.json), no adapter ({CONFIG}) and no export"
            f" ({MANIFEST}); it holds {found}."
        )
    return _model(os.fspath(path), "model (GGUF)" if source.suffix == ".gguf" else "model")


def _shape(config: LlamaConfig) -> Facts:
    more: Facts = {}
    if config.sliding_window is not None:
        more["sliding window"] = config.sliding_window
    if config.nope_layers:
        more["layers without RoPE"] = len(config.nope_layers)
    return {
        "family": config.traits.title,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": f"{config.num_heads} of {config.head_dim}, {config.num_kv_heads} key/value",
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied embeddings": str(config.tie_word_embeddings).lower(),
    } | more


def _settings(adapter: AdapterConfig) -> Facts:
    """The settings that say most, and those that are not at their default."""
    facts: Facts = {name: getattr(adapter, name) for name in ("method", "rank", "scale", "targets")}
    usual = AdapterConfig(adapter.method)
    changed = {f.name for f in dataclasses.fields(adapter)} - facts.keys() - {"alpha"}
    for name in sorted(changed):
        if (value := getattr(adapter, name)) != getattr(usual, name):
            facts[name] = str(dict(value)) if name.endswith("_pattern") else str(value)
    return facts


def _widths(base: Mapping[str, Any], fused: LlamaConfig) -> str:
    """The widths of the three streams, base -> fused. base: the fields of its config."""
    fields = {"residual": "hidden_size", "head": "head_dim", "MLP": "intermediate_size"}
    return ", ".join(
        f"{name} {base[field]} -> {getattr(fused, field)}" for name, field in fields.items()
    )


def _adapter(adapter: AdapterConfig, base: LlamaConfig) -> Facts:
    widens = METHODS[adapter.method].widens
    facts = _settings(adapter) | {
        "widths": _widths(vars(base), fused_config(base, adapter)) if widens else "as the base's",
        "trainable parameters": count_params(base, adapter),
        "base parameters": count_base(base),
    }
    advice = width_advice(base, adapter)
    return facts | {f"on a {kind}": text for kind, text in advice.items()}


def _model(source: str, kind: str) -> Facts:
    config = model_config(source)
    facts = {"kind": kind, "path": source} | _shape(config) | {"parameters": count_base(config)}
    file = packaged(source) or Path(source).expanduser()
    return facts | _blocks(file) if file.suffix == ".gguf" and file.is_file() else facts


def _blocks(file: Path) -> Facts:
    """The types of the tensors of a .gguf file, most of which have few bits."""
    kinds = Counter(tensor.type.name for tensor in GGUFFile(file).tensors.values())
    return {"file": file.name, "tensors": ", ".join(f"{n} {k}" for k, n in kinds.most_common())}


def _export(directory: Path) -> Facts:
    manifest = read_manifest(directory)
    native = from_dict(LlamaConfig, manifest["native_config"], f"{MANIFEST}: native_config")
    facts: Facts = {
        "kind": "export",
        "path": str(directory),
        "dtype": manifest["dtype"],
        "written by": f"zflora_jax {manifest['project_version']}",
    }
    if manifest["adapter"] is not None:
        adapter = from_dict(AdapterConfig, manifest["adapter"], f"{MANIFEST}: adapter")
        facts |= _settings(adapter) | {"widths": _widths(manifest["base"], native)}
    facts |= {"base": manifest["base"].get("name"), **manifest.get("figures", {})}
    if codes := manifest["base"].get("codes_fingerprint"):
        facts["fingerprint of the base's codes"] = codes
    else:
        facts["base fingerprint"] = manifest["base"]["fingerprint"]
    facts["padding of hidden_size"] = manifest["padding"]
    facts |= _shape(native)
    if (quant := manifest.get("quant")) is None:
        return facts | _weights(directory)
    held = _weights(directory, dtypes=(*FLOATS, *CODES))
    stock = read_export(directory, quantised=True).form.config
    return facts | held | {"kernels": quant, "parameters": count_base(stock)}


def _peft(directory: Path) -> Facts:
    refuse_pickled(directory)
    settings = read_json(directory / CONFIG)
    facts: Facts = {
        "kind": "adapter (PEFT)",
        "path": str(directory),
        "type": settings.get("peft_type"),
    }
    facts |= {
        "base": settings.get("base_model_name_or_path"),
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
    }
    targets = settings.get("target_modules")
    facts["targets"] = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    plain: Facts = {
        "use_rslora": False,
        "use_dora": False,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    facts |= {
        key: json.dumps(settings[key])
        for key, usual in plain.items()
        if settings.get(key, usual) not in (usual, None)
    }
    return facts | _weights(directory, [WEIGHTS])


def _weights(
    directory: Path, files: list[str] | None = None, dtypes: tuple[str, ...] = FLOATS
) -> Facts:
    shards = Shards(directory, files, dtypes)
    size = sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
    return {
        "tensors": len(shards.shapes),
        "parameters": sum(math.prod(shape) for shape in shards.shapes.values()),
        "safetensors, MB": size / 1e6,
    }


def _stored(how: QuantizeConfig) -> str:
    """How a run's base is stored, in words."""
    if not how.active:
        return "numbers"
    text = f"kernels {how.kernels}, embedding {how.embedding}, head {how.head}"
    return text if how.group is None else f"{text}, {how.group or 'all'} inputs a scale"


def _run(workdir: Path) -> Facts:
    run: RunConfig = read_config(workdir)
    facts: Facts = {
        "kind": "run",
        "path": str(workdir),
        "base": run.model,
        "base stored as": _stored(run.quantize),
        "task": run.data.task,
        "dtype": run.train.dtype,
        "seed": run.train.seed,
        "learning rate": run.optim.learning_rate,
    }
    try:
        facts |= _adapter(run.adapter, model_config(run.model))
    except (ConfigError, ValueError) as error:
        # The base has been moved; the settings of the run are still known.
        facts |= {
            "method": run.adapter.method,
            "rank": run.adapter.rank,
            "scale": run.adapter.scale,
            "widths": f"unknown: {error}",
        }
    steps = saved_steps(workdir)
    facts["steps"] = f"{steps[-1] if steps else 0} of {run.train.steps} saved"
    facts["checkpoints"] = ", ".join(map(str, steps)) or "none"
    if (workdir / METRICS_FILE).is_file():
        for record in read_metrics(workdir / METRICS_FILE):  # the newest of each split stays
            if record.get("loss") is not None:
                facts[f"{record['split']} loss"] = f"{record['loss']:.4f} at step {record['step']}"
    if report := read_report(workdir):
        facts |= {
            name.replace("_", " "): report[name]
            for name in ("seconds", "base_fingerprint", "data_fingerprint")
            if name in report
        }
        env = report.get("environment", {})
        facts |= {"commit": env.get("commit"), "device": env.get("device"), "date": env.get("date")}
    else:
        facts["report"] = "none: the run has not finished"
    return facts
