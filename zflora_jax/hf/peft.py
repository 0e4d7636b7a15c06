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
from zflora_jax.core.families import require_format
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import export_target, local_copy, whole_directory
from zflora_jax.hf.hub import HUB_IDS, fetched, is_hub_id, not_here, packaged
from zflora_jax.hf.keys import LAYER_NAMES, as_finite
from zflora_jax.hf.shards import Shards, read_json
from zflora_jax.parallel.distributed import on_main
from zflora_jax.reporting.files import write_json

CONFIG, WEIGHTS, WRITER = "adapter_config.json", "adapter_model.safetensors", "zflora_jax"
_LEAVES = {
    **{"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
    "magnitude": "lora_magnitude_vector",
}
# Settings without a native counterpart: all values but None and empty ones are refused.
_UNSUPPORTED = (
    *("modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("velora_config", "monteclora_config", "arrow_config", "kasa_config"),
)
# Settings that this module reads, and those that do not change the function.
_KNOWN = (
    *("peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "bias"),
    *("lora_dropout", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "layers_pattern", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "ensure_weight_tying",
)
# Initialisations that move a part of the base into the adapter.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_NOT_LORA = ("lm_head", "model.embed_tokens")  # modules outside of the layers that peft may adapt
_MERGE = "merge the adapter into its base with peft and load the result"


_Loras = dict[tuple[int, str], tuple[int, float]]
"""(Layer, kernel) -> (rank, scale) of its LoRA: y += scale * B A x with `rank` rows of A."""


def _module_name(layer: int, kernel: str) -> str:
    """Hugging Face's name of a kernel's module: (0, "q") -> "model.layers.0.self_attn.q_proj"."""
    name = LAYER_NAMES[f"{group(kernel)}/{kernel}/kernel"].removesuffix(".weight")
    return f"model.layers.{layer}.{name}"


def _peft_name(layer: int, kernel: str, leaf: str) -> str:
    return f"base_model.model.{_module_name(layer, kernel)}.{_LEAVES[leaf]}"


def save_peft(
    path: str | os.PathLike[str], model: Model, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, Any]:
    """Writes LoRA adapters as a PEFT directory, which peft and vLLM load.

    Args:
      path: The directory to write. Only an earlier export of this function is replaced. Process 0
        of those that share the adapters writes.
      model: The base of the adapters; its source (a preset's hub id) becomes
        base_model_name_or_path.
      adapter: Config of method "lora".
      adapters: {"layers": {"attn": {"q": {"lora_a" [L, in, r], "lora_b" [L, r, out]}}, ...}}, or
        one subtree per layer; float32.

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
    """ConfigError for adapters without a PEFT form; warns of readers that lack something."""
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
            stacklevel=3,
        )
    require(
        adapter.method == "lora",
        f"method {adapter.method!r} has no PEFT form: PEFT's directories hold LoRA. Fuse the"
        " adapter into the model and use save_hf.",
    )
    require_format(model.config.family, "peft")
    if (file := packaged(model.source or "")) is not None:
        warnings.warn(
            f"the adapter was trained with the weights of {file.name}, whose blocks have fewer"
            f" bits than those of {HUB_IDS[str(model.source)]}, which readers will load.",
            stacklevel=3,
        )


def _tensors(
    config: LlamaConfig, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, np.ndarray]:
    """Adapters under PEFT's names, transposed, float32; ValueError if they are not those of
    `adapter`.
    """
    config = config.replace(scan_layers="layers" in adapters, packed=False)
    shapes = adapter_shapes(config, adapter).items()
    expected = trees.unflatten({name: np.empty(shape, np.void) for name, shape in shapes})
    trees.check_like(adapters, expected, "adapters of method 'lora'")
    layers = trees.unstack_layers(adapters, config.num_layers)
    tensors = {}
    for kernel, blocks in live_layers(config, adapter).items():
        for layer in blocks["lora_a"]:
            leaves = layers[f"layers_{layer}"][group(kernel)][kernel]
            for leaf, value in leaves.items():
                name = _peft_name(layer, kernel, leaf)
                tensors[name] = np.ascontiguousarray(trees.on_host(value).astype(np.float32).T)
    return tensors


def _settings(model: Model, adapter: AdapterConfig) -> dict[str, Any]:
    """adapter_config.json."""

    def alpha(scale: float, rank: int) -> float:
        found = scale * adapter.divisor_of(rank)
        return int(found) if found == int(found) else found

    source, revision = model.base or "", ""
    if model.base is None:
        source = HUB_IDS.get(model.source or "", model.source or "")
    if is_hub_id(source):
        source, _, revision = source.partition("@")
    rank, kernels = adapter.rank, resolve_adapter(model.config, adapter).blocks
    ranks = {f"{k}_proj": adapter.rank_of(k) for k in kernels}
    alphas = {name: alpha(adapter.scale_of(name[:-5]), r) for name, r in ranks.items()}
    whole = alpha(adapter.scale, rank)
    special = {
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "layers_to_transform": list(adapter.layers_to_transform or ()),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != whole},
    }
    return {name: value for name, value in special.items() if value} | {
        **{"base_model_name_or_path": source or None, "bias": "none", "fan_in_fan_out": False},
        **{"inference_mode": True, "init_lora_weights": True, "lora_alpha": whole},
        **{"lora_dropout": adapter.dropout, "modules_to_save": None, "peft_type": "LORA"},
        **{"r": rank, "revision": revision or None, "target_modules": sorted(ranks)},
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

    The AdapterConfig has one rank and one scale per kernel. Where a pattern names single layers,
    factors are padded with zeros to the kernel's largest rank, and different scales are folded into
    B. Layers that the directory does not adapt get zeros.

    Args:
      path: The directory, its URL, or its hub id "org/name" or "org/name@revision".
      model: The base that the adapters are for.

    Returns:
      (The adapter's config, the adapters in float32, their layers stacked if the model's are.)

    Raises:
      ConfigError: Native LoRA cannot express a setting (bias, modules_to_save, ...), a pattern
        matches no module, or PEFT cannot adapt the family's kernels separately.
      CheckpointError: A file cannot be read, or tensors are missing, unexpected, misshapen for this
        model or not finite.
    """
    config = model.config
    require_format(config.family, "peft")
    directory = _find(os.fspath(path))
    settings, where = read_json(directory / CONFIG), str(directory / CONFIG)
    try:
        _refuse(where, settings)
        modules = _resolve(where, settings, config.num_layers)
    # A list where a number belongs, a pattern that is not a regex, ...
    except (TypeError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"{where} has a setting of the wrong type ({error}); peft writes numbers, names and"
            " tables there."
        ) from None
    adapter = _adapter_config(where, settings, modules, config.num_layers)
    tree = jax.device_put(trees.unflatten(_to_native(directory, config, adapter, modules)))
    scan = config.execution.scan_layers
    return adapter, tree if scan else trees.unstack_layers(tree, config.num_layers)


def _find(path: str) -> Path:
    """A local PEFT directory; CheckpointError if there is none."""
    on_hub, files = is_hub_id(path), [CONFIG, "adapter_model.*"]
    directory = fetched(path, files, not_here(path)) if on_hub else local_copy(path)
    if not directory.is_dir():
        found = "that is a file" if directory.is_file() else "nothing is there"
        raise CheckpointError(
            f"no PEFT directory at {path}: {found}. Give the directory that peft's save_pretrained"
            f" wrote, with {CONFIG} and {WEIGHTS} in it, or its URL."
        )
    refuse_pickled(directory)
    if not (directory / CONFIG).is_file():
        named = ", ".join(sorted(str(file.parent) for file in directory.glob(f"*/{CONFIG}")))
        raise CheckpointError(
            f"{directory} has no {CONFIG}, so it is no PEFT directory"
            + (f"; its adapters have names: give {named}." if named else ".")
        )
    return directory


def refuse_pickled(directory: Path) -> None:
    """CheckpointError for an adapter whose weights are pickled."""
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory} holds pickled weights (adapter_model.bin), which can run code when read;"
            " save it again with safe_serialization=True."
        )


def _refuse(where: str, settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting that native LoRA cannot express."""
    require(
        settings.get("peft_type") == "LORA",
        f"{where}: peft_type={settings.get('peft_type')!r} is not supported; only 'LORA'.",
    )
    plain = {"bias": settings.get("bias") in ("none", None)}
    plain |= {key: settings.get(key) in (None, False, [], {}) for key in _UNSUPPORTED}
    for key, supported in plain.items():
        require(supported, f"{where}: {key}={settings.get(key)!r} is not supported; {_MERGE}.")
    init = settings.get("init_lora_weights", True)
    require(
        not (isinstance(init, str) and init.lower().startswith(_CHANGES_BASE)),
        f"{where}: init_lora_weights={init!r} changed the base model; convert the adapter to plain"
        " LoRA with peft's path_initial_model_for_weight_conversion first.",
    )
    if unknown := sorted(settings.keys() - {*_UNSUPPORTED, *_KNOWN}):
        warnings.warn(
            f"{where}: keys that this reader does not know are ignored: {', '.join(unknown)}.",
            stacklevel=3,
        )


def _resolve(where: str, settings: Mapping[str, Any], count: int) -> _Loras:
    """The LoRA of every module that the settings target by PEFT's rules, in `count` layers."""
    targets = settings.get("target_modules") or ["q_proj", "v_proj"]
    valid = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    require(
        valid or isinstance(targets, str),
        f"{where}: target_modules={targets!r}: expected a list of module names, or a regex.",
    )
    excluded = settings.get("exclude_modules") or []
    others = [m for m in _NOT_LORA if _selected(m, targets) and not _selected(m, excluded)]
    require(
        not others,
        f"{where}: target_modules={targets!r} names {', '.join(others)}, which native LoRA does not"
        f" adapt; {_MERGE}.",
    )
    layers = settings.get("layers_to_transform")
    if layers in (None, []):  # PEFT: all
        layers = range(count)
    wanted = {layers} if isinstance(layers, int) else set(layers)
    every = {(i, k): _module_name(i, k) for i in range(count) for k in KERNELS}
    chosen = {
        at: m
        for at, m in every.items()
        if (targets == "all-linear" or _selected(m, targets))
        and not _selected(m, excluded)
        and at[0] in wanted
    }
    require(bool(chosen), f"{where}: target_modules={targets!r} match no module of this model.")
    tables = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in [(key, p) for key, table in tables.items() for p in table]:
        require(
            any(_matches(pattern, m) for m in chosen.values()),
            f"{where}: {key} {pattern!r} matches no targeted module.",
        )
    resolved = {}
    for at, module in chosen.items():
        rank, alpha = (
            next((v for p, v in table.items() if _matches(p, module)), settings.get(key, 8))
            for table, key in zip(tables.values(), ("r", "lora_alpha"), strict=True)
        )
        require(
            isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float),
            f"{where}: r={rank!r}, lora_alpha={alpha!r} of {module}: expected positive numbers.",
        )
        resolved[at] = rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return resolved


def _selected(module: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _adapter_config(
    where: str, settings: Mapping[str, Any], modules: _Loras, count: int
) -> AdapterConfig:
    """One config for all modules of `count` layers: per kernel the largest rank, and the scale
    where its layers agree on one, else 1.
    """
    loras = {k: {i: lora for (i, of), lora in modules.items() if of == k} for k in KERNELS}
    loras = {kernel: found for kernel, found in loras.items() if found}
    layers, dora = {tuple(found) for found in loras.values()}, bool(settings.get("use_dora"))
    every = layers == {tuple(range(count))}
    require(
        every or not dora,
        f"{where}: use_dora=True for some layers only is not supported; {_MERGE}.",
    )
    ranks = {kernel: max(rank for rank, _ in of.values()) for kernel, of in loras.items()}
    sets = {"all": set(KERNELS), "attention": set(ATTENTION), "mlp": set(MLP)}
    targets = next((name for name, of in sets.items() if of == loras.keys()), "|".join(loras))
    found = AdapterConfig(
        *("lora", max(ranks.values()), 1.0, targets),
        dropout=settings.get("lora_dropout") or 0.0,
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=dora,
        layers_to_transform=None if every or len(layers) > 1 else layers.pop(),
    )
    alphas = {}
    for kernel, of in loras.items():
        scale, *others = {scale for _, scale in of.values()}
        shared = scale if not others and scale > 0 else 1.0
        alphas[kernel] = shared * found.divisor_of(ranks[kernel])
    alpha = next(alphas[kernel] for kernel, rank in ranks.items() if rank == found.rank)
    return found.replace(
        alpha=alpha,
        rank_pattern=tuple((k, rank) for k, rank in ranks.items() if rank != found.rank),
        alpha_pattern=tuple((k, a) for k, a in alphas.items() if a != alpha),
    )


def _to_native(
    directory: Path, config: LlamaConfig, adapter: AdapterConfig, modules: _Loras
) -> dict[str, np.ndarray]:
    """The stacked native leaves, float32, zeros where a module is not adapted."""
    what, shards = str(directory / WEIGHTS), Shards(directory, [WEIGHTS])
    expected = {}  # name -> (layer, kernel, leaf, shape)
    for (layer, kernel), (rank, _) in modules.items():
        inputs, outputs = (math.prod(axes) for axes in kernel_shapes(config)[kernel])
        shapes: dict[str, tuple[int, ...]]
        shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}
        shapes |= {"magnitude": (outputs,)} if adapter.use_dora else {}
        for leaf, shape in shapes.items():
            expected[_peft_name(layer, kernel, leaf)] = layer, kernel, leaf, shape
    if diff := trees.difference(expected, shards.shapes):
        raise CheckpointError(
            f"{what} does not hold the tensors that {CONFIG} announces for this"
            f" {config.num_layers}-layer model:\n{diff}"
        )
    native = adapter_shapes(config.replace(scan_layers=True), adapter).items()
    leaves = {name: np.zeros(shape, np.float32) for name, shape in native}
    for name, (layer, kernel, leaf, shape) in expected.items():
        if shards.shapes[name] != shape:
            raise CheckpointError(
                f"{what}: {name} has shape {shards.shapes[name]}, expected {shape} for this model"
                f" and {CONFIG}."
            )
        value = as_finite(shards.read(name), np.float32, name, what).T
        if leaf == "lora_b":
            value = value * np.float32(modules[layer, kernel][1] / adapter.scale_of(kernel))
        stacked = leaves[f"layers/{group(kernel)}/{kernel}/{leaf}"]
        stacked[layer][tuple(slice(0, n) for n in value.shape)] = value
    return leaves
