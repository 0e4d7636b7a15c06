"""The rows of accuracy_cloze in LLM-Adapters' letter form, where a model answers "answer2" and not
with an option's text: does a model of this size learn it?

  python -m studies.run letter_form --set data.data_dir=DIR --workdir runs/letter

DIR holds llm_adapters/. Runs are those of accuracy_cloze, at the rate that both methods chose
there, with the first seed: docs/experiments.md, "Tasks".
"""

from dataclasses import replace

from studies.configs.accuracy import CHOSEN, PAIR, get_cloze
from studies.study import Study

TASKS = ("arc_easy", "arc_challenge", "openbookqa")


def get_studies() -> list[Study]:
    """The table of results/letter_form.md."""
    base = get_cloze().base
    return [
        Study(
            "letter_form",
            replace(base, data=replace(base.data, task="+".join(TASKS))),
            PAIR,
            (1.5e-3,),
            (0,),
            tasks=TASKS,
            # The letters' likelihoods, and what LLM-Adapters scores: the generated answer.
            scoring=replace(CHOSEN, generate=True, max_new_tokens=32),
            measure="likelihood_norm",
            reference="lora",
        )
    ]
