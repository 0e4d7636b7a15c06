"""README.md of an export: what the model is, how it was made, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.fields import to_dict
from zflora_jax.core.model import Model
from zflora_jax.hf.load import HUB_IDS


def base_name(model: Model) -> str | None:
    """What to call the base in files that others read: a hub id where there is one, else the last
    part of its path.
    """
    source = model.source
    if source is None or source in HUB_IDS:
        return HUB_IDS.get(source or "")
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return source if is_hub_id else Path(source).name


def model_card(model: Model, report: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    base, adapter, c = base_name(model), model.adapter, model.config
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [zflora]"]
    lines += [f"base_model: {base}"] if base and "/" in base else []
    lines += [
        "---",
        "",
        f"# {base or 'Llama'}{f', {adapter.method} adapter fused in' if adapter else ''}",
        "",
    ]
    if adapter is None:
        lines += ["A Llama saved by zflora_jax, unchanged but for its dtype."]
    elif METHODS[adapter.method].in_place == "none":
        lines += [
            (
                f"A Llama fine-tuned with a {adapter.method} adapter by zflora_jax. The adapter is"
                " fused: it lives in extra channels of the ordinary"
            ),
            (
                "kernels, so this is a stock LlamaForCausalLM with slightly wider layers and needs"
                " no custom code. zflora_jax can take the adapter out"
            ),
            "again (`load_model`, then `unfuse`), which gives back the base model bit for bit.",
            (
                "The method is a reconstruction of zFLoRA (arXiv 2510.25784), not the paper's own"
                " code."
            ),
        ]
    else:
        lines += [
            f"A Llama fine-tuned by zflora_jax (method {adapter.method}), merged into the base"
            " kernels: a stock LlamaForCausalLM of the base's shape."
        ]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| base | {base or 'not recorded'} |",
        f"| parameters | {report['parameters']:,} |",
        f"| dtype | {report['dtype']} |",
    ]
    if adapter is not None:
        lines += [
            f"| adapter.{key} | {value} |"
            for key, value in to_dict(adapter).items()
            if value is not None
        ]
        lines += [
            f"| widths: residual, head, MLP | {c.hidden_size}, {c.head_dim},"
            f" {c.intermediate_size} |"
        ]
    lines += [
        f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for key, value in rows.items()
    ]
    lines += [
        *[
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("<this directory>")',
        ],
        *[
            'tokenizer = AutoTokenizer.from_pretrained("<this directory>")',
            "```",
            "",
            "With vLLM: `vllm serve <this directory>`.",
            "",
        ],
        *["These weights derive from the base model; its licence and terms apply to them.", ""],
    ]
    return "\n".join(lines)
