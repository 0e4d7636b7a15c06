"""zflora-minimal in cloze form, where LoRA's held-out loss is lower: what the method leaves open,
changed one thing at a time, and judged by the validation loss.

  python -m studies.run minimal --set data.data_dir=DIR --workdir runs/minimal

DIR holds llm_adapters/. Runs are those of accuracy_cloze except for the adapter or its rates, and
are not scored: studies/experiments.md, "Where zflora-minimal trails".
"""

from dataclasses import replace

from studies.configs.accuracy import MINIMAL, SETTINGS, get_cloze
from studies.study import Study

# At zflora-minimal's number of parameters (r = 21, m = 21), within 1%.
CHANGES = {
    "more-units": replace(MINIMAL, rank=16, extra_mlp_units=38),
    "wider-state": replace(MINIMAL, rank=24, extra_mlp_units=10),
    "half-scale": replace(MINIMAL, alpha=float(MINIMAL.rank)),  # s = 1 for 2
    "kaiming-start": replace(MINIMAL, init="kaiming_uniform"),
    "state-alone": replace(MINIMAL, rank=27, extra_mlp_units=0),
    # Only the MLP reads the state: nothing of the heads changes except what o writes.
    "without-qkv": replace(MINIMAL, rank=25, extra_mlp_units=20, targets="o|gate|up|down"),
}


def get_studies() -> list[Study]:
    """The tables of results/minimal.md."""
    base, plus = get_cloze().base, "zflora-minimal-plus"
    gained = dict.fromkeys(("state-alone", "without-qkv"), (1, 2))  # with the first seed
    return [
        Study("minimal_cloze", base, CHANGES, (1.5e-3,), (0,), more_seeds=gained, page="minimal"),
        Study(
            "minimal_cloze_plus",
            base,
            {plus: MINIMAL},
            (1.7e-4, 5e-4),
            (0,),
            settings={plus: SETTINGS[plus]},
            page="minimal",
        ),
    ]
