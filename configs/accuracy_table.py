"""Accuracy of SmolLM2-135M on the paper's math and commonsense tasks at one budget of trainable parameters, method by method.

Command: zflora sweep --config configs/accuracy_table.py --set data.data_dir=DIR --workdir runs/accuracy
DIR holds llm_adapters/ (the LLM-Adapters repository's dataset/ and ft-training_set/) and gsm8k/ (train.jsonl, test.jsonl). About 6 to 9 minutes a
method and table on one CPU core with Python 3.12 or newer (jax 0.12 multiplies bfloat16 with the processor's own instructions; older ones are several
times slower); stopped, it goes on where it was, and --only lets several processes share the tables. Results: results/accuracy.md.
Question: at LoRA r=16's number of trainable parameters, which adapter answers best? ffa has its own size (its rank would have to exceed the heads'),
full trains everything. One seed, few steps and few rows: the held-out losses tell methods apart, the accuracies mostly do not.
The last three sweeps ask how far seeds lie apart, and what brings zflora-minimal nearer to LoRA where it trails (GSM8K): its width in other
places, the scale, LoRA+.
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

    minimal = fit("zflora-minimal")
    methods = {
        "lora": lora,
        "zflora-minimal": minimal,
        "zflora-uniform": fit("zflora-uniform", head_rank=4),
        "ffba": fit("ffba", head_rank=4),
        "lora-attention": fit("lora", targets="attention"),
        "zflora-minimal-attention": fit("zflora-minimal", targets="attention"),
        "ffa": AdapterConfig("ffa", rank=16),
        "full": AdapterConfig("full"),
    }
    base = RunConfig(
        model=MODEL,
        data=DataConfig(task="gsm8k", batch_size=1, lengths=(128, 256, 384, 512), packing=True),
        optim=OptimConfig(schedule="cosine", warmup_steps=5),
        train=TrainConfig(steps=80, dtype="bfloat16", save_every=None, log_every=10, keep=1),
        eval=EvalConfig(limit=48, generate=False, likelihood=False),
    )
    numbers = EvalConfig(split="test", limit=64, batch_size=64, max_new_tokens=192, loss=False, clean_only=True)
    words = replace(numbers, limit=100, batch_size=50, max_new_tokens=32)
    gsm8k = Sweep("accuracy_gsm8k", base, methods, (2e-4, 1e-3, 3e-3), (0,), pick_steps=15, tasks=("gsm8k", "svamp"), scoring=numbers)

    def another(name: str, data: str, tasks: tuple[str, ...], scoring: EvalConfig) -> Sweep:
        return replace(gsm8k, name=name, base=replace(base, data=replace(base.data, task=data)), rates_from=gsm8k, tasks=tasks, scoring=scoring)

    choices = ("arc_easy", "arc_challenge", "openbookqa", "boolq")

    def levers(name: str, optim: OptimConfig, seeds: tuple[int, ...], **adapters: AdapterConfig) -> Sweep:
        labels = {label.replace("_", "-"): adapter for label, adapter in adapters.items()}
        return Sweep(name, replace(base, optim=optim), labels, (1e-3,), seeds)

    return [
        gsm8k,
        another("accuracy_commonsense", "arc_easy+arc_challenge+openbookqa+boolq", choices, words),
        another("accuracy_math", "math_data", ("addsub", "aqua", "multiarith", "gsm8k", "singleeq", "svamp"), replace(numbers, limit=48)),
        levers("accuracy_seeds", base.optim, (0, 1), lora=lora, minimal=minimal),
        levers(
            "accuracy_levers",
            base.optim,
            (0,),
            minimal_mlp_rank_8=fit("zflora-minimal", mlp_rank=8),
            minimal_mlp_rank_48=fit("zflora-minimal", mlp_rank=48),
            minimal_state_from_mlp=fit("zflora-minimal", targets="q|k|v|gate|up|down"),
            minimal_scale_4=replace(minimal, alpha=4.0 * minimal.rank),
        ),
        levers("accuracy_loraplus", replace(base.optim, loraplus_ratio=4.0), (0,), lora=lora, minimal=minimal),
    ]
