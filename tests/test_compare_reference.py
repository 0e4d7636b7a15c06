"""Comparisons with a reference: differences on the same rows and seeds, the order of the runs."""

import dataclasses

import pytest
from support.runs import EVAL

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import Preempted
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments import compare, jobs
from zflora_jax.experiments.compare import compare_methods
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.overview import overview

LORA = {"lora": AdapterConfig("lora", rank=2)}


def test_differences_to_a_reference_stand_on_the_page(two_steps, tmp_path, monkeypatch, fake_train):
    """Two methods, two seeds, row by row: the difference, its verdict, and what says nothing."""
    right = {("lora", 0): "1100", ("lora", 1): "1000", ("ffa", 0): "1110", ("ffa", 1): "1111"}

    def scored(run, model, scoring, *_):
        label = "base" if run.adapter.method == "zflora-minimal" else run.adapter.method
        values = right.get((label, run.train.seed), "1000")
        mean = values.count("1") / 4
        score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        kept = {"clean_rows": 4, "scores": {"clean": {"accuracy": score}}}
        return {task: kept | {"row scores": {"accuracy": values}} for task in scoring.tasks}

    for module in (compare, jobs):
        monkeypatch.setattr(module, "score", scored)
    methods = LORA | {"ffa": AdapterConfig("ffa", rank=2)}
    plan = Comparison(
        "paired_two",
        two_steps,
        methods,
        (1e-3,),
        (0, 1),
        tasks=("arc_easy",),
        transfer=("openbookqa",),
        scoring=EVAL,
        measure="accuracy",
        reference="lora",
        margin=2.0,
        settings={"ffa": {"optim.weight_decay": 0.1}},
    )
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    gap = result["differences"]["ffa"]
    assert gap.keys() == {"arc_easy"} and gap["arc_easy"]["mean"] == 50.0
    assert result["differences"]["base"]["arc_easy"]["mean"] == -12.5
    page = (tmp_path / "out" / "paired_two.md").read_text()
    assert "## Difference to lora" in page and "| ffa | +50.0 [" in page
    assert "lora does not clearly beat the untrained model on arc_easy" in page
    assert "openbookqa (4)" in page and "| 87.5 " in page  # of the transfer task, no mean of it
    assert (tmp_path / "out" / "paired_two.png").read_bytes()[:4] == b"\x89PNG"
    summary = overview([plan], tmp_path / "out").read_text()
    assert "| method | two |" in summary and "| ffa | +50.0 [" in summary
    assert "![Differences](paired.png)" in summary
    decays = {run.adapter.method: run.optim.weight_decay for run in fake_train.runs}
    assert decays == {"lora": 0.0, "ffa": 0.1}


def test_the_first_methods_are_finished_first_and_what_is_left_is_said(
    two_steps, tmp_path, monkeypatch, fake_train, caplog
):
    caplog.set_level("INFO")
    methods = LORA | {"ffa": AdapterConfig("ffa", rank=2)}
    two_steps = override(two_steps, {"train.steps": 4})
    plan = Comparison("order", two_steps, methods, (1e-3, 1e-2), (0, 1), pick_steps=2)
    seen = []

    def watched(plan, result, *_):
        seen.append((len(result["runs"]), tuple(result["missing"])))
        return ["# page"]

    monkeypatch.setattr(compare, "comparison_page", watched)
    compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert [(r.adapter.method, r.train.steps, r.train.seed) for r in fake_train.runs] == [
        (method, steps, seed)
        for method in ("lora", "ffa")
        for steps, seed in ((2, 0), (2, 0), (4, 0), (4, 1))
    ]
    assert (3, ("lora (seed 1)", "ffa")) in seen and seen[-1] == (8, ())
    messages = [r.getMessage() for r in caplog.records if "steps of all runs" in r.getMessage()]
    assert "2 of 24 steps of all runs, about 0 h 00 min left" in messages[0]
    assert messages[-1].endswith("24 of 24 steps of all runs")


def test_a_signal_after_the_last_step_stops_the_sweep(two_steps, tmp_path, monkeypatch, fake_train):
    """Before the run is scored and recorded: the same command does both."""
    monkeypatch.setattr(
        jobs, "train", lambda *a, **k: dataclasses.replace(fake_train(*a, **k), signalled=True)
    )
    plan = Comparison("stopped", two_steps, LORA, (1e-3, 1e-2), (0,))
    with pytest.raises(
        Preempted, match=r"after lora-lr0\.001-seed0 was trained, which is saved in"
    ):
        compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert len(fake_train.runs) == 1 and not list((tmp_path / "out").rglob("*.json"))
    monkeypatch.setattr(jobs, "train", fake_train)
    assert compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "lor"}, "'lor' is no method of it: did you mean 'lora'"),
        ({"settings": {"x": {}}}, "'x' is no method of it"),
        ({"measure": "acuracy"}, "comparison.measure='acuracy': did you mean 'accuracy'"),
        ({"margin": 2.0}, "margin=2.0: must be positive, and needs comparison.reference"),
    ],
)
def test_wrong_references(changes, message):
    with pytest.raises(ConfigError, match=message):
        Comparison("x", RunConfig(), LORA, (1e-3,), (0,), **changes)


def test_some_methods_of_a_comparison():
    methods = LORA | {"ffa": AdapterConfig("ffa"), "ffba": AdapterConfig("ffba")}
    plan = Comparison(
        "x",
        RunConfig(),
        methods,
        (1e-3,),
        (0,),
        reference="lora",
        settings={"ffba": {"optim.weight_decay": 0.1}},
    )
    assert plan.only(None) is plan
    some = plan.only(["ffa", "lora"])
    assert list(some.methods) == ["lora", "ffa"] and not some.settings
    with pytest.raises(ConfigError, match="no method 'ffaa'; did you mean 'ffa'"):
        plan.only(["lora", "ffaa"])
    with pytest.raises(ConfigError, match="'lora' is no method of it"):
        plan.only(["ffa"])
