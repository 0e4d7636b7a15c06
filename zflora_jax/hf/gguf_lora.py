"""LoRA adapters as a GGUF file, which llama.cpp applies beside a base (--lora)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.methods import live_layers
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.trees import Tree
from zflora_jax.hf.card import base_name, project_version
from zflora_jax.hf.gguf_form import GGUFForm, gguf_form
from zflora_jax.hf.gguf_names import gguf_name
from zflora_jax.hf.gguf_save import MARK, add_value, check_path, whole_file
from zflora_jax.hf.keys import as_finite
from zflora_jax.hf.peft import module_name, peft_name, peft_tensors
from zflora_jax.parallel.distributed import on_main


def save_gguf_lora(
    out: str | os.PathLike[str], model: Model, adapter: AdapterConfig, adapters: Tree
) -> dict[str, Any]:
    """Write LoRA adapters as a GGUF file for llama.cpp.

    It goes with a GGUF file of the base, of whatever types. Factors are float32. llama.cpp has one
    alpha for all of them; where a kernel has another scale, its B is multiplied. Factors that began
    as a part of the base (PiSSA, OLoRA) have twice the rank, as in `save_peft`.

    Args:
      out: the file to write, *.gguf. An existing one is replaced only if this project wrote it. Of
        processes that share the adapters process 0 writes.
      model: the base that the adapters were trained on.
      adapter: of method "lora".
      adapters: as for `save_peft`.

    Returns:
      {"path", "parameters", "tensors", "bytes"}.

    Raises:
      ConfigError: the method is not "lora", it is DoRA, the base's GGUF file has other widths, or
        `out` is no *.gguf.
      CheckpointError: the file must not be replaced or cannot be written.
      ValueError: adapters are missing, unexpected, misshapen or not finite.
    """
    target = on_main(lambda: check_path(out)) or Path(out)
    form = gguf_form(model, "float32")
    _require_taken(form, adapter)
    tensors = _tensors(form, adapter, adapters)
    settings = {
        "general.type": "adapter",
        "general.name": f"{base_name(model) or form.config.traits.title} lora",
        "adapter.type": "lora",
        # llama.cpp multiplies by alpha over the rank of each B; see `_tensors`.
        "adapter.lora.alpha": float(adapter.scale * adapter.rank),
        MARK: project_version(),
        "zflora.method": adapter.method,
    }

    def write() -> int:
        from gguf import GGUFWriter

        with whole_file(target) as temporary:
            writer = GGUFWriter(temporary, form.architecture)
            try:
                for key, value in settings.items():
                    add_value(writer, key, value)
                for name, tensor in tensors.items():
                    writer.add_tensor(name, tensor)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            finally:
                writer.close()
        return target.stat().st_size

    size = on_main(write)
    parameters = sum(tensor.size for tensor in tensors.values())
    report = {"path": str(target), "parameters": parameters, "tensors": len(tensors)}
    return report if size is None else report | {"bytes": size}


def _require_taken(form: GGUFForm, adapter: AdapterConfig) -> None:
    require(
        adapter.method == "lora" and not adapter.use_dora,
        f"{'DoRA' if adapter.use_dora else f'method {adapter.method!r}'} has no form beside a base"
        " in llama.cpp, which adds LoRA products alone. Fuse the adapter and export the model"
        " (--format gguf).",
    )
    wide, own = form.config, form.model_config
    widths = {
        "hidden": (own.hidden_size, wide.hidden_size),
        "MLP": (own.intermediate_size, wide.intermediate_size),
    }
    filled = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in widths.items() if a != b)
    require(
        not filled,
        f"the base's GGUF file has wider streams than the adapters ({filled}), as blocks of 32"
        " need. Merge the adapters and export the model (--format gguf).",
    )


def _tensors(form: GGUFForm, adapter: AdapterConfig, adapters: Tree) -> dict[str, np.ndarray]:
    """GGUF name -> A [r, in] or B [out, r], rows of q and k in llama.cpp's order."""
    factors = peft_tensors(form.model_config, adapter, adapters)
    alpha, found = adapter.scale * adapter.rank, {}
    for kernel, blocks in live_layers(form.model_config, adapter).items():
        for layer in blocks["lora_a"]:
            module = module_name(layer, kernel)
            a, b = (factors[peft_name(module, leaf)] for leaf in ("lora_a", "lora_b"))
            factor = np.float32(adapter.scale_of(kernel) * len(a) / alpha)
            name = gguf_name(f"{module}.weight")
            found[f"{name}.lora_a"] = a
            found[f"{name}.lora_b"] = form.in_order(kernel, b * factor)
    for name, tensor in found.items():
        as_finite(tensor, np.float32, name, "the adapter")
    return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}
