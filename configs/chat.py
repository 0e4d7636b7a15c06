"""Conversations, or other rows of your own: zflora-minimal on an instruct model.

Command: zflora train --config configs/chat.py --workdir DIR --set model=MODEL data.data_dir=CHATS
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
        data=DataConfig(task="rows", batch_size=4, bucket_lengths=(1024,), packing=True),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=5),
        train=TrainConfig(steps=200, save_every=100, log_every=10),
        eval=EvalConfig(limit=20, batch_size=4, max_new_tokens=128),
    )
