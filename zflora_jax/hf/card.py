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
    else the last part of its path.

    Returns:
      None where the model has no source, or is of an export that does not know its base.
    """
    if model.base is not None:
        return model.base or None
    source = model.source
    if source is None or source in HUB_IDS:
        return HUB_IDS.get(source or "")
    return source if is_hub_id(source) else Path(source).name


def model_card(model: Model, report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """Write the README.md of an export.

    Args:
      model: the exported model.
      report: "parameters" and "dtype" of the export; "quant" where its kernels are codes.
      rows: more lines of the table, such as {"accuracy after": 0.71}.

    Returns:
      Markdown with the hub's metadata on top.
    """
    base, adapter = base_name(model), model.adapter
    hub = [f"base_model: {base.partition('@')[0]}"] if base and "/" in base else []
    title = f"# {base or model.config.traits.title}"
    title += f", {adapter.method} adapter fused in" if adapter else ""
    table = {
        "base": f"{base or 'not recorded'}{_as_packaged(model)}",
        "parameters": f"{report['parameters']:,}",
        "dtype": report["dtype"],
        **({"kernels": report["quant"]} if "quant" in report else {}),
        **_adapter_rows(model),
        **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows.items()},
    }
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [zflora]"),
        *(*hub, "---", "", title, "", *_description(model, report), ""),
        *("| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in table.items())),
        _USE.format(needs=_NEEDS if "quant" in report else ""),
    ]
    return "\n".join(lines)


def _as_packaged(model: Model) -> str:
    file = packaged(model.source or "")
    return f", of the numbers that the blocks of {file.name} stand for" if file else ""


def _cell(value: Any) -> str:
    """A bar, as of the targets "q|v", would end the cell."""
    return str(value).replace("|", "\\|")


_NEEDS = (
    "The kernels are codes in the compressed-tensors format: `pip install compressed-tensors`.\n\n"
)
_USE = """
{needs}```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("<this directory>")
tokenizer = AutoTokenizer.from_pretrained("<this directory>")
```

With vLLM: `vllm serve <this directory>`.

These weights derive from the base model; its licence and terms apply to them.
"""

_FUSED = """\
A {title} fine-tuned with a {method} adapter by zflora_jax. The adapter is fused: it lives in extra\
 channels of the ordinary
kernels, so this is a stock {stock} with slightly wider layers and needs no custom code."""
_UNFUSED = """\
zflora_jax can take the adapter out again (`load_model`, then `unfuse`), which gives back the base\
 model bit for bit."""

_UNFUSED_CODES = """\
The base was stored as codes ({stored}). zflora_jax can take the adapter out again (`load_model`,\
 then `unfuse`), which gives
back the numbers that these codes stand for, in {dtype}."""

_SOURCE = "The method is a reconstruction of {source}, not the paper's own code."

_MERGED = (
    "A {title} fine-tuned by zflora_jax (method {method}), merged into the base kernels: a stock"
    " {stock} of the base's shape."
)


def _description(model: Model, report: Mapping[str, Any]) -> list[str]:
    family, quantised = model.config.traits, "quant" in report
    if model.adapter is None:
        change = "with quantised kernels" if quantised else "unchanged but for its dtype"
        return [f"A {family.title} saved by zflora_jax, {change}."]
    method = model.adapter.method
    row = METHODS[method]
    text = (_FUSED if row.widens else _MERGED).format(
        method=method, title=family.title, stock=family.architecture
    )
    if row.widens and not quantised:
        codes = _UNFUSED_CODES.format(stored=stored_text(model), dtype=report["dtype"])
        text += f"\n{codes if is_quantized(model) else _UNFUSED}"
    return [text, _SOURCE.format(source=row.source)] if row.source else [text]


def _adapter_rows(model: Model) -> dict[str, Any]:
    if model.adapter is None:
        return {}
    c, settings = model.config, to_dict(model.adapter)
    rows = {f"adapter.{key}": value for key, value in settings.items() if value is not None}
    widths = f"{c.hidden_size}, {c.head_dim}, {c.intermediate_size}"
    return rows | {"widths: residual, head, MLP": widths}
