"""Runs whose settings differ from the defaults."""

from __future__ import annotations

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.run_config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

RUNS = [
    RunConfig(),
    RunConfig(
        model="tiny",
        adapter=AdapterConfig("lora", rank=3, alpha=1.5, targets="q|v"),
        eval=EvalConfig(split="validation", limit=None),
    ),
    RunConfig(
        adapter=AdapterConfig(
            "zflora-uniform", rank=18, extra_mlp_units=16, extra_head_dim=8, head_scores=False
        ),
        data=DataConfig("rows", "some/dir", "alpaca", 12, 3, (7, 9), True, 5, 4),
        optim=OptimConfig(1e-4, "linear", 0, 0.1, 0.01, 0.8, 0.9, 1e-6, None),
        train=TrainConfig(7, 1, "bfloat16", "block", 3, 2, None, 4, 1),
    ),
]
