"""PEFT's LoRA directories (adapter_config.json, adapter_model.safetensors), written and read.

PEFT computes y = x W^T + s (x A^T) B^T with A [r, in] and B [out, r]. Native factors are the
transposes, stacked over the layers: lora_a [L, in, r] and lora_b [L, r, out].
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, group, kernel_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import export_target, local_copy, whole_directory
from zflora_jax.hf.keys import as_finite
from zflora_jax.hf.load import HUB_IDS
from zflora_jax.hf.peft_settings import CONFIG, ModuleLora, module_name, read_settings
from zflora_jax.hf.shards import Shards
from zflora_jax.parallel.distributed import on_main
from zflora_jax.reporting.files import write_json

WEIGHTS, WRITER = "adapter_model.safetensors", "zflora_jax"


def _tensor(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def save_peft(
    path: str | os.PathLike[str], model: Model, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, Any]:
    """Write LoRA adapters as a PEFT directory that peft and vLLM load.

    Args:
      path: the directory to write. An earlier export of this function is replaced; a directory with
        any other file is refused. Of processes that share the adapters process 0 writes.
      model: the base that the adapters were trained on; its source (a preset's hub id) becomes
        base_model_name_or_path.
      adapter: of method "lora".
      adapters: {"layers": {"attn": {"q": {"lora_a" [L, in, r], "lora_b" [L, r, out]}}, ...}}, or
        one subtree per layer; float32.

    Returns:
      {"path", "parameters", "files", "rank"}; a rank above 16 needs vLLM's --max-lora-rank.

    Raises:
      ConfigError: the method is not "lora".
      ValueError: adapters are missing, unexpected, misshapen or not finite.
    """
    from safetensors.numpy import save_file

    target = export_target(path)
    if adapter.method != "lora":
        raise ConfigError(
            f"method {adapter.method!r} has no PEFT form: PEFT's directories hold LoRA. Fuse the"
            " adapter into the model and use save_hf."
        )
    config = model.config.replace(scan_layers="layers" in adapters, packed=False)
    expected = {
        name: np.empty(shape, np.void) for name, shape in adapter_shapes(config, adapter).items()
    }
    trees.check_like(adapters, trees.unflatten(expected), "adapters of method 'lora'")
    kernels = tuple(resolve_adapter(config, adapter).blocks)
    tensors = _to_peft(config, adapters, kernels)

    def write() -> None:
        with whole_directory(target, _own_files, CONFIG) as staging:
            write_json(staging / CONFIG, _settings(model, adapter, kernels))
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt", "writer": WRITER})

    on_main(write)
    return {
        "path": str(target),
        "parameters": sum(t.size for t in tensors.values()),
        "files": [CONFIG, WEIGHTS],
        "rank": adapter.rank,
    }


def _to_peft(
    config: LlamaConfig, adapters: trees.Tree, kernels: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The adapters under PEFT's names, transposed, float32."""
    layers = trees.unstack_layers(adapters, config.num_layers)
    tensors = {}
    for layer in range(config.num_layers):
        for kernel in kernels:
            for factor in "AB":
                leaf = layers[f"layers_{layer}"][group(kernel)][kernel][f"lora_{factor.lower()}"]
                value = trees.on_host(leaf).astype(np.float32)
                name = _tensor(module_name(layer, kernel), factor)
                tensors[name] = np.ascontiguousarray(value.T)
    return tensors


def _settings(model: Model, adapter: AdapterConfig, kernels: tuple[str, ...]) -> dict[str, Any]:
    """adapter_config.json."""
    alpha = adapter.scale * adapter.divisor
    return ({"use_rslora": True} if adapter.use_rslora else {}) | {
        "base_model_name_or_path": HUB_IDS.get(model.source or "", model.source),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "revision": None,
        "target_modules": sorted(f"{kernel}_proj" for kernel in kernels),
        "task_type": "CAUSAL_LM",
    }


def _own_files(directory: Path) -> set[str] | None:
    """The files of an earlier `save_peft`, recognised by the writer in the tensors' metadata; None
    for any other directory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / WEIGHTS, "numpy") as file:
            return {CONFIG, WEIGHTS} if (file.metadata() or {}).get("writer") == WRITER else None
    except (OSError, SafetensorError):
        return None


def load_peft(path: str | os.PathLike[str], model: Model) -> tuple[AdapterConfig, trees.Tree]:
    """Read a PEFT LoRA directory as native adapters.

    Ranks and scales that differ between modules (rank_pattern, alpha_pattern) become one
    AdapterConfig: factors are padded with zeros to the largest rank, and where scales differ, each
    is folded into its B. Modules and layers that the directory does not adapt get zeros.

    Args:
      path: the directory, or its URL.
      model: the base that the adapters are for.

    Returns:
      (The adapter's config, the adapters in float32, their layers stacked if the model's are.)

    Raises:
      ConfigError: native LoRA cannot express a setting (DoRA, bias, modules_to_save, ...), or a
        pattern matches no module.
      CheckpointError: a file cannot be read, or tensors are missing, unexpected, misshapen for this
        model or not finite.
    """
    directory = local_copy(path)
    if not directory.is_dir():
        raise CheckpointError(f"no PEFT directory at {directory}.")
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory} holds pickled weights (adapter_model.bin), which can run code when read;"
            " save it again with safe_serialization=True."
        )
    config = model.config
    settings, modules = read_settings(directory, config)
    shards = Shards(directory, [WEIGHTS])
    expected = [_tensor(module, factor) for module in modules for factor in "AB"]
    if diff := trees.difference(expected, shards.shapes):
        raise CheckpointError(
            f"{directory / WEIGHTS} does not hold the tensors that {CONFIG} announces for this"
            f" {config.num_layers}-layer model:\n{diff}"
        )
    adapter = _adapter_config(settings, modules)
    leaves = _to_native(shards, config, adapter, modules)
    tree = trees.map_with_names(lambda _, leaf: jnp.asarray(leaf), trees.unflatten(leaves))
    return adapter, tree if config.execution.scan_layers else trees.unstack_layers(
        tree, config.num_layers
    )


def _kernels(modules: Mapping[str, ModuleLora]) -> list[str]:
    """The kernels that are adapted in any layer, in the order of KERNELS."""
    adapted = {module.split(".")[-1].removesuffix("_proj") for module in modules}
    return [kernel for kernel in KERNELS if kernel in adapted]


def _scale(modules: Mapping[str, ModuleLora]) -> float:
    """The scale of all modules; 1 where they differ."""
    scales = {module.scale for module in modules.values()}
    return scales.pop() if len(scales) == 1 else 1.0


def _adapter_config(
    settings: Mapping[str, Any], modules: Mapping[str, ModuleLora]
) -> AdapterConfig:
    """One config for all modules, with the largest of their ranks."""
    rank = max(module.rank for module in modules.values())
    scale, kernels = _scale(modules), _kernels(modules)
    named = {"all": set(KERNELS), "attention": set(ATTENTION), "mlp": set(MLP)}
    targets = next((name for name, of in named.items() if of == set(kernels)), "|".join(kernels))
    found = AdapterConfig(
        *("lora", rank, 1.0, targets),
        dropout=settings.get("lora_dropout") or 0.0,
        use_rslora=bool(settings.get("use_rslora")),
    )
    return found.replace(alpha=scale * found.divisor)


def _to_native(
    shards: Shards,
    config: LlamaConfig,
    adapter: AdapterConfig,
    modules: Mapping[str, ModuleLora],
) -> dict[str, np.ndarray]:
    """The stacked native leaves, float32, zeros where a module is not adapted."""
    what = str(shards.directory / WEIGHTS)
    leaves = {
        name: np.zeros(shape, np.float32)
        for name, shape in adapter_shapes(config.replace(scan_layers=True), adapter).items()
    }
    for layer in range(config.num_layers):
        for kernel in _kernels(modules):
            module = module_name(layer, kernel)
            if module not in modules:
                continue
            rank, scale = modules[module]
            inputs, outputs = (math.prod(axes) for axes in kernel_shapes(config)[kernel])
            for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = _tensor(module, factor)
                if shards.shapes[name] != shape:
                    raise CheckpointError(
                        f"{what}: {name} has shape {shards.shapes[name]}, expected {shape} for this"
                        f" model and {CONFIG}."
                    )
                value = as_finite(shards.read(name), np.float32, name, what).T
                leaf = leaves[f"layers/{group(kernel)}/{kernel}/lora_{factor.lower()}"]
                if factor == "A":
                    leaf[layer, :, :rank] = value
                else:
                    leaf[layer, :rank, :] = value * np.float32(scale / _scale(modules))
    return leaves
