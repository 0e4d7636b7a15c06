"""What the pages of comparisons say beside their tables, from the fields of their JSON."""

import dataclasses
import json

import pytest

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.evaluation.paired import Difference
from zflora_jax.experiments import page
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.difference_view import loss_text
from zflora_jax.experiments.differences import Differences, loss_difference
from zflora_jax.experiments.overview import overview
from zflora_jax.reporting.provenance import environment

PLAN = Comparison(
    "pages_one",
    RunConfig(),
    {label: AdapterConfig(label) for label in ("lora", "ffa")},
    (1e-3,),
    (0, 1, 2),
    tasks=("boolq",),
    transfer=("piqa",),
    scoring=EvalConfig(),
    reference="lora",
)


def written(plan: Comparison, command: str) -> str:
    """The page of a comparison without a run."""
    env = environment() | {"command": command}
    losses = {"validation": 1.0, "test": 2.0}
    found = {"rows": [], "missing": [], "runs": [], "base": losses, "environment": env}
    return "\n\n".join(page.comparison_page(plan, found, {}, Differences({}, {}, {})))


def test_what_the_command_of_a_page_makes():
    assert ". It makes the runs that have no record in pages_one/" in written(PLAN, "sweep")
    assert ". Without --tables it makes the runs" in written(PLAN, "sweep --tables")


@pytest.mark.parametrize(
    ("task", "style"),
    [
        ("boolq", "chat,"),
        ("arc_easy_cloze+openbookqa_cloze", "plain, as of all cloze tasks,"),
        ("arc_easy_cloze+boolq", "chat,"),
    ],
)
def test_cloze_tasks_have_no_template(task, style):
    plan = dataclasses.replace(PLAN, base=override(PLAN.base, {"data.task": task}))
    assert f"prompt style {style} loss on" in written(plan, "sweep")


def test_transfer_tasks_are_said_not_to_count():
    assert page._transfer(PLAN) == "mean: of boolq; the tasks right of it are not counted. "
    assert page._transfer(dataclasses.replace(PLAN, transfer=())) == ""


def test_where_runs_were_made_names_their_cpu_where_it_is_known():
    run = {"commit": "abc", "device": "cpu", "jax": "1"}
    said = page.runs_made_at([run | {"cpu": "AMD EPYC"}, run | {"cpu": None}, run])
    assert "device cpu, cpu AMD EPYC, jax 1 (1)" in said and "device cpu, jax 1 (2)" in said


def test_losses_wait_for_all_seeds():
    def runs(*losses):
        return [{"seed": seed, "test_loss": loss} for seed, loss in enumerate(losses)]

    assert loss_difference(runs(1.0, None), runs(1.0, 2.0)) is None  # one seed has both
    two = loss_difference(runs(1.5, 2.5, None), runs(1.0, 2.0, 3.0))
    assert (two.mean, two.seeds) == (0.5, 2) and loss_text(PLAN, "ffa", two) is None
    three = loss_difference(runs(1.5, 2.5, 3.5), runs(1.0, 2.0, 3.0))
    assert loss_text(PLAN, "ffa", three) == "+0.5 [+0.5, +0.5]"


@pytest.mark.parametrize("compared", [True, False])
def test_the_overview_has_losses_and_the_fastest_seconds(compared, tmp_path):
    """And no column about a reference where there is none."""
    row = {"method": "ffa", "trainable": 1, "scores": {"boolq": 1}, "mean": 50.0, "std": None}
    row |= {"test, seed 0": 1.0, "seconds, fastest run": 55.0}
    losses = {"ffa": dataclasses.asdict(Difference(0.25, 0.125, 0.375, 0.01, 3))}
    found = {"rows": [row], "base": {"test": 2.0}, "loss differences": losses if compared else {}}
    (tmp_path / "pages_one.json").write_text(json.dumps(found))
    (tmp_path / "pages_one.md").touch()
    scores = overview([PLAN], tmp_path).read_text().split("## Scores")[1]
    assert "| 55 |" in scores
    assert ("| +0.25 [+0.125, +0.375] |" in scores) == compared
    assert ("less the reference's |" in scores) == compared == ("Student's t" in scores)
