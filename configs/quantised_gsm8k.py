"""GSM8K on float and quantised bases: zflora-minimal r=16, 60 steps, three seeds.

  zflora sweep --config configs/quantised_gsm8k.py --set data.data_dir=DIR --workdir runs/quantised

DIR/gsm8k has GSM8K's train.jsonl, test.jsonl. 12 runs, about a minute each on 2 CPU cores.

Question: is the held-out loss on a quantised base within the seeds' spread of that on a bfloat16
base? The packaged model has 4 bits itself (Q4_1), so its weights are rounded a second time.
"""

from typing import Any

from zflora_jax.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

# quantize.kernels, train.dtype
STORED = (
    ("none", "float32"),
    ("none", "bfloat16"),
    ("int8", "float32"),
    ("nf4", "float32"),
)


def get_sweep() -> tuple[RunConfig, list[dict[str, Any]]]:
    base = RunConfig(
        model="smollm2-135m",
        adapter=AdapterConfig("zflora-minimal", rank=16),
        data=DataConfig(task="gsm8k", batch_size=2, bucket_lengths=(128, 160, 192)),
        optim=OptimConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=5),
        train=TrainConfig(steps=60, save_every=60, log_every=10),
        eval=EvalConfig(limit=100, generate=False),
    )
    settings = [
        {"quantize.kernels": kernels, "train.dtype": dtype, "train.seed": seed}
        for seed in (0, 1, 2)
        for kernels, dtype in STORED
    ]
    return base, settings
