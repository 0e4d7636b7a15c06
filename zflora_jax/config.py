"""All settings in one module, which config files import. They are defined in `zflora_jax.core`."""

from zflora_jax.core.adapter_config import METHODS, AdapterConfig, Method
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.core.run_config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    QuantizeConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "METHODS",
    "PRESETS",
    "AdapterConfig",
    "DataConfig",
    "EvalConfig",
    "LlamaConfig",
    "MeshConfig",
    "Method",
    "OptimConfig",
    "QuantizeConfig",
    "RopeScaling",
    "RunConfig",
    "TrainConfig",
    "preset",
]
