"""The quickstart: zflora-minimal on SmolLM2-135M-Instruct, generated arithmetic word problems with
worked answers.

Command: make quickstart (or: zflora quickstart --workdir runs/quickstart). Rank 16 widens the 576
channels to 592, a multiple of 16 (the export pads them to 594, a multiple of the 9 heads, as
transformers 5 demands).
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
        data=DataConfig(task="arithmetic", batch_size=8, bucket_lengths=(96, 104, 128)),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=5),
        train=TrainConfig(steps=40, save_every=20, log_every=5),
        eval=EvalConfig(limit=64, batch_size=32, max_new_tokens=56),
    )
