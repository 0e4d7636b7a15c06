"""The rows of accuracy_cloze in LLM-Adapters' letter form, where a model answers "answer2" and not
with an option's text: does a model of this size learn it?

  zflora sweep --config configs/letter_form.py --set data.data_dir=DIR --workdir runs/letter

DIR holds llm_adapters/. Runs are those of accuracy_cloze in configs/accuracy.py, at the rate that
both methods chose there, with the first seed: docs/experiments.md, "Tasks".
"""

from dataclasses import replace
from pathlib import Path

from zflora_jax.cli.inputs import load_config
from zflora_jax.experiments.comparison import Comparison

TASKS = ("arc_easy", "arc_challenge", "openbookqa")

READING = (
    "Does a model of this size learn LLM-Adapters' letter form? Not in 240 steps at the rate of the"
    " cloze table, with one seed: the likeliest letter is right in 24.8% of the rows with LoRA and"
    " in 24.9% with zflora-minimal, which is chance; the same rows in cloze form take both to 46%."
    " What training teaches is the form of an answer. The untrained model's generated answers are"
    " right in 12%, as half of them name no letter; those of both methods in 25%, and they name"
    " answer1 in 98 and 91% of the rows (counted in the rows that runs keep under eval/). So"
    " generated answers gain 12 points here that say nothing about methods. Nor does OpenBookQA"
    " tell methods apart, where LoRA beats the untrained model: that is below chance (20.8%), and"
    " LoRA at it (27.2, within 23.4 and 31.0)."
)


def get_sweep() -> list[Comparison]:
    cloze = load_config(str(Path(__file__).with_name("accuracy.py")), "get_cloze")
    data = replace(cloze.base.data, task="+".join(TASKS))
    return [
        Comparison(
            "letter_form",
            replace(cloze.base, data=data),
            cloze.methods,
            (1.5e-3,),
            (0,),
            tasks=TASKS,
            # The letters' likelihoods, and what LLM-Adapters scores: the answer that is generated.
            scoring=replace(cloze.scoring, generate=True, max_new_tokens=32),
            measure="likelihood_norm",
            reference="lora",
            reading=READING,
        )
    ]
