"""Accuracy of SmolLM2-135M in the paper's three categories: zFLoRA against LoRA and its variants.

  python -m studies.run accuracy --set data.data_dir=DIR --workdir runs/accuracy

DIR holds llm_adapters/ (the LLM-Adapters repository's dataset/ and ft-training_set/), woz/ and
dialogsum/. Python 3.12 or newer: jax 0.12 multiplies bfloat16 with the processor's instructions.
Questions, measures and margins were fixed before the runs: studies/experiments.md.
"""

from dataclasses import replace

import zflora_jax as zf
from studies.study import Study

# At LoRA r=16's 4,884,480 parameters: all within 3.1% of it except full fine-tuning and ffa, whose
# rank would have to exceed that of the heads.
LORA = zf.AdapterConfig("lora", rank=16)
MINIMAL = zf.AdapterConfig("zflora-minimal", rank=21, extra_mlp_units=21)
PAIR = {"lora": LORA, "zflora-minimal": MINIMAL}
ALL = PAIR | {
    "dora": replace(LORA, rank=15, use_dora=True),
    "rslora": replace(LORA, alpha=32.0, use_rslora=True),
    "loraplus": LORA,
    "pissa": replace(LORA, init="pissa"),
    "zflora-uniform": zf.AdapterConfig("zflora-uniform", rank=14, extra_head_dim=4),
    "ffba": zf.AdapterConfig("ffba", rank=62, extra_head_dim=4),
    "ffa": zf.AdapterConfig("ffa", rank=16),
    "zflora-minimal-attention": zf.AdapterConfig("zflora-minimal", rank=110, targets="attention"),
    "lora-attention": replace(LORA, rank=42, targets="attention"),
    "state-alone": replace(MINIMAL, rank=27, extra_mlp_units=0),
    "units-alone": zf.AdapterConfig("ffba", rank=94, extra_head_dim=0),
    "zflora-minimal-plus": MINIMAL,
    "full": zf.AdapterConfig("full"),
}
# LoRA+, with the ratio that its authors recommend.
SETTINGS = {name: {"optim.loraplus_ratio": 16.0} for name in ("loraplus", "zflora-minimal-plus")}
# The pair and full fine-tuning, at a tenth of the adapters' rates.
WITH_FULL = {"methods": PAIR | {"full": ALL["full"]}, "rates": {"full": (5e-5, 1.5e-4, 4.5e-4)}}
VARIANTS = ("zflora-uniform", "ffba", "ffa", "zflora-minimal-attention", "state-alone")
VARIANTS += ("units-alone", "zflora-minimal-plus")
CONTRASTS = (
    *((label, "zflora-minimal") for label in VARIANTS),
    ("state-alone", "units-alone"),
    ("zflora-minimal-plus", "loraplus"),
    ("zflora-minimal-attention", "lora-attention"),
)
BASE = zf.RunConfig(
    model="smollm2-135m",
    data=zf.DataConfig(packing=True),
    optim=zf.OptimConfig(schedule="cosine", warmup_steps=10),
    train=zf.TrainConfig(steps=240, dtype="bfloat16", save_every=None, log_every=20, max_to_keep=1),
    eval=zf.EvalConfig(limit=100, generate=False, likelihood=False),
)
RATES = (5e-4, 1.5e-3, 4.5e-3)
GENERATED = zf.EvalConfig(
    limit=1000, batch_size=64, max_new_tokens=128, loss=False, likelihood=False, clean_only=True
)
CHOSEN = replace(GENERATED, limit=500, generate=False, likelihood=True, batch_size=32)
# The methods of the primary question, in the first table of each category.
MORE_SEEDS = dict.fromkeys(PAIR, (3, 4, 5))
CLOZE = ("arc_easy_cloze", "arc_challenge_cloze", "openbookqa_cloze")
UNSEEN = ("piqa_cloze", "social_i_qa_cloze", "hellaswag_cloze", "winogrande_cloze")


def table(name: str, task: str, longest: int = 512, **given: object) -> Study:
    """A study of 240 steps of 1024 tokens, in packed rows of `longest`, which costs least where it
    is small. given: other fields of the study.
    """
    lengths = tuple(range(128, longest + 1, 128))
    data = replace(BASE.data, task=task, bucket_lengths=lengths, batch_size=1024 // longest)
    fields = {"methods": PAIR, "learning_rates": RATES, "tasks": (task,), "scoring": GENERATED}
    fields |= {"measure": "accuracy", "margin": 3.0, "category": "generated"} | given
    run = replace(BASE, data=data)
    return Study(f"accuracy_{name}", run, seeds=(0, 1, 2), reference="lora", **fields)


def at_rank(rank: int, minimal: int, rates: tuple[float, ...]) -> Study:
    """The pair at the budget of another rank of LoRA."""
    wide = replace(MINIMAL, rank=minimal, extra_mlp_units=minimal)
    pair = {"lora": replace(LORA, rank=rank), "zflora-minimal": wide}
    given = {"methods": pair, "learning_rates": rates, "page": "accuracy_arithmetic"}
    return table(f"rank{rank}", "arithmetic_steps", 256, **given)


def get_studies() -> list[Study]:
    """The tables of results/accuracy.md."""
    arithmetic = WITH_FULL | {"methods": ALL, "settings": SETTINGS, "contrasts": CONTRASTS}
    cloze = WITH_FULL | {"tasks": CLOZE, "transfer": UNSEEN, "scoring": CHOSEN}
    cloze |= {"measure": "likelihood_norm", "more_seeds": MORE_SEEDS, "category": "commonsense"}
    tests = ("addsub", "singleeq", "multiarith", "svamp")
    return [
        table("cloze", "+".join(CLOZE), 256, **cloze),
        table("arithmetic", "arithmetic_steps", 256, more_seeds=MORE_SEEDS, **arithmetic),
        table("math_data", "math_data", tasks=tests, category="word problems"),
        table("woz", "woz", more_seeds=MORE_SEEDS, category="dialogue", **WITH_FULL),
        table("dialogsum", "dialogsum_dev", measure="rougeL", margin=1.5, category="summaries"),
        # The best rate at rank 16 is the middle one: that, and the one on the side where the best
        # rate of fewer or more parameters would lie.
        at_rank(4, 5, RATES[1:]),
        at_rank(64, 81, RATES[:2]),
    ]
