"""adapter_config.json of PEFT's LoRA directories, read by PEFT's own rules."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zflora_jax.core.architecture import KERNELS, group
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.keys import LAYER_NAMES
from zflora_jax.hf.shards import read_json

CONFIG = "adapter_config.json"

# Settings that native LoRA cannot express: key -> the values (besides absence) that do not change
# the function.
_PLAIN: dict[str, tuple[Any, ...]] = {
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
# Settings that this file reads.
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
    "use_dora",
    "init_lora_weights",
    "lora_dropout",
)
# Settings that do not change the function.
_HARMLESS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
)
# Initialisations that move a part of the base into the adapter, so the saved factors belong to a
# changed base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class ModuleLora(NamedTuple):
    """The LoRA of one module: y += scale * B A x.

    Attributes:
      rank: rows of A.
      scale: alpha / rank, or alpha / sqrt(rank) with use_rslora.
    """

    rank: int
    scale: float


_NOT_LORA = ("lm_head", "model.embed_tokens")  # modules that peft may adapt beside the layers


def module_name(layer: int, kernel: str) -> str:
    """Hugging Face's name of a kernel's module: (0, "q") -> "model.layers.0.self_attn.q_proj"."""
    name = LAYER_NAMES[f"{group(kernel)}/{kernel}/kernel"].removesuffix(".weight")
    return f"model.layers.{layer}.{name}"


def read_settings(
    directory: Path, config: LlamaConfig
) -> tuple[dict[str, Any], dict[str, ModuleLora]]:
    """Read adapter_config.json.

    Args:
      directory: a PEFT directory.
      config: of the model that the adapter is for.

    Returns:
      (The settings as they are in the file, module name -> its LoRA for every targeted module.)

    Raises:
      ConfigError: native LoRA cannot express a setting (bias, modules_to_save, ...), or a
        pattern matches no module.
      CheckpointError: the file cannot be read, or a value is of the wrong kind.
    """
    if not (directory / CONFIG).is_file():
        named = ", ".join(sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG}")))
        raise CheckpointError(
            f"{directory} has no {CONFIG}, so it is no PEFT directory"
            + (f"; its adapters have names: give {named}." if named else ".")
        )
    settings = read_json(directory / CONFIG)
    try:
        _refuse(directory, settings)
        return settings, _resolve(directory, settings, config)
    # A list where a number belongs, a pattern that is not a regex, ...
    except (TypeError, AttributeError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"{directory / CONFIG} has a setting of the wrong kind ({error}); peft writes numbers,"
            " names and tables there."
        ) from None


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
            stacklevel=4,
        )


def _resolve(
    directory: Path, settings: Mapping[str, Any], config: LlamaConfig
) -> dict[str, ModuleLora]:
    """Module name -> its LoRA, for every module that the settings target by PEFT's rules."""
    where = directory / CONFIG
    every = [module_name(layer, kernel) for layer in range(config.num_layers) for kernel in KERNELS]
    targets = settings.get("target_modules") or ["q_proj", "v_proj"]
    named = isinstance(targets, str) or (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    )
    require(
        named, f"{where}: target_modules={targets!r}: expected a list of module names, or a regex."
    )
    excluded = settings.get("exclude_modules") or []
    others = [m for m in _NOT_LORA if _selected(m, targets) and not _selected(m, excluded)]
    require(
        not others,
        f"{where}: target_modules={targets!r} names {', '.join(others)}, which native LoRA does not"
        " adapt; merge the adapter into its base with peft and load the result.",
    )
    chosen = every if targets == "all-linear" else [m for m in every if _selected(m, targets)]
    chosen = [m for m in chosen if not _selected(m, excluded)]
    if (layers := settings.get("layers_to_transform")) not in (None, []):  # PEFT: all
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
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        resolved[module] = ModuleLora(rank, alpha / divisor)
    return resolved


def _selected(module: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
