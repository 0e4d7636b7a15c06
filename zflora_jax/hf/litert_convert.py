"""Converts a Hugging Face directory into a LiteRT file: a process of `litert_save`, with torch.

Command: python -m zflora_jax.hf.litert_convert JOB (JSON; see `convert`). Written for litert-torch
0.10, whose steps are called one by one, because one of ours comes before them.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def convert(job: dict[str, Any]) -> None:
    """Convert a model.

    Args:
      job: {"model": the Hugging Face directory, "folder": where files may be left, "out": the file
        to write, *.litertlm or *.tflite, "recipe": of ai-edge-quantizer or None, "context": tokens
        that the cache holds, "prefill": tokens that are read at once}.
    """
    from litert_torch.generative.export_hf import export
    from litert_torch.generative.export_hf.core import (
        export_lib,
        exportable_module,
        litert_lm_builder,
    )

    bundle = job["out"].endswith(".litertlm")
    config = exportable_module.ExportableModuleConfig(
        model=job["model"],
        output_dir=job["folder"],
        work_dir=job["folder"],
        prefill_lengths=[job["prefill"]],
        cache_length=job["context"],
        quantization_recipe=job["recipe"],
    )
    tasks = [fix_rope, export_lib.export_text_prefill_decode_model]
    if bundle:
        tasks += [export_lib.export_tokenizer, litert_lm_builder.package_model]
    made = export.run_export_tasks(tasks, config)
    found = made.litert_lm_model_path if bundle else made.prefill_decode_model_path
    os.replace(found, job["out"])


def fix_rope(source: Any, config: Any, made: Any) -> Any:
    """A step of the conversion: longrope, which wider heads have, becomes a table of frequencies.
    transformers chooses between two tables at run time, which cannot be traced; in exports of this
    project both are the same.
    """
    for module in source.model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"
    return made


if __name__ == "__main__":
    convert(json.loads(sys.argv[1]))
