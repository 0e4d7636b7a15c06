"""Sweeps: learning rates chosen, runs recorded and not repeated, tasks scored on clean rows, work
shared between processes, tables written.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from support.runs import EVAL, choice

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.tasks import load_examples
from zflora_jax.experiments import compare, jobs
from zflora_jax.experiments.compare import compare_methods
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.overview import overview
from zflora_jax.experiments.store import Job, Scoring
from zflora_jax.experiments.train import Trained
from zflora_jax.nn.quantize_model import quantize_model
from zflora_jax.reporting.provenance import environment

LORA = {"lora": AdapterConfig("lora", rank=2)}
SCORING = dataclasses.replace(EVAL, generate=False, loss=False)


def test_a_comparison_scores_tasks_and_is_not_run_again(two_steps, tmp_path, monkeypatch):
    two_steps = override(two_steps, {"train.steps": 4, "data.packing": True})
    plan = Comparison(
        "small",
        two_steps,
        {"minimal": AdapterConfig("zflora-minimal", rank=2)},
        (1e-3, 1e-2),
        (0, 1),
        pick_steps=2,
        tasks=("arc_easy",),
        scoring=SCORING,
    )
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert [row["method"] for row in result["rows"]] == ["base", "minimal"] and result[
        "missing"
    ] == []
    assert len(result["runs"]) == 4 and {run["steps"] for run in result["runs"]} == {2, 4}
    row = result["rows"][1]
    picked = {
        run["validation_loss"]: run["learning_rate"] for run in result["runs"] if run["steps"] == 2
    }
    assert len(picked) == 2 and row["learning rate"] == picked[min(picked)]
    assert row["scores"].keys() == {"arc_easy"} and row["rows"] == {"arc_easy": 9}
    scored = [run for run in result["runs"] if run["steps"] == 4]
    assert row["mean"] == pytest.approx(
        50
        * sum(
            run["scores"]["arc_easy"]["scores"]["clean"]["likelihood_sum"]["mean"] for run in scored
        )
    )
    assert (tmp_path / "out" / "small.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out" / "small.md").read_text()
    assert "## likelihood_sum, percent" in page and "arc_easy (9)" in page

    monkeypatch.setattr(jobs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(jobs, "evaluate_tasks", lambda *_, **__: pytest.fail("scored again"))
    again = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert again["rows"] == json.loads(json.dumps(result["rows"]))
    # The same files, the same numbers.
    elsewhere = override(
        plan.base, {"data.data_dir": f"{plan.base.data.data_dir}/.", "train.log_every": 3}
    )
    assert (
        compare_methods(
            dataclasses.replace(plan, base=elsewhere),
            tmp_path / "runs",
            tmp_path / "out",
            console=False,
        )["rows"]
        == again["rows"]
    )
    record = tmp_path / "out" / "small" / "minimal-lr0.01-steps2-seed0.json"
    saved = json.loads(record.read_text())
    assert saved["result"]["device"] and saved["result"]["date"]
    # A record that is older than a setting; packing's default differs.
    del (
        saved["config"]["data"]["packing"],
        saved["config"]["eval"]["num_beams"],
    )
    record.write_text(json.dumps(saved))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "comparison.methods is empty"),
        ({"methods": {"base": AdapterConfig("lora")}}, "the untrained model's row"),
        ({"tasks": ("arc_easy",)}, "go together"),
        (
            {"pick_steps": 1000},
            "pick_steps=1000: must be above optim.warmup_steps=10 and at most train.steps=100",
        ),
    ],
)
def test_wrong_comparisons(changes, message):
    with pytest.raises(ConfigError, match=message):
        Comparison(
            **(
                {
                    "name": "x",
                    "base": RunConfig(),
                    "methods": {"lora": AdapterConfig("lora")},
                    "learning_rates": (1e-3,),
                    "seeds": (0,),
                }
                | changes
            )
        )


def test_some_methods_of_a_comparison():
    methods = {
        "lora": AdapterConfig("lora"),
        "ffa": AdapterConfig("ffa"),
        "ffba": AdapterConfig("ffba"),
    }
    plan = Comparison(
        "x",
        RunConfig(),
        methods,
        (1e-3,),
        (0,),
        tasks=("boolq",),
        scoring=EVAL,
        reference="lora",
        settings={"ffba": {"optim.weight_decay": 0.1}},
        contrasts=(("ffa", "ffba"), ("ffa", "lora")),
    )
    assert plan.only(None) is plan
    some = plan.only(["ffa", "lora"])
    assert list(some.methods) == ["lora", "ffa"] and not some.settings
    assert some.contrasts == (("ffa", "lora"),)
    with pytest.raises(ConfigError, match="no method 'ffaa'; did you mean 'ffa'"):
        plan.only(["lora", "ffaa"])
    with pytest.raises(ConfigError, match="its reference 'lora' is left out; name it too"):
        plan.only(["ffa"])


def test_a_comparison_whose_grid_runs_are_whole_is_finished_too(two_steps, tmp_path, fake_train):
    """The chosen run is one of the grid's: its record with scores serves both."""
    scoring = dataclasses.replace(SCORING, limit=4)
    plan = Comparison("whole", two_steps, LORA, (1e-3,), (0,), tasks=("arc_easy",), scoring=scoring)
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    fake_train.runs.clear()
    again = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert again["rows"] == json.loads(json.dumps(result["rows"])) and not fake_train.runs
    # Without tasks, too.
    compare_methods(
        dataclasses.replace(plan, tasks=(), scoring=None),
        tmp_path / "runs",
        tmp_path / "out",
        console=False,
    )
    assert not fake_train.runs


def test_clean_means_clean_of_the_whole_training_file(two_steps, model, tmp_path):
    """A test question that was held out of the training file is no clean one: the file's readers
    have seen it.
    """
    held_out = load_examples("arc_easy", "validation", two_steps.data)[0]
    assert held_out.prompt not in {
        example.prompt for example in load_examples("arc_easy", "train", two_steps.data)
    }
    rows = [choice(i) for i in range(3)] + [
        {
            "instruction": held_out.prompt,
            "input": "",
            "output": held_out.target,
            "answer": held_out.answer,
        }
    ]
    (tmp_path / "ARC-Easy" / "test.json").write_text(json.dumps(rows))
    scores = jobs.score(two_steps, model, Scoring(("arc_easy",), SCORING), tmp_path / "e", False)
    assert (scores["arc_easy"]["rows"], scores["arc_easy"]["clean_rows"]) == (4, 3)
    assert {len(of) for of in scores["arc_easy"]["row scores"].values()} == {3}


def test_a_table_shows_intervals_chance_and_answers_cut(two_steps, tmp_path, fake_train):
    scoring = dataclasses.replace(EVAL, loss=False, likelihood=False, max_new_tokens=3)
    plan = Comparison("shown", two_steps, LORA, (1e-3,), (0,), tasks=("arc_easy",), scoring=scoring)
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    page = (tmp_path / "out" / "shown.md").read_text()
    row = result["rows"][0]
    score = row["scores"]["arc_easy"]
    low, high = row["intervals"]["accuracy"]["arc_easy"]
    assert low <= score <= high and low < high
    assert f"{score:.1f} [{low:.1f}, {high:.1f}]" in page and "Chance: arc_easy 33.3." in page
    assert row["cut"]["arc_easy"] > 0
    cut = f"base: arc_easy {row['cut']['arc_easy']:g}"
    assert f"limit of new tokens, mean of seeds: {cut}" in page
    assert "Runs made at commit c0ffee, device cpu, jax 0.10.2 (1)." in page
    assert page.count("Command: `") == 1


def test_a_method_that_diverges_leaves_a_page(two_steps, tmp_path, monkeypatch, fake_train):
    """The short run that chooses the rate is well, and the whole one fails."""
    short = jobs.train

    def diverges(run, *args, **settings):
        if run.train.steps == 3:
            raise NonFiniteError("loss is nan at step 2")
        return short(run, *args, **settings)

    monkeypatch.setattr(jobs, "train", diverges)
    three = override(two_steps, {"train.steps": 3})
    plan = Comparison("fails", three, LORA, (1e-3,), (0,), pick_steps=2)
    (row,) = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)["rows"]
    assert row["test, seed 0"] is None and row["learning rate"] == 1e-3
    # Of the whole run beside the short one's that chose the rate.
    assert row["validation, seed 0"] is None and row["validation, lr 0.001"] > 0
    assert (tmp_path / "out" / "fails.md").is_file()
    record = json.loads((tmp_path / "out" / "fails" / "lora-lr0.001-seed0.json").read_text())
    assert record["result"] == {"failed": "loss is nan at step 2"}


def test_the_seeds_deviation_stands_beside_their_mean(two_steps, tmp_path, monkeypatch, fake_train):
    """Two seeds with the scores that are given here."""
    shares = {0: 0.25, 1: 0.75}

    def scored(run, model, *_):
        mean = shares[run.train.seed]
        score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        return {"arc_easy": {"clean_rows": 8, "scores": {"clean": {"accuracy": score}}}}

    for module in (compare, jobs):
        monkeypatch.setattr(module, "score", scored)
    plan = Comparison(
        "seeds", two_steps, LORA, (1e-3,), (0, 1), tasks=("arc_easy",), scoring=SCORING
    )
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    untrained, row = result["rows"]
    assert (untrained["mean"], row["mean"]) == (25, 50)
    assert row["std"] == pytest.approx(50 / 2**0.5)
    assert row["intervals"]["accuracy"]["arc_easy"] == pytest.approx([40, 60])
    page = (tmp_path / "out" / "seeds.md").read_text()
    assert "| 50.0 [40.0, 60.0] | 50.0 ± 35.4 |" in page and "| 25.0 |" in page


def test_a_rate_at_the_edge_of_its_grid_is_said(two_steps, tmp_path, fake_train, caplog):
    """The best of 1e-3, 1e-2 and 1e-1 by losses that are given here, and one rate alone."""
    losses = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}
    fake_train.loss = lambda run: losses[run.optim.learning_rate]

    def page(name: str, rates: tuple[float, ...]) -> str:
        compare_methods(Comparison(name, two_steps, LORA, rates, (0,)), tmp_path, tmp_path / "out")
        return (tmp_path / "out" / f"{name}.md").read_text()

    assert "tried" not in page("between", (1e-3, 1e-2, 1e-1))
    assert not [record for record in caplog.records if "tried" in record.getMessage()]
    edge = "the rate 0.01 is the lowest one tried, so a lower one may be better."
    assert f"lora: {edge}" in page("low", (1e-2, 1e-1))
    assert "lora: the rate 0.01 is the highest one tried" in page("high", (1e-3, 1e-2))
    assert "lora: the rate 0.01 is the only one tried, so it is not tuned." in page("one", (1e-2,))
    assert any("learning rate 0.01, the lowest one tried" in r.getMessage() for r in caplog.records)


def test_the_overview_is_no_comparison_s_own_page(two_steps, tmp_path):
    plans = [
        Comparison(name, two_steps, LORA, (1e-3,), (0,)) for name in ("small_one", "small_two")
    ]
    assert overview(plans, tmp_path) is None
    (tmp_path / "small_two.md").write_text("# two")
    assert overview(plans, tmp_path) == tmp_path / "small.md"
    page = (tmp_path / "small.md").read_text()
    assert "| [two](small_two.md) |" in page and "small_one" not in page
    [line] = [line for line in page.splitlines() if line.startswith("| one |")]
    assert line.endswith("| all |")
    with pytest.raises(ConfigError, match=r"its page would be the overview's, small.md"):
        overview([Comparison("small", two_steps, LORA, (1e-3,), (0,)), plans[0]], tmp_path)


@pytest.mark.parametrize("kind", ["int8", "none"])
def test_lora_is_scored_and_the_base_kept_for_other_runs(two_steps, model, tmp_path, kind):
    """On a base of codes it is merged into the numbers that they stand for."""
    run = override(two_steps, {"quantize.kernels": kind})
    base = dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params))
    base = quantize_model(base, run.quantize) if run.quantize.active else base
    adapters = init_adapters(jax.random.key(0), base, LORA["lora"])
    run = dataclasses.replace(run, adapter=LORA["lora"])
    trained = Trained(base, adapters, {"environment": environment()}, run)
    job = Job("lora", run, tmp_path, tmp_path / "r.json", Scoring(("arc_easy",), SCORING))
    measured = jobs._measured(job, trained, False)
    assert measured["scores"]["arc_easy"]["rows"] > 0
    assert measured["cpu"] == environment()["cpu"]
    kept = jax.tree.leaves(base.params)
    assert len(kept) >= len(jax.tree.leaves(model.params))
    assert not any(leaf.is_deleted() for leaf in kept)
