"""The paper's protocol: 1B, 3B and 7B, tuned on commonsense, math and summary-dialogue sets, method
by method at one budget of trainable parameters.

  zflora sweep --config configs/paper/tables.py --only paper_math_1b \
      --set model=DIR_OF_LLAMA_3.2_1B data.data_dir=DATA --workdir runs/paper

makes results/paper_math_1b.md; docs/reproduce.md lists the tables, their meshes, memory and time.
DATA holds llm_adapters/ (the LLM-Adapters repository's dataset/ and ft-training_set/) and gsm8k/.

The paper (arXiv 2510.25784) could not be read beyond its abstract, so its settings are unknown.
Those of commonsense and math are LLM-Adapters' (math_running_commands and finetune.py of its
repository, at 8166572): LoRA of rank 32 and alpha 64 on q, k, v, up and down, dropout 0.05, batches
of 16, 3 epochs, AdamW with 100 steps of warm-up and a linear decay, 256 tokens at most, loss on
prompt and answer, beam search with 4 beams. Longer rows are left out here and cut there. This
project chose what it leaves open: the other methods get LoRA's number of parameters, every method
its learning rate out of three around LoRA's 3e-4, by validation loss; and all of summary-dialogue,
for which LLM-Adapters has nothing: 3000 steps of 16 rows, a quarter from each set.
"""

from dataclasses import replace

from zflora_jax.adapters.counts import count_params, rank_for_budget
from zflora_jax.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.presets import preset
from zflora_jax.data.tasks import GROUPS
from zflora_jax.experiments.comparison import Comparison

MODELS = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "7b": "llama-2-7b"}
LORA = AdapterConfig("lora", rank=32, alpha=64.0, targets="q|k|v|up|down", dropout=0.05)
OTHERS = ("ffa", "ffba", "zflora-minimal", "zflora-uniform")
# Heads that are widened to the next size that servers know would take three to ten times LoRA's
# parameters alone; one dim of all heads takes 7 million of a model whose heads have their own keys.
HEAD_DIMS = {"1b": 4, "3b": 4, "7b": 2}
RATES = (1e-4, 3e-4, 1e-3)
BATCH = 16

# Rows of the training files: the numbers in their names, as published.
EPOCHS = 3
STEPS = {"commonsense": EPOCHS * 170_420 // BATCH, "math": EPOCHS * 9_919 // BATCH, "summary": 3000}
TRAINED_ON = {
    "commonsense": "commonsense_170k",
    "math": "math_10k",
    "summary": "+".join(f"{task}*1" for task in GROUPS["summary"]),
}
LENGTHS = {"commonsense": (128, 256), "math": (128, 256), "summary": (512, 1024, 2048)}
NEW_TOKENS = {"commonsense": 32, "math": 256, "summary": 128}


def methods(size: str) -> dict[str, AdapterConfig]:
    """LoRA, and the others at the ranks that come nearest to its number of parameters."""
    config, found = preset(MODELS[size]), {"lora": LORA}
    for name in OTHERS:
        adapter = AdapterConfig(name)
        if METHODS[name].heads:
            adapter = adapter.replace(extra_head_dim=HEAD_DIMS[size])
        found[name] = rank_for_budget(config, adapter, count_params(config, LORA))
    return found


def table(group: str, size: str) -> Comparison:
    """One table: the methods on one model, tuned on one group's set and scored on its tasks."""
    summary = group == "summary"
    base = RunConfig(
        model=MODELS[size],
        data=DataConfig(
            task=TRAINED_ON[group],
            prompt_style="alpaca",  # which needs no chat template: the 7B has none
            batch_size=BATCH,
            bucket_lengths=LENGTHS[group],
            train_on_prompt=not summary,
        ),
        optim=OptimConfig(schedule="linear", warmup_steps=100),
        train=TrainConfig(
            steps=STEPS[group], dtype="bfloat16", remat="dots", save_every=500, max_to_keep=1
        ),
        eval=EvalConfig(limit=120, generate=False, likelihood=False),
    )
    scoring = EvalConfig(
        limit=None,
        batch_size=16,
        max_new_tokens=NEW_TOKENS[group],
        num_beams=1 if summary else 4,
        prompt_style="alpaca" if summary else "alpaca-eval",
        loss=False,
        likelihood=False,
    )
    return Comparison(
        f"paper_{group}_{size}",
        base,
        methods(size),
        RATES,
        (0,),
        pick_steps=min(400, STEPS[group] // 4),
        tasks=GROUPS[group],
        scoring=replace(scoring, limit=500) if summary else scoring,
    )


def get_sweep() -> list[Comparison]:
    return [table(group, size) for group in TRAINED_ON for size in MODELS]


def get_config() -> RunConfig:
    """One run of `paper_math_1b`, for the commands that take a single one."""
    plan = table("math", "1b")
    optim = replace(plan.base.optim, learning_rate=3e-4)
    return replace(plan.base, adapter=plan.methods["zflora-minimal"], optim=optim)
