"""configs/accuracy.py: equal budgets, and the tables that docs/experiments.md announces; and the
configs that look closer at its cloze table.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from support.paths import ROOT

from zflora_jax.adapters.counts import count_params
from zflora_jax.cli.inputs import load_config
from zflora_jax.core.presets import preset
from zflora_jax.data.builders.generated import LEVELS
from zflora_jax.evaluation.paired import paired_difference, seed_difference
from zflora_jax.evaluation.statistics import ROWS, UNITS


def tables(name):
    return load_config(str(ROOT / "configs" / f"{name}.py"), "get_sweep")


@pytest.fixture(scope="module")
def accuracy():
    return tables("accuracy")


@pytest.fixture(scope="module")
def cloze(accuracy):
    [found] = [plan for plan in accuracy if plan.name == "accuracy_cloze"]
    return found


def test_methods_have_the_same_number_of_parameters(accuracy):
    config = preset("smollm2-135m")
    budgets = {"accuracy_rank4": 1_221_120, "accuracy_rank64": 19_537_920}
    for plan in accuracy:
        budget = budgets.get(plan.name, 4_884_480)
        for label, adapter in plan.methods.items():
            share = count_params(config, adapter) / budget
            within = 0.05 if plan.name == "accuracy_rank4" else 0.033
            assert label == "ffa" or abs(share - 1) < within, (plan.name, label, share)


def test_tables_are_those_of_the_page(accuracy):
    plans = {plan.name.removeprefix("accuracy_"): plan for plan in accuracy}
    page = (ROOT / "docs" / "experiments.md").read_text()
    for name in plans:
        assert re.search(rf"\b{name}\b", page), name
    assert all(plan.margin == (1.5 if plan.measure == "rougeL" else 3.0) for plan in plans.values())
    assert all(len(plan.seeds) == 3 for plan in plans.values())
    rates = {name: plan.learning_rates for name, plan in plans.items()}
    assert rates.pop("rank4") == (1.5e-3, 4.5e-3) and rates.pop("rank64") == (5e-4, 1.5e-3)
    assert set(rates.values()) == {(5e-4, 1.5e-3, 4.5e-3)}
    six = {name for name, plan in plans.items() if plan.compared_seed_count("zflora-minimal") == 6}
    assert six == {"cloze", "arithmetic", "woz"}
    tokens = {
        plan.base.data.batch_size * plan.base.data.bucket_lengths[-1] for plan in plans.values()
    }
    assert tokens == {1024} and {plan.base.train.steps for plan in plans.values()} == {240}


def test_changes_of_minimal_keep_its_budget_and_runs(cloze):
    changes, rate, plus = tables("minimal")
    whole = cloze.methods["zflora-minimal"]
    budget = count_params(preset("smollm2-135m"), whole)
    for label, adapter in changes.methods.items():
        assert adapter != whole, label
        share = count_params(preset("smollm2-135m"), adapter) / budget
        assert abs(share - 1) < 0.01, (label, share)
    assert changes.base == rate.base == cloze.base
    assert rate.methods == {"zflora-minimal": whole}
    low, high, _ = cloze.learning_rates
    assert changes.learning_rates == (high,) and low < rate.learning_rates[0] < high
    assert plus.base == cloze.base and plus.methods == {"zflora-minimal-plus": whole}
    assert plus.learning_rates[-1] == low


def test_zflora_minimal_plus_has_the_rates_of_loraplus(accuracy):
    of = {plan.name: plan.settings for plan in (*accuracy, *tables("minimal")) if plan.settings}
    ratio = {"optim.loraplus_ratio": 16.0}
    assert of["accuracy_arithmetic"] == {"loraplus": ratio, "zflora-minimal-plus": ratio}
    assert of["minimal_cloze_plus"] == {"zflora-minimal-plus": ratio}
    assert len(of) == 2


def test_letter_form_is_the_same_runs_on_the_same_rows(cloze):
    [letters] = tables("letter_form")
    assert tuple(f"{task}_cloze" for task in letters.tasks) == cloze.tasks
    assert letters.base.data.task == cloze.base.data.task.replace("_cloze", "")
    same = replace(letters.base, data=replace(letters.base.data, task=cloze.base.data.task))
    assert same == cloze.base and letters.methods == cloze.methods
    assert letters.scoring.limit == cloze.scoring.limit and letters.scoring.likelihood


@pytest.mark.parametrize("name", ["accuracy", "letter_form", "minimal"])
def test_pages_say_what_their_config_reads_in_them(name):
    found = tables(name)
    plans = found if isinstance(found, list) else [found]
    overview = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
    pages = [plan for plan in plans if (ROOT / "results" / f"{plan.name}.md").is_file()]
    assert any(plan.reading for plan in pages)
    for plan in pages:
        page = (ROOT / "results" / f"{plan.name}.md").read_text(encoding="utf-8")
        assert plan.reading in page and plan.about in overview, plan.name
        assert plan.reading.partition("\n\n")[0] in overview, plan.name


def losses(name: str, split: str) -> list[float]:
    """Of three seeds at 1.5e-3."""
    found = [ROOT / "results" / f"{name}-lr0.0015-seed{seed}.json" for seed in (0, 1, 2)]
    return [json.loads(path.read_text())["result"][f"{split}_loss"] for path in found]


@pytest.mark.parametrize(
    ("label", "gain"),
    [
        ("state-alone", "{0:.3f} [{1:+.3f}, {2:+.3f}] on"),
        ("without-qkv", "by {0:.3f} [{1:.3f}, {2:.3f}]"),
    ],
)
def test_what_changes_of_minimal_gain_is_what_their_records_say(label, gain):
    reading = " ".join(tables("minimal")[0].reading.split())
    docs = " ".join((ROOT / "docs" / "experiments.md").read_text().split())
    for split in ("validation", "test"):
        before = losses("accuracy_cloze/zflora-minimal", split)
        found = seed_difference(before, losses(f"minimal_cloze/{label}", split))
        said = gain.format(found.mean, found.low, found.high)
        assert said.removesuffix(" on") in reading and said.removeprefix("by ") in docs, said


def row_scores(table: str, label: str) -> dict[int, np.ndarray]:
    """Seed -> points of each arithmetic problem, of a method's scored runs."""
    found = json.loads((ROOT / "results" / f"{table}.json").read_text(encoding="utf-8"))
    scored = [run for run in found["runs"] if run["method"] == label and run.get("scores")]
    texts = {run["seed"]: run["scores"]["arithmetic_steps"][ROWS]["accuracy"] for run in scored}
    return {seed: 100.0 * np.asarray(list(map(int, text))) for seed, text in texts.items()}


def test_arithmetic_is_read_by_number_of_steps(accuracy):
    """Row i of the test problems has 1 + i % LEVELS steps; the figures are those of the records."""

    def solved(runs: Iterable[np.ndarray]) -> list[str]:
        rows = np.stack(list(runs))
        return [f"{rows[:, i::LEVELS].mean():.1f}" for i in range(LEVELS)]

    [reading] = [plan.reading for plan in accuracy if plan.name == "accuracy_arithmetic"]
    for label in ("lora", "zflora-minimal"):
        shares = solved(row_scores("accuracy_arithmetic", label).values())
        assert f"{', '.join(shares[:-1])} and {shares[-1]}%" in reading
    attention = row_scores("accuracy_arithmetic", "zflora-minimal-attention").values()
    assert f"({', '.join(solved(attention))})" in reading
    base = json.loads((ROOT / "results/accuracy_arithmetic/base.json").read_text(encoding="utf-8"))
    text = base["result"]["scores"]["arithmetic_steps"][ROWS]["accuracy"]
    assert solved([100.0 * np.asarray(list(map(int, text)))]) == ["4.5", *["0.5"] * 4]
    assert "model 4.5% and then 0.5" in reading


@pytest.mark.parametrize(
    ("name", "on_rows_alone"),
    [("accuracy_rank64", "zflora-minimal"), ("accuracy_rank4", "lora")],
)
def test_what_other_ranks_change_is_read_from_the_records(accuracy, name, on_rows_alone):
    [reading] = [plan.reading for plan in accuracy if plan.name == name]
    for label in ("lora", "zflora-minimal"):
        here, at_16 = (
            np.stack([row_scores(table, label)[seed] for seed in (0, 1, 2)])
            for table in (name, "accuracy_arithmetic")
        )
        change = paired_difference([here], [at_16], best=100.0)
        assert str(change) in reading and change.of_rows_alone == (label == on_rows_alone)


def test_some_record_of_woz_has_its_dialogues(accuracy):
    """So that its differences draw them whole (`differences.units_of`)."""
    base = json.loads((ROOT / "results/accuracy_woz/base.json").read_text(encoding="utf-8"))
    units = base["result"]["scores"]["woz"][UNITS]["accuracy"].split()
    assert len(units) == 1000 and len(set(units)) == 250
    [reading] = [plan.reading for plan in accuracy if plan.name == "accuracy_woz"]
    assert "draw whole dialogues (250 of them)" in reading
