"""GSM8K at one parameter budget: LoRA r=16 against the two zFLoRA methods, 200 steps, two seeds.

Command: zflora sweep --config configs/gsm8k_budget.py --set data.data_dir=DIR --workdir runs/gsm8k_budget
DIR holds GSM8K's train.jsonl and test.jsonl. About 5 to 8 minutes a run on 2 CPU cores, 12 runs. Result: results/gsm8k_budget.md.
Question: does zflora-minimal reach LoRA's held-out loss at LoRA's number of parameters? Rows longer than 192 tokens are left out to keep a step
near 2 s.
"""

from zflora_jax.adapters.methods import count_params, rank_for_budget
from zflora_jax.compare import Comparison
from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig, preset


def get_sweep() -> Comparison:
    base = RunConfig(
        model="smollm2-135m",
        data=DataConfig(task="gsm8k", batch_size=2, lengths=(128, 160, 192)),
        optim=OptimConfig(schedule="cosine", warmup_steps=10),
        train=TrainConfig(steps=200, save_every=100, log_every=10),
        eval=EvalConfig(limit=100, generate=False),
    )
    shape = preset(base.model)
    lora = AdapterConfig("lora", rank=16)
    budget = count_params(shape, lora)
    methods = {
        "lora": lora,
        "zflora-minimal": rank_for_budget(shape, AdapterConfig("zflora-minimal"), budget),
        "zflora-uniform": rank_for_budget(shape, AdapterConfig("zflora-uniform", head_rank=4), budget),
    }
    return Comparison("gsm8k_budget", base, methods, learning_rates=(5e-4, 1e-3, 2e-3), seeds=(0, 1))
