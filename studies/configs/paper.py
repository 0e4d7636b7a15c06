"""The paper's protocol: 1B, 3B and 7B, tuned on commonsense, math and summary-dialogue sets, with
one budget of trainable parameters for all methods.

  python -m studies.run paper --only paper_math_1b --workdir runs/paper \
      --set model=DIR_OF_LLAMA_3.2_1B data.data_dir=DATA

studies/README.md says whose the settings are, and lists meshes, memory and time.
"""

from dataclasses import replace

import zflora_jax as zf
from studies.study import Study

MODELS = {"1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "7b": "llama-2-7b"}
TASKS = {
    "commonsense": ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande")
    + ("arc_easy", "arc_challenge", "openbookqa"),
    "math": ("addsub", "aqua", "multiarith", "gsm8k", "singleeq", "svamp"),
    "summary": ("cnn_dailymail", "xsum", "dailydialog", "multiwoz"),
}
LORA = zf.AdapterConfig("lora", rank=32, alpha=64.0, targets="q|k|v|up|down", dropout=0.05)
# Heads that are widened to the next size that servers know would take three to ten times LoRA's
# parameters; one dim of all heads takes 7 million of a model whose heads have their own keys.
HEAD_DIMS = {"1b": 4, "3b": 4, "7b": 2}
BATCH, EPOCHS = 16, 3
# Rows of the training files: the numbers in their names, as published.
STEPS = {"commonsense": EPOCHS * 170_420 // BATCH, "math": EPOCHS * 9_919 // BATCH, "summary": 3000}
TRAINED_ON = {
    "commonsense": "commonsense_170k",
    "math": "math_10k",
    "summary": "+".join(f"{task}*1" for task in TASKS["summary"]),
}
LENGTHS = {"commonsense": (128, 256), "math": (128, 256), "summary": (512, 1024, 2048)}
NEW_TOKENS = {"commonsense": 32, "math": 256, "summary": 128}


def methods(size: str) -> dict[str, zf.AdapterConfig]:
    """LoRA, and the others at the ranks that come nearest to its number of parameters."""
    config, heads = zf.preset(MODELS[size]), HEAD_DIMS[size]
    others = {
        "ffa": zf.AdapterConfig("ffa"),
        "ffba": zf.AdapterConfig("ffba", extra_head_dim=heads),
        "zflora-minimal": zf.AdapterConfig("zflora-minimal"),
        "zflora-uniform": zf.AdapterConfig("zflora-uniform", extra_head_dim=heads),
    }
    budget, found = zf.count_params(config, LORA), {"lora": LORA}
    for name, other in others.items():
        ranks = (replace(other, rank=rank) for rank in range(1, 65))
        found[name] = min(ranks, key=lambda near: abs(zf.count_params(config, near) - budget))
    return found


def table(group: str, size: str) -> Study:
    """The methods on one model, tuned on one group's set and scored on its tasks."""
    summary = group == "summary"
    base = zf.RunConfig(
        model=MODELS[size],
        data=zf.DataConfig(
            task=TRAINED_ON[group],
            prompt_style="alpaca",  # which needs no chat template: the 7B has none
            batch_size=BATCH,
            bucket_lengths=LENGTHS[group],
            train_on_prompt=not summary,
        ),
        optim=zf.OptimConfig(schedule="linear", warmup_steps=100),
        train=zf.TrainConfig(
            steps=STEPS[group], dtype="bfloat16", remat="dots", save_every=500, max_to_keep=1
        ),
        eval=zf.EvalConfig(limit=120, generate=False, likelihood=False),
    )
    scoring = zf.EvalConfig(
        limit=500 if summary else None,
        batch_size=16,
        max_new_tokens=NEW_TOKENS[group],
        prompt_style="alpaca" if summary else "alpaca-eval",
        loss=False,
        likelihood=False,
    )
    return Study(
        f"paper_{group}_{size}",
        base,
        methods(size),
        (1e-4, 3e-4, 1e-3),
        (0,),
        pick_steps=min(400, STEPS[group] // 4),
        tasks=TASKS[group],
        scoring=scoring,
    )


def get_studies() -> list[Study]:
    """Nine tables: three groups of tasks on three models."""
    return [table(group, size) for group in TASKS for size in MODELS]


def get_config() -> zf.RunConfig:
    """One run of `paper_math_1b`, for the commands that take a single run."""
    plan = table("math", "1b")
    optim = replace(plan.base.optim, learning_rate=3e-4)
    return replace(plan.base, adapter=plan.methods["zflora-minimal"], optim=optim)
