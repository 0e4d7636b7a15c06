"""GSM8K at one parameter budget: LoRA r=16 against two zFLoRA methods, 200 steps, two seeds.

  python -m studies.run gsm8k_budget --set data.data_dir=DIR --workdir runs/gsm8k_budget

DIR/gsm8k/ has train.jsonl and test.jsonl. About 5 to 8 minutes a run on 2 CPU cores.

Does zflora-minimal reach LoRA's held-out loss at LoRA's number of parameters, and does LoRA's start
matter (lora: PEFT's; lora-normal: N(0, 1/in))? Rows longer than 192 tokens are left out to keep a
step near 2 s.
"""

import zflora_jax as zf
from studies.study import Study

# The ranks nearest to LoRA's 4,884,480 parameters when blocks that cannot act were counted, too;
# without them zflora-uniform could have rank 14.
METHODS = {
    "lora": zf.AdapterConfig("lora", rank=16),
    "lora-normal": zf.AdapterConfig("lora", rank=16, init="normal"),
    "zflora-minimal": zf.AdapterConfig("zflora-minimal", rank=21),
    "zflora-uniform": zf.AdapterConfig("zflora-uniform", rank=13, extra_head_dim=4),
}


def get_studies() -> list[Study]:
    """The table of results/gsm8k_budget.md."""
    base = zf.RunConfig(
        model="smollm2-135m",
        data=zf.DataConfig(task="gsm8k", batch_size=2, bucket_lengths=(128, 160, 192)),
        optim=zf.OptimConfig(schedule="cosine", warmup_steps=10),
        train=zf.TrainConfig(steps=200, save_every=100, log_every=10),
        eval=zf.EvalConfig(limit=100, generate=False),
    )
    return [Study("gsm8k_budget", base, METHODS, (5e-4, 1e-3, 2e-3), (0, 1))]
