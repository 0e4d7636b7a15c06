"""Preferences: zflora-minimal learns pairs of a chosen and a rejected answer by DPO.

Command: zflora train --config configs/dpo.py --workdir DIR --set model=MODEL data.data_dir=PAIRS
"""

from zflora_jax.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        model="smollm2-135m",
        adapter=AdapterConfig("zflora-minimal", rank=16),
        data=DataConfig(task="rows", batch_size=8, bucket_lengths=(192, 256, 512)),
        optim=OptimConfig(learning_rate=5e-5, warmup_steps=5),
        train=TrainConfig(loss="dpo", dpo_beta=0.1, steps=40, save_every=20, log_every=5),
        eval=EvalConfig(limit=64, batch_size=32, max_new_tokens=64),
    )
