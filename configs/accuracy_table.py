"""Accuracy of SmolLM2-135M on the paper's math and commonsense tasks at one budget of trainable parameters, method by method.

Command: zflora sweep --config configs/accuracy_table.py --set data.data_dir=DIR --workdir runs/accuracy
DIR holds llm_adapters/ (the LLM-Adapters repository's dataset/ and ft-training_set/) and gsm8k/ (train.jsonl, test.jsonl). About 13 minutes a method
and table on 2 CPU cores; stopped, it goes on where it was. Results: results/accuracy_math.*, accuracy_gsm8k.*, accuracy_commonsense.*.
Question: at LoRA r=16's number of trainable parameters, which adapter answers best? ffa has its own size (its rank would have to exceed the heads'),
full trains everything.
"""

from dataclasses import replace

from zflora_jax.adapters.methods import count_params, rank_for_budget
from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig, preset
from zflora_jax.sweeps import Sweep

MODEL = "smollm2-135m"


def get_sweep() -> list[Sweep]:
    shape = preset(MODEL)
    lora = AdapterConfig("lora", rank=16)
    budget = count_params(shape, lora)

    def fit(method: str, **changes: object) -> AdapterConfig:
        return rank_for_budget(shape, replace(AdapterConfig(method), **changes), budget)

    methods = {
        "lora": lora,
        "zflora-minimal": fit("zflora-minimal"),
        "zflora-uniform": fit("zflora-uniform", head_rank=4),
        "ffba": fit("ffba", head_rank=4),
        "lora-attention": fit("lora", targets="attention"),
        "zflora-minimal-attention": fit("zflora-minimal", targets="attention"),
        "ffa": AdapterConfig("ffa", rank=16),
        "full": AdapterConfig("full"),
    }
    base = RunConfig(
        model=MODEL,
        data=DataConfig(task="math_data", batch_size=1, lengths=(128, 256, 384, 512), packing=True),
        optim=OptimConfig(schedule="cosine", warmup_steps=10),
        train=TrainConfig(steps=160, save_every=80, log_every=10, keep=1),
        eval=EvalConfig(limit=100, generate=False, likelihood=False),
    )
    numbers = EvalConfig(split="test", limit=200, batch_size=16, max_new_tokens=160, loss=False)
    words = EvalConfig(split="test", limit=300, batch_size=16, max_new_tokens=12, loss=False)
    tables = (
        ("accuracy_gsm8k", "gsm8k", ("gsm8k", "svamp"), numbers),
        ("accuracy_commonsense", "arc_easy+arc_challenge+openbookqa+boolq", ("arc_easy", "arc_challenge", "openbookqa", "boolq"), words),
        ("accuracy_math", "math_data", ("addsub", "aqua", "multiarith", "gsm8k", "singleeq", "svamp"), replace(numbers, limit=None)),
    )
    return [
        Sweep(name, replace(base, data=replace(base.data, task=task)), methods, (1e-4, 5e-4, 2e-3), (0,), pick_steps=40, tasks=tasks, scoring=scoring)
        for name, task, tasks, scoring in tables
    ]
