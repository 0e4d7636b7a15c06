"""zFLoRA in JAX: adapters that widen a Llama's streams, trained beside the frozen base and fused into an ordinary, slightly wider Llama.

The papers' method sections (arXiv 2510.25784 and 2511.00050) could not be obtained; the methods here are this project's reconstruction.
Names are loaded when they are first used: `import zflora_jax` alone imports no deep-learning library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zflora_jax.adapters.fuse import fuse, pack, swap, unfuse
    from zflora_jax.adapters.init import init_adapters
    from zflora_jax.adapters.methods import count_params, rank_for_budget
    from zflora_jax.adapters.tasks import pad_adapters, rows_of, stack_tasks
    from zflora_jax.compare import compare_methods
    from zflora_jax.comparison import Comparison
    from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig
    from zflora_jax.decode import Sampler, generate_tokens, stream_tokens
    from zflora_jax.fields import ConfigError
    from zflora_jax.grid import Grid, run_grid, sweep
    from zflora_jax.hf.gap import export_gap
    from zflora_jax.hf.load import load_model
    from zflora_jax.hf.peft import load_peft, save_peft
    from zflora_jax.hf.save import save_hf
    from zflora_jax.info import describe
    from zflora_jax.likelihood import option_log_likelihoods
    from zflora_jax.llama import KVCache, Llama, forward, init_cache, random_model
    from zflora_jax.model import Model
    from zflora_jax.model_config import PRESETS, LlamaConfig, preset
    from zflora_jax.run import export_run, load_run, train
    from zflora_jax.scorecard import evaluate, evaluate_tasks
    from zflora_jax.serving import serve
    from zflora_jax.text import generate, stream
    from zflora_jax.trainer import NonFiniteError
    from zflora_jax.vocabulary import resize_vocab

_HOME = {
    "adapters.fuse": ("fuse", "pack", "swap", "unfuse"),
    "adapters.init": ("init_adapters",),
    "adapters.methods": ("count_params", "rank_for_budget"),
    "adapters.tasks": ("pad_adapters", "rows_of", "stack_tasks"),
    "compare": ("compare_methods",),
    "comparison": ("Comparison",),
    "config": ("AdapterConfig", "DataConfig", "EvalConfig", "OptimConfig", "RunConfig", "TrainConfig"),
    "decode": ("Sampler", "generate_tokens", "stream_tokens"),
    "fields": ("ConfigError",),
    "grid": ("Grid", "run_grid", "sweep"),
    "hf.gap": ("export_gap",),
    "hf.load": ("load_model",),
    "hf.peft": ("load_peft", "save_peft"),
    "hf.save": ("save_hf",),
    "info": ("describe",),
    "likelihood": ("option_log_likelihoods",),
    "llama": ("KVCache", "Llama", "forward", "init_cache", "random_model"),
    "model": ("Model",),
    "model_config": ("PRESETS", "LlamaConfig", "preset"),
    "run": ("export_run", "load_run", "train"),
    "scorecard": ("evaluate", "evaluate_tasks"),
    "serving": ("serve",),
    "text": ("generate", "stream"),
    "trainer": ("NonFiniteError",),
    "vocabulary": ("resize_vocab",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'zflora_jax' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"zflora_jax.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
