"""PEFT's LoRA directories (adapter_config.json, adapter_model.safetensors): written from native
LoRA adapters, and read into them.

PEFT computes y = x W^T + s (x A^T) B^T with A (r, in) and B (out, r); native factors are their
transposes, stacked over layers.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.init import adapter_shapes
from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, group, kernel_shapes
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import whole_directory
from zflora_jax.hf.keys import LAYER_NAMES, CheckpointError, as_finite
from zflora_jax.hf.load import HUB_IDS
from zflora_jax.hf.shards import Shards, read_json
from zflora_jax.parallel.mesh import require_local
from zflora_jax.reporting.files import local_path, write_json

CONFIG, WEIGHTS, WRITER = "adapter_config.json", "adapter_model.safetensors", "zflora_jax"

# Settings that change the function in a way native LoRA has no words for: key -> the values that
# leave it alone (besides absence).
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    **dict.fromkeys(
        (
            "use_qalora",
            "use_bdlora",
            "velora_config",
            "monteclora_config",
            "arrow_config",
            "kasa_config",
        ),
        (False, None, {}),
    ),
}
_READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "lora_dropout",
)
_HARMLESS = (
    *(
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "layers_pattern",
    ),
    *(
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "ensure_weight_tying",
    ),
)
# Initialisations that move part of the base into the adapter: the saved factors belong to a changed
# base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def _module(layer: int, kernel: str) -> str:
    name = LAYER_NAMES[f"{group(kernel)}/{kernel}/kernel"].removesuffix(".weight")
    return f"model.layers.{layer}.{name}"


def _tensor(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def save_peft(
    path: str | os.PathLike[str], model: Model, adapter: AdapterConfig, adapters: trees.Tree
) -> dict[str, Any]:
    """Write LoRA adapters as a PEFT directory that peft and vLLM load.

    Args:
      path: the directory to write; replaced if it holds nothing but an earlier save_peft's files,
        else refused.
      model: the base the adapters were trained on; its source becomes base_model_name_or_path (a
        preset's hub id).
      adapter: method "lora". adapters: {"layers": {"attn": {"q": {"lora_a" [L, in, r], "lora_b" [L,
        r, out]}}, ...}} or the per-layer form.

    Returns:
      {"path", "parameters", "files", "rank"}; a rank above 16 needs vLLM's --max-lora-rank.

    Raises:
      ConfigError: another method. ValueError: adapters that are missing, unexpected, misshapen or
        not finite.
    """
    from safetensors.numpy import save_file

    target = local_path(path, "export directory").expanduser().resolve()
    if adapter.method != "lora":
        raise ConfigError(
            f"method {adapter.method!r} has no PEFT form: PEFT's directories hold LoRA. Fuse the"
            " adapter into the model and use save_hf."
        )
    require_local(adapters, "export")
    config = model.config.replace(scan_layers="layers" in adapters, packed=False)
    expected = {
        name: np.empty(shape, np.void) for name, shape in adapter_shapes(config, adapter).items()
    }
    trees.check_like(adapters, trees.unflatten(expected), "adapters of method 'lora'")
    kernels = tuple(resolve_adapter(config, adapter).blocks)
    tensors = {}
    for layer, tree in enumerate(
        trees.unstack_layers(adapters, config.num_layers)[f"layers_{i}"]
        for i in range(config.num_layers)
    ):
        for kernel in kernels:
            for factor in "AB":
                value = trees.on_host(tree[group(kernel)][kernel][f"lora_{factor.lower()}"]).astype(
                    np.float32
                )
                tensors[_tensor(_module(layer, kernel), factor)] = np.ascontiguousarray(value.T)
    alpha = adapter.scale * adapter.rank
    settings = {
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
    with whole_directory(target, _own_files) as staging:
        write_json(staging / CONFIG, settings)
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt", "writer": WRITER})
    return {
        "path": str(target),
        "parameters": sum(t.size for t in tensors.values()),
        "files": [CONFIG, WEIGHTS],
        "rank": adapter.rank,
    }


def _own_files(directory: Path) -> set[str] | None:
    """The files of an earlier save_peft, known by the writer in the tensors' metadata; None for
    anybody else's directory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / WEIGHTS, "numpy") as file:
            return {CONFIG, WEIGHTS} if (file.metadata() or {}).get("writer") == WRITER else None
    except (OSError, SafetensorError):
        return None


def load_peft(path: str | os.PathLike[str], model: Model) -> tuple[AdapterConfig, trees.Tree]:
    """Read a PEFT LoRA directory as native adapters for `model`, float32, layers stacked as the
    model's are.

    Ranks and scales that differ between modules (rank_pattern, alpha_pattern) become one
    AdapterConfig: factors are padded with zeros to the largest rank, and where scales differ each
    is folded into its B. Modules and layers that the directory does not adapt get zeros.

    Raises:
      ConfigError: a setting native LoRA has no words for (DoRA, bias, modules_to_save, ...), named;
        patterns that match no module.
      CheckpointError: files that cannot be read; tensors that are missing, unexpected, misshapen
        for this model or not finite.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise CheckpointError(f"no PEFT directory at {directory}.")
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory} holds pickled weights (adapter_model.bin), which can run code when read;"
            " save it again with safe_serialization=True."
        )
    settings = read_json(directory / CONFIG)
    config = model.config
    try:
        _refuse(directory, settings)
        resolved = _resolve(directory, settings, config)
    except (
        TypeError,
        AttributeError,
        OverflowError,
        re.error,
    ) as error:  # a list where a number belongs, a pattern that is none, ...
        raise CheckpointError(
            f"{directory / CONFIG} has a setting of the wrong kind ({error}); peft writes numbers,"
            " names and tables there."
        ) from None
    shards, what = Shards(directory, [WEIGHTS]), str(directory / WEIGHTS)
    expected = [_tensor(module, factor) for module in resolved for factor in "AB"]
    if diff := trees.difference(expected, shards.shapes):
        raise CheckpointError(
            f"{what} does not hold the tensors that {CONFIG} announces for this"
            f" {config.num_layers}-layer model:\n{diff}"
        )

    rank = max(r for r, _ in resolved.values())
    scales = {scale for _, scale in resolved.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    touched = {module.split(".")[-1].removesuffix("_proj") for module in resolved}
    named = {"all": set(KERNELS), "attention": set(ATTENTION), "mlp": set(MLP)}
    targets = next(
        (name for name, kernels in named.items() if kernels == touched),
        "|".join(k for k in KERNELS if k in touched),
    )
    dropout = settings.get("lora_dropout") or 0.0
    adapter = AdapterConfig("lora", rank=rank, alpha=scale * rank, targets=targets, dropout=dropout)

    leaves = {
        name: np.zeros(shape, np.float32)
        for name, shape in adapter_shapes(config.replace(scan_layers=True), adapter).items()
    }
    for layer in range(config.num_layers):
        for kernel in touched:
            module = _module(layer, kernel)
            if module not in resolved:
                continue
            r, own_scale = resolved[module]
            inputs, outputs = (math.prod(axes) for axes in kernel_shapes(config)[kernel])
            for factor, shape in (("A", (r, inputs)), ("B", (outputs, r))):
                name = _tensor(module, factor)
                if shards.shapes[name] != shape:
                    raise CheckpointError(
                        f"{what}: {name} has shape {shards.shapes[name]}, expected {shape} for this"
                        f" model and {CONFIG}."
                    )
                value = as_finite(shards.read(name), np.float32, name, what).T
                leaf = leaves[f"layers/{group(kernel)}/{kernel}/lora_{factor.lower()}"]
                if factor == "A":
                    leaf[layer, :, :r] = value
                else:
                    leaf[layer, :r, :] = value * np.float32(own_scale / scale)
    import jax.numpy as jnp

    tree = trees.map_with_names(lambda _, leaf: jnp.asarray(leaf), trees.unflatten(leaves))
    return adapter, tree if config.execution.scan_layers else trees.unstack_layers(
        tree, config.num_layers
    )


def _refuse(directory: Path, settings: Mapping[str, Any]) -> None:
    where = directory / CONFIG
    require(
        settings.get("peft_type") == "LORA",
        f"{where}: peft_type={settings.get('peft_type')!r} is not supported; only 'LORA'.",
    )
    for key, plain in _PLAIN.items():
        require(
            settings.get(key, plain[0]) in plain,
            f"{where}: {key}={settings.get(key)!r} is not supported; merge the adapter into its"
            " base with peft and load the result.",
        )
    init = settings.get("init_lora_weights", True)
    require(
        not (isinstance(init, str) and init.lower().startswith(_CHANGES_BASE)),
        f"{where}: init_lora_weights={init!r} changed the base model; convert the adapter to plain"
        " LoRA with peft's path_initial_model_for_weight_conversion first.",
    )
    if unknown := sorted(set(settings) - set(_PLAIN) - set(_READ) - set(_HARMLESS)):
        warnings.warn(
            f"{where}: keys that this reader does not know are ignored: {', '.join(unknown)}.",
            stacklevel=3,
        )


def _resolve(
    directory: Path, settings: Mapping[str, Any], config: LlamaConfig
) -> dict[str, tuple[int, float]]:
    """module -> (rank, scale) of every module that the settings target, by PEFT's own matching
    rules.
    """
    where = directory / CONFIG
    every = [_module(layer, kernel) for layer in range(config.num_layers) for kernel in KERNELS]
    targets = settings.get("target_modules") or ["q_proj", "v_proj"]
    named = isinstance(targets, str) or (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    )
    require(
        named, f"{where}: target_modules={targets!r}: expected a list of module names, or a regex."
    )
    chosen = every if targets == "all-linear" else [m for m in every if _selected(m, targets)]
    chosen = [m for m in chosen if not _selected(m, settings.get("exclude_modules") or [])]
    if (layers := settings.get("layers_to_transform")) is not None:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        chosen = [m for m in chosen if int(m.split(".")[2]) in wanted]
    require(bool(chosen), f"{where}: target_modules={targets!r} match no module of this model.")
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    for key, pattern in [("rank_pattern", p) for p in ranks] + [
        ("alpha_pattern", p) for p in alphas
    ]:
        require(
            any(_matches(pattern, m) for m in chosen),
            f"{where}: {key} {pattern!r} matches no targeted module.",
        )
    resolved = {}
    for module in chosen:
        rank, alpha = (
            next((v for p, v in table.items() if _matches(p, module)), settings.get(key, 8))
            for table, key in ((ranks, "r"), (alphas, "lora_alpha"))
        )
        require(
            isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float),
            f"{where}: r={rank!r}, lora_alpha={alpha!r} of {module}: expected positive numbers.",
        )
        resolved[module] = (
            rank,
            alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank,
        )
    return resolved


def _selected(module: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
