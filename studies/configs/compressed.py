"""The loss and score that a trained adapter keeps when it is deployed on a compressed base.

  python -m studies.run compressed --workdir runs/compressed --set data.data_dir=DIR

Question, contenders and margin were fixed before the first run: on a file's
4-bit blocks (Q4_1), which deployment keeps what training gained, and for how many bytes? Methods
train next to the codes for 80 steps of 512 tokens, at the best of three rates by validation, with
LoRA r=16's number of parameters; the file decides that of scales and minima. A deployment keeps an
adapter if the 95% interval of its score minus unmerged LoRA's lies above -3 points. The same on
int4 and nf4 codes, which have scales for groups of 32 inputs and no minima, for fewer contenders.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import zflora_jax as zf
from studies import quantised_methods
from studies.configs.accuracy import BASE, CHOSEN, CLOZE, GENERATED, LORA, MINIMAL, RATES
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
    "zflora-minimal, no MLP units": ("without-units", in_codes),
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
        "without-units": zf.AdapterConfig("zflora-minimal", rank=27),
    }
    codes = zf.QuantizeConfig("keep", embedding="keep")
    data = replace(BASE.data, task="arithmetic", bucket_lengths=(128,), batch_size=4)
    arithmetic = Study(
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
    rows = replace(data, task="+".join(CLOZE), bucket_lengths=(256,), batch_size=2)
    few = ("LoRA, unmerged", "LoRA, merged, rounded", "LoRA, merged, GPTQ", "QA-LoRA")
    few += ("zflora-minimal",)
    now = methods | {"zflora-minimal": methods["without-units"]}

    def keeping(names: tuple[str, ...], methods: dict[str, zf.AdapterConfig]) -> dict[str, Any]:
        kept = {name: DEPLOYMENTS[name] for name in names}
        return {"deployments": kept, "methods": {of: methods[of] for of, _ in kept.values()}}

    cloze = replace(
        arithmetic,
        name="compressed_cloze",
        base=replace(arithmetic.base, data=rows),
        tasks=CLOZE,
        scoring=CHOSEN,
        measure="likelihood_norm",
        **keeping(few, methods),
    )
    woz = replace(
        cloze,
        name="compressed_woz",
        base=replace(cloze.base, data=replace(rows, task="woz")),
        tasks=("woz",),
        scoring=replace(GENERATED, limit=400, max_new_tokens=40),
        measure="accuracy",
        **keeping(few, now),
    )

    def without_minima(kind: str, *more: str) -> Study:
        names = (*few[:2], "scales", "zflora-minimal", *more)
        codes = zf.QuantizeConfig(kind, group=32, embedding="keep")
        base = replace(arithmetic.base, quantize=codes)
        return replace(arithmetic, name=f"compressed_{kind}", base=base, **keeping(names, now))

    gptq = ("LoRA, merged, GPTQ", "LoRA, merged, GPTQ on the base's scales")
    int4 = without_minima("int4", *gptq, "LoRA through the rounding")
    return [arithmetic, cloze, woz, int4, without_minima("nf4")]
