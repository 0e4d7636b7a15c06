"""GSM8K at one parameter budget: LoRA r=16 against the two zFLoRA methods, 200 steps, two seeds.

  zflora sweep --config configs/gsm8k_budget.py --set data.data_dir=DIR --workdir runs/gsm8k_budget

DIR/gsm8k/ has train.jsonl and test.jsonl. Result: results/gsm8k_budget.md. 16 runs, about 5 to 8
minutes each on 2 CPU cores.

Question: does zflora-minimal reach LoRA's held-out loss at LoRA's number of parameters, and does it
matter whether LoRA starts as PEFT's does (lora) or as this project's did before (lora-normal)? Rows
longer than 192 tokens are left out to keep a step near 2 s.
"""

from zflora_jax.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from zflora_jax.experiments.comparison import Comparison


def get_sweep() -> Comparison:
    base = RunConfig(
        model="smollm2-135m",
        data=DataConfig(task="gsm8k", batch_size=2, bucket_lengths=(128, 160, 192)),
        optim=OptimConfig(schedule="cosine", warmup_steps=10),
        train=TrainConfig(steps=200, save_every=100, log_every=10),
        eval=EvalConfig(limit=100, generate=False),
    )
    # The ranks that `rank_for_budget` found nearest to LoRA's 4,884,480 parameters when it counted
    # dead blocks too (`methods.live_layers`); without them zflora-uniform could have rank 14.
    methods = {
        "lora": AdapterConfig("lora", rank=16),
        "lora-normal": AdapterConfig("lora", rank=16, init="normal"),
        "zflora-minimal": AdapterConfig("zflora-minimal", rank=21),
        "zflora-uniform": AdapterConfig("zflora-uniform", rank=13, extra_head_dim=4),
    }
    return Comparison(
        "gsm8k_budget", base, methods, learning_rates=(5e-4, 1e-3, 2e-3), seeds=(0, 1)
    )
