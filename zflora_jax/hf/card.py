"""README.md of an export: the model, its training, and how to load it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.fields import to_dict
from zflora_jax.core.model import Model
from zflora_jax.hf.hub import HUB_IDS, is_hub_id, packaged
from zflora_jax.nn.quantize_model import is_quantized, stored_text


def project_version() -> str:
    """The version of this project, as exports record it."""
    try:
        return importlib.metadata.version("zflora-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0.0.0+source"


def base_name(model: Model) -> str | None:
    """The base's name in files that others read: its hub id, with "@revision" where one was given,
    else the last part of its path; None where it is not known.
    """
    if model.base is not None:
        return model.base or None
    source = model.source
    if source is None or source in HUB_IDS:
        return HUB_IDS.get(source or "")
    return source if is_hub_id(source) else Path(source).name


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
_NEEDS = (
    "The kernels are codes in the compressed-tensors format: `pip install compressed-tensors`.\n\n"
)
_BASE = "A {title} saved by zflora_jax, {change}."
_MERGED = (
    "A {title} fine-tuned by zflora_jax (method {method}), merged into the base kernels: a stock"
    " {stock} of the base's shape."
)
_FUSED = (
    "A {title} fine-tuned with a {method} adapter by zflora_jax. The adapter is fused: it lives in"
    " extra channels\nof the ordinary kernels, so this is a stock {stock} with slightly wider"
    " layers and needs no custom code."
)
_UNFUSED = (
    "\nzflora_jax can take the adapter out again (`load_model`, then `unfuse`), which gives back"
    " {base}."
)
_SOURCE = "\nThe method is a reconstruction of {source}, not the paper's own code."


def model_card(model: Model, report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """The README.md of an export, with the hub's metadata on top.

    Args:
      model: The exported model.
      report: Report of the export: "parameters", "dtype"; "quant" of quantised kernels.
      rows: More rows of the table, such as {"accuracy after": 0.71}.
    """
    base, adapter, file = base_name(model), model.adapter, packaged(model.source or "")
    title = base or model.config.traits.title
    origin = f", as the blocks of {file.name} store it" if file else ""
    table = {
        "base": f"{base or 'not recorded'}{origin}",
        "parameters": f"{report['parameters']:,}",
        "dtype": report["dtype"],
        **({"kernels": report["quant"]} if "quant" in report else {}),
        **_adapter_rows(model),
        **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows.items()},
    }
    bars = {key: str(value).replace("|", "\\|") for key, value in table.items()}
    return _CARD.format(
        hub=f"base_model: {base.partition('@')[0]}\n" if base and "/" in base else "",
        title=f"{title}, {adapter.method} adapter fused in" if adapter else title,
        description=_description(model, report),
        table="\n".join(f"| {key} | {value} |" for key, value in bars.items()),
        needs=_NEEDS if "quant" in report else "",
    )


def _description(model: Model, report: Mapping[str, Any]) -> str:
    family, quantised = model.config.traits, "quant" in report
    if model.adapter is None:
        change = "with quantised kernels" if quantised else "unchanged but for its dtype"
        return _BASE.format(title=family.title, change=change)
    method = model.adapter.method
    row = METHODS[method]
    text = _FUSED if row.widens else _MERGED
    text = text.format(method=method, title=family.title, stock=family.architecture)
    if row.widens and not quantised:
        base = "the base model bit for bit"
        if is_quantized(model):
            base = f"the base in {report['dtype']}, as its codes ({stored_text(model)}) define it"
        text += _UNFUSED.format(base=base)
    return text + _SOURCE.format(source=row.source) if row.source else text


def _adapter_rows(model: Model) -> dict[str, Any]:
    if model.adapter is None:
        return {}
    c, settings = model.config, to_dict(model.adapter)
    rows = {f"adapter.{key}": value for key, value in settings.items() if value is not None}
    widths = f"{c.hidden_size}, {c.head_dim}, {c.intermediate_size}"
    return rows | {"widths: residual, head, MLP": widths}
