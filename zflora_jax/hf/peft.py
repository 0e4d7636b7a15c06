"""PEFT's LoRA directories (adapter_config.json, adapter_model.safetensors), written and read.

PEFT computes y = x W^T + s (x A^T) B^T with A [r, in] and B [out, r]. Native factors are the
transposes, stacked over the layers: lora_a [L, in, r] and lora_b [L, r, out].
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.adapters.methods import adapter_shapes, live_layers, resolve_adapter
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import OF_BASE, AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, group, kernel_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import export_target, local_copy, whole_directory
from zflora_jax.hf.hub import HUB_IDS, fetched, is_hub_id, packaged
from zflora_jax.hf.keys import LAYER_NAMES, as_finite, check_shapes
from zflora_jax.hf.shards import Shards, read_json
from zflora_jax.parallel.distributed import on_main
from zflora_jax.reporting.files import write_json

CONFIG, WEIGHTS, WRITER = "adapter_config.json", "adapter_model.safetensors", "zflora_jax"
# Keys of adapter_config.json that are read or do not change the function. All other keys must be
# unset.
_KEYS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "bias"),
    *("lora_dropout", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "layers_pattern", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "ensure_weight_tying",
)
# Initialisations that move a part of the base into the adapter.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_MERGE = "Merge the adapter into its base with peft and load the result"


def _module(layer: int, kernel: str) -> str:
    """Hugging Face's name for a kernel's module: (0, "q") -> "model.layers.0.self_attn.q_proj"."""
    name = LAYER_NAMES[f"{group(kernel)}/{kernel}/kernel"].removesuffix(".weight")
    return f"model.layers.{layer}.{name}"


def _places(
    config: LlamaConfig, adapter: AdapterConfig
) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """PEFT's name -> (layer, native leaf of a layer, PEFT's shape) of every tensor."""
    places: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    for kernel, blocks in live_layers(config, adapter).items():
        inputs, outputs = (math.prod(axes) for axes in kernel_shapes(config)[kernel])
        rank, leaf = adapter.rank_of(kernel), f"{group(kernel)}/{kernel}"
        for layer in blocks["lora_a"]:
            module = f"base_model.model.{_module(layer, kernel)}"
            places[f"{module}.lora_A.weight"] = layer, f"{leaf}/lora_a", (rank, inputs)
            places[f"{module}.lora_B.weight"] = layer, f"{leaf}/lora_b", (outputs, rank)
            if adapter.use_dora:
                places[f"{module}.lora_magnitude_vector"] = layer, f"{leaf}/magnitude", (outputs,)
    return places


def save_peft(
    path: str | os.PathLike[str], model: Model, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, Any]:
    """Writes LoRA adapters as a PEFT directory, which peft and vLLM load.

    Args:
      path: The directory to write. Only an earlier export of this function is replaced. If several
        processes share the adapters, process 0 writes.
      model: The base of the adapters; its source (a preset's hub id) becomes
        base_model_name_or_path.
      adapter: Config of method "lora".
      adapters: Adapter tree, float32, stacked as {"layers": {"attn": {"q": {"lora_a" [L, in, r],
        "lora_b" [L, r, out]}}, ...}} or with one subtree per layer.

    Returns:
      {"path", "parameters", "files", "rank"}; a rank above 16 needs vLLM's --max-lora-rank.

    Raises:
      ConfigError: The adapters, or the family's kernels, have no PEFT form.
      ValueError: Adapters are missing, unexpected, misshapen or not finite.
    """
    from safetensors.numpy import save_file

    target = export_target(path)
    _check_writable(model, adapter)
    settings = _settings(model, adapter)
    tensors = _tensors(model.config, adapter, adapters)

    def write() -> None:
        with whole_directory(target, _own_files, CONFIG) as staging:
            write_json(staging / CONFIG, settings)
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt", "writer": WRITER})

    on_main(write)
    return {
        "path": str(target),
        "parameters": sum(t.size for t in tensors.values()),
        "files": [CONFIG, WEIGHTS],
        "rank": settings["r"],
    }


def _check_writable(model: Model, adapter: AdapterConfig) -> None:
    """Raises ConfigError for adapters without a PEFT form; warns of readers that lack support."""
    require(
        adapter.init not in OF_BASE,
        f"adapter.init={adapter.init!r} removed the start from the base, which readers load whole:"
        " convert the adapters with zf.plain_lora(adapter, adapters, start), where start are those"
        " of zf.split_base, and give the model before it was split.",
    )
    if adapter.use_dora or adapter.rank_pattern or adapter.alpha_pattern:
        warnings.warn(
            "vLLM refuses PEFT directories with use_dora, and ignores rank_pattern and"
            " alpha_pattern: for it, fuse the adapter and use save_hf.",
            stacklevel=3,
        )
    require(
        adapter.method == "lora",
        f"method {adapter.method!r} has no PEFT form: PEFT's directories hold LoRA. Fuse the"
        " adapter into the model and use save_hf.",
    )
    if (file := packaged(model.source or "")) is not None:
        warnings.warn(
            f"the adapter was trained with the weights of {file.name}, whose blocks have fewer"
            f" bits than those of {HUB_IDS[str(model.source)]}, which readers will load.",
            stacklevel=3,
        )


def _tensors(
    config: LlamaConfig, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, np.ndarray]:
    """Adapters with PEFT's names and layout; ValueError if they do not fit `adapter`."""
    config = config.replace(scan_layers="layers" in adapters, packed=False)
    shapes = adapter_shapes(config, adapter).items()
    expected = trees.unflatten({name: np.empty(shape, np.void) for name, shape in shapes})
    trees.check_like(adapters, expected, "adapters of method 'lora'")
    leaves = trees.flatten(trees.unstack_layers(adapters, config.num_layers))
    tensors = {}
    for name, (layer, leaf, _) in _places(config, adapter).items():
        value = trees.on_host(leaves.pop(f"layers_{layer}/{leaf}"))
        tensors[name] = np.ascontiguousarray(value.astype(np.float32).T)
    left = [n for n, x in leaves.items() if n.endswith("lora_b") and np.any(trees.on_host(x))]
    require(
        not left,
        f"{', '.join(left[:3])}: not zero, in layers that adapter.layers_to_transform leaves out of"
        " a PEFT file. Name these layers there, too.",
    )
    return tensors


def _settings(model: Model, adapter: AdapterConfig) -> dict[str, Any]:
    """The content of adapter_config.json."""
    source, revision = model.base or "", ""
    if model.base is None:
        source = HUB_IDS.get(model.source or "", model.source or "")
    if is_hub_id(source):
        source, _, revision = source.partition("@")
    found = adapter.scale * adapter.divisor_of(adapter.rank)
    alpha = int(found) if found == int(found) else found
    kernels = resolve_adapter(model.config, adapter).blocks
    ranks = {f"{k}_proj": adapter.rank_of(k) for k in kernels}
    alphas = {
        f"{k}_proj": adapter.scale_of(k) * adapter.divisor_of(adapter.rank_of(k)) for k in kernels
    }
    special = {
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "layers_to_transform": list(adapter.layers_to_transform or ()),
        "rank_pattern": {name: r for name, r in ranks.items() if r != adapter.rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }
    return {name: value for name, value in special.items() if value} | {
        **{"base_model_name_or_path": source or None, "bias": "none", "fan_in_fan_out": False},
        **{"inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha},
        **{"lora_dropout": adapter.dropout, "modules_to_save": None, "peft_type": "LORA"},
        **{"r": adapter.rank, "revision": revision or None, "target_modules": sorted(ranks)},
        "task_type": "CAUSAL_LM",
    }


def _own_files(directory: Path) -> set[str] | None:
    """The files of an earlier `save_peft`, by the writer in the tensors' metadata; else None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / WEIGHTS, "numpy") as file:
            return {CONFIG, WEIGHTS} if (file.metadata() or {}).get("writer") == WRITER else None
    except (OSError, SafetensorError):
        return None


def load_peft(path: str | os.PathLike[str], model: Model) -> tuple[AdapterConfig, trees.Tree]:
    """Reads a PEFT LoRA directory as native adapters.

    Args:
      path: The directory, its URL, or its hub id "org/name" or "org/name@revision".
      model: The base of the adapters.

    Returns:
      (The adapter's config, the adapters in float32, their layers stacked if the model's are.)

    Raises:
      ConfigError: Native LoRA cannot express a setting (bias, modules_to_save, other ranks in some
        layers, ...), or PEFT cannot adapt the family's kernels separately.
      CheckpointError: A file cannot be read, or tensors are missing, unexpected, misshapen for this
        model or not finite.
    """
    config = model.config
    directory = _find(os.fspath(path))
    settings, where = read_json(directory / CONFIG), str(directory / CONFIG)
    try:
        _refuse(where, settings)
        adapter = _adapter_config(where, settings, config.num_layers)
    # A list where a number belongs, a pattern that is not a regex, ...
    except (TypeError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"{where} has a setting of the wrong type ({error}); peft writes numbers, names and"
            " tables there."
        ) from None
    tree = jax.device_put(trees.unflatten(_to_native(directory, config, adapter)))
    scan = config.execution.scan_layers
    return adapter, tree if scan else trees.unstack_layers(tree, config.num_layers)


def _find(path: str) -> Path:
    """A local PEFT directory; CheckpointError if there is none."""
    find = fetched if is_hub_id(path) else local_copy
    directory = find(path, (CONFIG, "adapter_model.*", f"*/{CONFIG}"))
    _refuse_pickled(directory)
    if not (directory / CONFIG).is_file():
        named = ", ".join(sorted(str(file.parent) for file in directory.glob(f"*/{CONFIG}")))
        raise CheckpointError(
            f"no PEFT directory at {path}: it has no {CONFIG}. Give the directory that peft's"
            " save_pretrained wrote, or its URL"
            + (f"; its adapters have names: give {named}." if named else ".")
        )
    return directory


def _refuse_pickled(directory: Path) -> None:
    """Raises CheckpointError for an adapter whose weights are pickled."""
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory} holds pickled weights (adapter_model.bin), which can run code when read;"
            " save it again with safe_serialization=True."
        )


def _refuse(where: str, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting that native LoRA cannot express."""
    init = str(settings.get("init_lora_weights")).lower()
    fits = {key: value in (None, False, [], {}) for key, value in settings.items()}
    fits |= dict.fromkeys(_KEYS, True) | {
        "peft_type": settings.get("peft_type") == "LORA",
        "bias": settings.get("bias") in ("none", None),
        "init_lora_weights": not init.startswith(_CHANGES_BASE),
    }
    for key, fit in fits.items():
        require(
            fit,
            f"{where}: {key}={settings.get(key)!r} is not supported. {_MERGE}; or remove a key that"
            " does not change what the adapter computes.",
        )


def _chosen(settings: Mapping[str, Any], count: int) -> dict[tuple[int, str], str]:
    """(Layer, kernel) -> module, for the modules that PEFT's rules choose in `count` layers."""
    targets = settings.get("target_modules") or ["q_proj", "v_proj"]
    excluded = settings.get("exclude_modules") or []
    layers = settings.get("layers_to_transform")
    if layers in (None, []):  # PEFT: all
        layers = range(count)
    wanted = {layers} if isinstance(layers, int) else set(layers)

    def named(module: str, names: str | Iterable[str]) -> bool:
        if isinstance(names, str):
            return names == "all-linear" or re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    modules = {(i, k): _module(i, k) for i in range(count) for k in KERNELS if i in wanted}
    fits = {at: named(m, targets) and not named(m, excluded) for at, m in modules.items()}
    return {at: module for at, module in modules.items() if fits[at]}


def _adapter_config(where: str, settings: Mapping[str, Any], count: int) -> AdapterConfig:
    """The native config of PEFT's settings, for a model of `count` layers."""

    def value(module: str, table: str, key: str) -> Any:
        patterns = (settings.get(table) or {}).items()
        fits = (v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module))
        return next(fits, settings.get(key, 8))

    found: dict[str, dict[int, tuple[int, float]]] = {}  # kernel -> layer -> (rank, alpha)
    for (layer, kernel), module in _chosen(settings, count).items():
        rank = value(module, "rank_pattern", "r")
        alpha = value(module, "alpha_pattern", "lora_alpha")
        require(
            isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float),
            f"{where}: r={rank!r}, lora_alpha={alpha!r} of {module}: expected positive numbers.",
        )
        found.setdefault(kernel, {})[layer] = rank, float(alpha)
    require(
        bool(found),
        f"{where}: target_modules={settings.get('target_modules')!r} match no module of the base.",
    )
    layers = {tuple(of) for of in found.values()}
    require(
        len(layers) == 1 and all(len(set(of.values())) == 1 for of in found.values()),
        f"{where}: target_modules, rank_pattern or alpha_pattern differ between layers, and native"
        f" LoRA has one rank and alpha for a kernel in all layers that it adapts. {_MERGE}.",
    )
    every = layers == {tuple(range(count))}
    require(
        every or not settings.get("use_dora"),
        f"{where}: use_dora=True needs all layers here, and this adapter has only some. {_MERGE}.",
    )
    loras = {kernel: next(iter(of.values())) for kernel, of in found.items()}
    rank, alpha = max(loras.values(), key=lambda lora: lora[0])
    sets = {"all": set(KERNELS), "attention": set(ATTENTION), "mlp": set(MLP)}
    return AdapterConfig(
        *("lora", rank, alpha),
        targets=next((name for name, of in sets.items() if of == loras.keys()), "|".join(loras)),
        dropout=settings.get("lora_dropout") or 0.0,
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        layers_to_transform=None if every else layers.pop(),
        rank_pattern=tuple((kernel, r) for kernel, (r, _) in loras.items() if r != rank),
        alpha_pattern=tuple((kernel, a) for kernel, (_, a) in loras.items() if a != alpha),
    )


def _to_native(
    directory: Path, config: LlamaConfig, adapter: AdapterConfig
) -> dict[str, np.ndarray]:
    """The native leaves with stacked layers, float32; zeros in layers that are not adapted."""
    what, shards = str(directory / WEIGHTS), Shards(directory, [WEIGHTS])
    places = _places(config, adapter)
    check_shapes({name: shape for name, (*_, shape) in places.items()}, shards.shapes, what, CONFIG)
    native = adapter_shapes(config.replace(scan_layers=True), adapter).items()
    leaves = {name: np.zeros(shape, np.float32) for name, shape in native}
    for name, (layer, leaf, _) in places.items():
        leaves[f"layers/{leaf}"][layer] = as_finite(shards.read(name), np.float32, name, what).T
    return leaves
