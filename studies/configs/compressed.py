"""The loss and score that a trained adapter keeps when it is deployed on a compressed base.

  python -m studies.run compressed --workdir runs/compressed --set data.data_dir=DIR

Question, contenders and margin, fixed before the first run. Question: on the 4-bit blocks of a file
that people download (Q4_1), which way of deploying an adapter keeps what training gained, and for
how many bytes? Every method trains next to the codes, at LoRA r=16's number of trainable parameters
(4.88M; scales 3.32M, scales and minima 6.64M, which the file decides), for 80 steps of 512 tokens,
at the best of three rates by validation loss. A deployment keeps an adapter if the 95% interval of
its score less unmerged LoRA's lies above -3 points. Reported beside: the loss and the score that
training had, the divergence from it, the size of the update in steps of the quantiser, and bytes.
"""

from dataclasses import replace
from functools import partial

import zflora_jax as zf
from studies import quantised_methods
from studies.configs.accuracy import BASE, GENERATED, LORA, MINIMAL, RATES
from studies.deployment import by_gptq, in_bfloat16, in_codes, in_eight_bits, rounded, unmerged
from studies.study import Study

DEPLOYMENTS = {
    "LoRA, unmerged": ("lora", unmerged),
    "LoRA, merged, bfloat16": ("lora", in_bfloat16),
    "LoRA, merged, rounded": ("lora", rounded),
    "LoRA, merged, GPTQ": ("lora", by_gptq),
    "LoRA, merged, GPTQ on the base's scales": ("lora", partial(by_gptq, same_grid=True)),
    "LoRA through the rounding": ("lora-through-rounding", in_codes),
    "QA-LoRA": ("qa-lora", in_codes),
    "scales": ("scales", in_codes),
    "scales and minima": ("scales-minima", in_codes),
    "zflora-minimal": ("zflora-minimal", in_codes),
    "zflora-minimal, unmerged": ("zflora-minimal", unmerged),
    "zflora-minimal, 8-bit blocks": ("zflora-minimal", in_eight_bits),
    "zflora-uniform": ("zflora-uniform", in_codes),
    "ffba": ("ffba", in_codes),
}


def get_studies() -> list[Study]:
    """The tables of results/compressed_bases.md."""
    for name, kernel in quantised_methods.METHODS.items():
        zf.add_method(name, kernel)
    methods = {
        "lora": LORA,
        "zflora-minimal": MINIMAL,
        "qa-lora": zf.AdapterConfig("qa-lora", rank=30),
        "scales": zf.AdapterConfig("scales"),
        "scales-minima": zf.AdapterConfig("scales-minima"),
        "lora-through-rounding": replace(LORA, method="lora-through-rounding"),
        "zflora-uniform": zf.AdapterConfig("zflora-uniform", rank=14, extra_head_dim=4),
        "ffba": zf.AdapterConfig("ffba", rank=62, extra_head_dim=4),
    }
    codes = zf.QuantizeConfig("keep", embedding="keep")
    data = replace(BASE.data, task="arithmetic", bucket_lengths=(128,), batch_size=4)
    return [
        Study(
            "compressed_arithmetic",
            replace(BASE, data=data, quantize=codes, train=replace(BASE.train, steps=80)),
            methods=methods,
            learning_rates=RATES,
            seeds=(0, 1, 2),
            tasks=("arithmetic",),
            scoring=replace(GENERATED, limit=None, max_new_tokens=56),
            reference="LoRA, unmerged",
            margin=3.0,
            deployments=DEPLOYMENTS,
            page="compressed_bases",
        )
    ]
