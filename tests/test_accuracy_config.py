"""configs/accuracy.py: equal budgets, and the tables that docs/experiments.md announces."""

import importlib.util
import re
from pathlib import Path

import pytest

from zflora_jax.adapters.counts import count_params
from zflora_jax.core.presets import preset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "configs" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_have_the_same_number_of_parameters(accuracy):
    config = preset("smollm2-135m")
    budgets = {"accuracy_rank4": 1_221_120, "accuracy_rank64": 19_537_920}
    for plan in accuracy.get_sweep():
        budget = budgets.get(plan.name, 4_884_480)
        for label, adapter in plan.methods.items():
            share = count_params(config, adapter) / budget
            within = 0.05 if plan.name == "accuracy_rank4" else 0.033
            assert label == "ffa" or abs(share - 1) < within, (plan.name, label, share)


def test_tables_are_those_of_the_page(accuracy):
    plans = {plan.name.removeprefix("accuracy_"): plan for plan in accuracy.get_sweep()}
    page = (ROOT / "docs" / "experiments.md").read_text()
    for name in plans:
        assert re.search(rf"\b{name}\b", page), name
    assert all(plan.margin == (1.5 if plan.measure == "rougeL" else 3.0) for plan in plans.values())
    assert all(len(plan.seeds) == 3 and len(plan.learning_rates) == 3 for plan in plans.values())
    six = {name for name, plan in plans.items() if plan.compared_seed_count("zflora-minimal") == 6}
    assert six == {"cloze", "arithmetic", "woz"}
    tokens = {
        plan.base.data.batch_size * plan.base.data.bucket_lengths[-1] for plan in plans.values()
    }
    assert tokens == {1024} and {plan.base.train.steps for plan in plans.values()} == {240}
