"""PEFT's LoRA directories (adapter_config.json, adapter_model.safetensors), written and read.

PEFT computes y = x W^T + s (x A^T) B^T with A [r, in] and B [out, r]. Native factors are the
transposes, stacked over the layers: lora_a [L, in, r] and lora_b [L, r, out].
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.adapters.methods import live_layers, resolve_adapter
from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import OF_BASE, AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, group, kernel_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import export_target, local_copy, whole_directory
from zflora_jax.hf.hub import HUB_IDS, fetched, is_hub_id, not_here, packaged
from zflora_jax.hf.keys import as_finite
from zflora_jax.hf.peft_settings import CONFIG, ModuleLora, module_name, read_settings
from zflora_jax.hf.shards import Shards
from zflora_jax.parallel.distributed import on_main
from zflora_jax.reporting.files import write_json

WEIGHTS, WRITER = "adapter_model.safetensors", "zflora_jax"


def peft_name(module: str, leaf: str) -> str:
    """PEFT's name of a leaf: lora_a, lora_b or magnitude."""
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    return f"base_model.model.{module}.{names.get(leaf, 'lora_magnitude_vector')}"


def _leaves(dora: bool) -> tuple[str, ...]:
    """The leaves of a module that PEFT's files hold."""
    return ("lora_a", "lora_b", "magnitude") if dora else ("lora_a", "lora_b")


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
      ConfigError: the method is not "lora", or the adapters start as a part of the base.
      ValueError: adapters are missing, unexpected, misshapen or not finite.
    """
    from safetensors.numpy import save_file

    target = export_target(path)
    require(
        adapter.init not in OF_BASE,
        f"adapter.init={adapter.init!r} was taken out of the base, which readers load whole:"
        " convert the adapters with zf.plain_lora(adapter, adapters, start), start being those of"
        " zf.split_base, and give the model before it was split.",
    )
    if adapter.use_dora or adapter.rank_pattern or adapter.alpha_pattern:
        warnings.warn(
            "vLLM refuses PEFT directories with use_dora, and ignores rank_pattern and"
            " alpha_pattern: for it, fuse the adapter and use save_hf.",
            stacklevel=2,
        )
    if adapter.method != "lora":
        raise ConfigError(
            f"method {adapter.method!r} has no PEFT form: PEFT's directories hold LoRA. Fuse the"
            " adapter into the model and use save_hf."
        )
    if (file := packaged(model.source or "")) is not None:
        warnings.warn(
            f"the adapter was trained beside the numbers of {file.name}, whose blocks have fewer"
            f" bits than the weights of {HUB_IDS[str(model.source)]}, which readers will load.",
            stacklevel=2,
        )
    kernels = tuple(resolve_adapter(model.config, adapter).blocks)
    tensors = peft_tensors(model.config, adapter, adapters)

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


def peft_tensors(
    config: LlamaConfig, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, np.ndarray]:
    """LoRA adapters under PEFT's names, transposed, float32.

    Args:
      config: of the base.
      adapter: of method "lora".
      adapters: as for `save_peft`.

    Raises:
      ValueError: adapters are missing, unexpected, misshapen or not finite.
    """
    config = config.replace(scan_layers="layers" in adapters, packed=False)
    expected = {
        name: np.empty(shape, np.void) for name, shape in adapter_shapes(config, adapter).items()
    }
    trees.check_like(adapters, trees.unflatten(expected), "adapters of method 'lora'")
    layers = trees.unstack_layers(adapters, config.num_layers)
    tensors = {}
    for kernel, blocks in live_layers(config, adapter).items():
        for layer in blocks["lora_a"]:
            own = {
                name: trees.on_host(leaf).astype(np.float32)
                for name, leaf in layers[f"layers_{layer}"][group(kernel)][kernel].items()
            }
            for leaf in _leaves(adapter.use_dora):
                name = peft_name(module_name(layer, kernel), leaf)
                tensors[name] = np.ascontiguousarray(own[leaf].T)
    return tensors


def _settings(model: Model, adapter: AdapterConfig, kernels: tuple[str, ...]) -> dict[str, Any]:
    """adapter_config.json."""

    def alpha(scale: float, rank: int) -> float:
        found = scale * adapter.divisor_of(rank)
        return int(found) if found == int(found) else found

    source, revision = model.base or "", ""
    if model.base is None:
        source = HUB_IDS.get(model.source or "", model.source or "")
    if is_hub_id(source):
        source, _, revision = source.partition("@")
    rank = adapter.rank
    ranks = {f"{k}_proj": adapter.rank_of(k) for k in kernels}
    alphas = {name: alpha(adapter.scale_of(name[:-5]), r) for name, r in ranks.items()}
    whole = alpha(adapter.scale, rank)
    layers = adapter.layers_to_transform
    special = {
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "layers_to_transform": None if layers is None else list(layers),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != whole},
    }
    return {name: value for name, value in special.items() if value} | {
        "base_model_name_or_path": source or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": whole,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision or None,
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

    Ranks, scales and layers that are the same for all modules of a kernel become those of the
    AdapterConfig. Others (a rank_pattern or alpha_pattern of single layers) become one rank and one
    scale: factors are padded with zeros to the largest rank, and where scales differ, each is
    folded into its B; modules and layers that the directory does not adapt get zeros.

    Args:
      path: the directory, its URL, or its hub id "org/name" or "org/name@revision".
      model: the base that the adapters are for.

    Returns:
      (The adapter's config, the adapters in float32, their layers stacked if the model's are.)

    Raises:
      ConfigError: native LoRA cannot express a setting (bias, modules_to_save, DoRA of some layers,
        ...), or a pattern matches no module.
      CheckpointError: a file cannot be read, or tensors are missing, unexpected, misshapen for this
        model or not finite.
    """
    name = os.fspath(path)
    on_hub, files = is_hub_id(name), [CONFIG, "adapter_model.*"]
    directory = fetched(name, files, not_here(name)) if on_hub else local_copy(path)
    if not directory.is_dir():
        found = "that is a file" if directory.is_file() else "nothing is there"
        raise CheckpointError(
            f"no PEFT directory at {path}: {found}. Give the directory that peft's save_pretrained"
            f" wrote, with {CONFIG} and {WEIGHTS} in it, or its URL."
        )
    refuse_pickled(directory)
    config = model.config
    settings, modules = read_settings(directory, config)
    shards = Shards(directory, [WEIGHTS])
    leaves = _leaves(bool(settings.get("use_dora")))
    expected = [peft_name(module, leaf) for module in modules for leaf in leaves]
    if diff := trees.difference(expected, shards.shapes):
        raise CheckpointError(
            f"{directory / WEIGHTS} does not hold the tensors that {CONFIG} announces for this"
            f" {config.num_layers}-layer model:\n{diff}"
        )
    adapter = _adapter_config(directory, settings, modules, config.num_layers)
    native = _to_native(shards, config, adapter, modules)
    tree = jax.device_put(trees.unflatten(native))
    return adapter, tree if config.execution.scan_layers else trees.unstack_layers(
        tree, config.num_layers
    )


def refuse_pickled(directory: Path) -> None:
    """CheckpointError for an adapter whose weights are pickled."""
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory} holds pickled weights (adapter_model.bin), which can run code when read;"
            " save it again with safe_serialization=True."
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
    directory: Path, settings: Mapping[str, Any], modules: Mapping[str, ModuleLora], count: int
) -> AdapterConfig:
    """One config for all modules, with the largest of their ranks; `count` layers."""
    rank, kernels = max(module.rank for module in modules.values()), _kernels(modules)
    names = {k: {module_name(i, k): i for i in range(count)} for k in kernels}
    of_kernel = {k: {n: i for n, i in names[k].items() if n in modules} for k in kernels}
    adapted = {tuple(found.values()) for found in of_kernel.values()}
    loras = {kernel: {modules[name] for name in of_kernel[kernel]} for kernel in kernels}
    regular = len(adapted) == 1 and all(
        len(found) == 1 and lora.scale > 0 for found in loras.values() for lora in found
    )
    dora = bool(settings.get("use_dora"))
    require(
        not dora or adapted == {tuple(range(count))},
        f"{directory / CONFIG}: use_dora=True for some layers alone is not supported; merge the"
        " adapter into its base with peft and load the result.",
    )
    named = {"all": set(KERNELS), "attention": set(ATTENTION), "mlp": set(MLP)}
    targets = next((name for name, of in named.items() if of == set(kernels)), "|".join(kernels))
    found = AdapterConfig(
        *("lora", rank, 1.0, targets),
        dropout=settings.get("lora_dropout") or 0.0,
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=dora,
    )
    if not regular:
        return found.replace(alpha=_scale(modules) * found.divisor)
    layers, own = adapted.pop(), {kernel: loras[kernel].pop() for kernel in kernels}
    alphas = {k: lora.scale * found.divisor_of(lora.rank) for k, lora in own.items()}
    alpha = next(alphas[k] for k, lora in own.items() if lora.rank == rank)
    return found.replace(
        alpha=alpha,
        layers_to_transform=None if layers == tuple(range(count)) else layers,
        rank_pattern=tuple((k, lora.rank) for k, lora in own.items() if lora.rank != rank),
        alpha_pattern=tuple((k, a) for k, a in alphas.items() if a != alpha),
    )


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
            ratio = np.float32(scale / adapter.scale_of(kernel))
            shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, rank), "magnitude": (outputs,)}
            for leaf_name in _leaves(adapter.use_dora):
                name, shape = peft_name(module, leaf_name), shapes[leaf_name]
                if shards.shapes[name] != shape:
                    raise CheckpointError(
                        f"{what}: {name} has shape {shards.shapes[name]}, expected {shape} for this"
                        f" model and {CONFIG}."
                    )
                value = as_finite(shards.read(name), np.float32, name, what).T
                leaf = leaves[f"layers/{group(kernel)}/{kernel}/{leaf_name}"]
                if leaf_name == "lora_b":
                    value = value * ratio
                leaf[layer][tuple(slice(0, n) for n in value.shape)] = value
    return leaves
