"""What the pages of comparisons say beside their tables, from the fields of their JSON."""

import dataclasses
import json
from collections.abc import Sequence

import pytest

from zflora_jax.cli.sweep import _changed
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.evaluation.paired import Difference
from zflora_jax.evaluation.statistics import Score, SuiteScore
from zflora_jax.experiments import page
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.difference_view import ROWS_ALONE, difference_blocks, loss_text
from zflora_jax.experiments.differences import ALL, Differences, loss_difference
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


READ = dataclasses.replace(PLAN, about="One model.", reading="As good.\n\nIn detail.")


def written(plan: Comparison, command: str, missing: Sequence[str] = ()) -> str:
    """The page of a comparison without a run."""
    env = environment() | {"command": command}
    losses = {"validation": 1.0, "test": 2.0}
    found = {"rows": [], "missing": missing, "runs": [], "base": losses, "environment": env}
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
        ("arc_easy_cloze*1+openbookqa_cloze*3", "plain, as of all cloze tasks,"),
    ],
)
def test_cloze_tasks_have_no_template(task, style):
    plan = dataclasses.replace(PLAN, base=override(PLAN.base, {"data.task": task}))
    assert f"prompt style {style} loss on" in written(plan, "sweep")


def test_the_rows_that_are_scored_are_of_their_split():
    scoring = EvalConfig(split="validation", limit=200, clean_only=True)
    assert page._rows_scored(scoring) == "The first 200 clean rows of each validation set"


def test_documents_that_were_cut_are_counted():
    run = {"train_rows": 450, "train_rows_dropped": 0, "test_rows": 1, "test_tokens": 1}
    env = environment() | {"command": "sweep"}
    found = {"rows": [], "missing": [], "base": {"validation": 1.0, "test": 2.0}}
    for cut, said in ((15, "left out, 15 cut to fit)"), (0, "left out)")):
        runs = [run | {"train_documents_cut": cut}]
        assert said in page._setting(PLAN, found | {"runs": runs, "environment": env})


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


def test_seeds_stand_side_by_side_also_where_the_first_method_has_fewer():
    def row(*losses):
        seeds = {f"test, seed {seed}": loss for seed, loss in enumerate(losses)}
        return {"method": "ffa", **seeds, "seconds, fastest run": 9.0}

    table = page._loss_table([row(1.0), row(1.5, 2.5)]).splitlines()
    assert table[0] == "| method | test, seed 0 | test, seed 1 | seconds, fastest run |"
    assert table[2:4] == ["| ffa | 1.0000 | - | 9 |", "| ffa | 1.5000 | 2.5000 | 9 |"]


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
    assert ("test loss less the reference's |" in scores) == compared == ("Student's t" in scores)


def found_page(plan: Comparison, folder, gaps: dict[str, Difference], **row) -> str:
    """The overview over one comparison that has a page with these differences."""
    differences = {label: {"boolq": dataclasses.asdict(gap)} for label, gap in gaps.items()}
    rows = [{"method": "ffa", "trainable": 1, "scores": {"boolq": 1}, "mean": 5.0} | row]
    found = {"rows": rows, "base": {"test": 2.0}, "differences": differences}
    (folder / f"{plan.name}.json").write_text(json.dumps(found))
    (folder / f"{plan.name}.md").touch()
    return overview([plan], folder).read_text()


def test_the_overview_begins_with_what_was_read(tmp_path):
    """What holds of all comparisons, then the first paragraph of each reading; the page has all."""
    plan = dataclasses.replace(READ, methods={"ffa": AdapterConfig("ffa")}, reference="")
    text = found_page(plan, tmp_path, {})
    assert text.startswith("# Pages\n\nOne model.\n\n- [one](pages_one.md): As good.\n\n")
    assert "In detail" not in text
    assert written(plan, "sweep").startswith("# pages_one\n\nAs good.\n\nIn detail.\n\n")
    other = dataclasses.replace(plan, name="pages_two")
    found_page(other, tmp_path, {})
    assert overview([plan, other], tmp_path).read_text().count("One model.") == 1


def test_what_was_read_stands_above_all_runs_alone(tmp_path):
    """Not where runs are missing, nor above those of other methods or settings."""
    text = found_page(READ, tmp_path, {})  # of ffa, and lora is not run
    assert "One model." not in text and "As good." not in text
    whole = dataclasses.replace(READ, methods={"ffa": AdapterConfig("ffa")}, reference="")
    found_page(whole, tmp_path, {})
    text = overview([whole, dataclasses.replace(READ, name="pages_two")], tmp_path).read_text()
    assert "One model." not in text and "- [one](pages_one.md): As good." in text
    path, found = tmp_path / "pages_one.json", json.loads((tmp_path / "pages_one.json").read_text())
    for key, kept in (("train.log_every", True), ("train.steps", False)):  # as `--set` leaves them
        config = to_dict(override(whole.base, {key: "70"}))
        path.write_text(json.dumps(found | {"config": config}))
        text = overview([whole], tmp_path).read_text()
        assert ("One model." in text) == ("As good." in text) == kept
    assert "As good." in written(READ, "sweep")
    assert "As good." not in written(READ, "sweep", missing=["lora"])
    assert READ.only(["lora", "ffa"]).reading and not READ.only(["lora"]).reading
    logged, trained = (
        _changed(READ, {key: "70"}, "") for key in ("train.log_every", "train.steps")
    )
    assert (logged.reading, logged.about) == (READ.reading, READ.about)
    assert (trained.reading, trained.about) == ("", "") and trained.base.train.steps == 70


@pytest.mark.parametrize(("high", "weak"), [(-1.0, "none"), (0.5, "boolq of one")])
def test_the_overview_names_tasks_that_rank_nothing(high, weak, tmp_path):
    gaps = {"base": Difference(-5.0, -9.0, high, 0.1), "ffa": Difference(0.0, -1.0, 1.0, 0.5)}
    assert f"so that they rank nothing: {weak}.\n" in found_page(PLAN, tmp_path, gaps)
    # Of other tasks than those that the page is of, and where the untrained model has no scores.
    other = dataclasses.replace(PLAN, tasks=("arc_easy",))
    assert f"rank nothing: {weak}.\n" in found_page(other, tmp_path, gaps)
    assert "rank nothing" not in found_page(PLAN, tmp_path, {"ffa": gaps["ffa"]})


def test_uninformative_tasks_are_in_order_and_their_mean_is_none(tmp_path):
    none = dataclasses.asdict(Difference(-1.0, -2.0, 0.5, 0.1))
    base = dict.fromkeys(("boolq", "arc_easy", "piqa", ALL), none)
    found = {"differences": {"base": base, "ffa": {"boolq": none}}}
    (tmp_path / "pages_one.json").write_text(json.dumps(found))
    (tmp_path / "pages_one.md").touch()
    text = overview([PLAN], tmp_path).read_text()
    assert "rank nothing: arc_easy of one, boolq of one, piqa of one.\n" in text


def test_a_difference_that_rests_on_rows_alone_is_marked(tmp_path):
    plan = dataclasses.replace(PLAN, margin=3.0)
    alone, both = (Difference(-4.0, -5.0, -2.0, 0.001, 3, std) for std in (0.0, 1.0))
    text = found_page(plan, tmp_path, {"ffa": alone})
    assert "| ffa | -4.0 [-5.0, -2.0] ° *, worse |" in text and ROWS_ALONE in text
    assert "| ffa | -4.0 [-5.0, -2.0] *, worse |" in found_page(plan, tmp_path, {"ffa": both})
    plan = dataclasses.replace(plan, contrasts=(("ffa", "lora"),))
    gaps, between = {"ffa": {"boolq": alone}}, {"ffa - lora": {"boolq": alone}}
    compared = Differences(gaps, between, {})
    assert Differences.read(json.loads(json.dumps(compared.fields()))) == compared
    text = "\n".join(difference_blocks(plan, compared, {"lora": suite(accuracy=50.0)}))
    assert "| ffa | -4.0 [-5.0, -2.0] ° | 3 |" in text and ROWS_ALONE in text
    assert "| ffa - lora | -4.0 [-5.0, -2.0] ° | 3 |" in text


def test_the_overview_says_which_rates_are_not_tuned(tmp_path):
    edge = "the lowest one tried, so a lower one may be better"
    said = {None: "0.001", edge: "0.001, the lowest one tried"}
    for untuned, cell in said.items():
        rate = {"learning rate": 1e-3, "untuned": untuned}
        assert f"| {cell} |" in found_page(PLAN, tmp_path, {}, **rate)


@pytest.mark.parametrize(
    ("rows", "missing", "said"),
    [
        (("ffa",), ["ffa (seed 2)"], "ffa (seed 2), lora"),  # of a page of ffa alone
        (("ffa", "lora"), [], "-"),
        (("ffa",), ["lora"], "lora"),
    ],
)
def test_the_overview_names_methods_that_a_page_was_made_without(tmp_path, rows, missing, said):
    found = {"rows": [{"method": label, "scores": {}} for label in rows], "missing": missing}
    (tmp_path / "pages_one.json").write_text(json.dumps(found))
    (tmp_path / "pages_one.md").touch()
    [line] = [
        line
        for line in overview([PLAN], tmp_path).read_text().splitlines()
        if line.startswith("| [one](pages_one.md)")
    ]
    assert line.endswith(f"| {said} |")


def test_pages_whose_titles_are_alike_have_no_overview(tmp_path):
    other = dataclasses.replace(PLAN, name="others_one")
    with pytest.raises(ConfigError, match="sweeps pages_one, others_one: the page over them shows"):
        overview([PLAN, other], tmp_path)
    assert overview([PLAN, dataclasses.replace(other, category="math")], tmp_path) is None


def test_a_score_that_equals_another_has_no_table_of_its_own():
    """The measure itself has one, and its legend."""
    rows = [{"method": "lora", "trainable": 1}, {"method": "ffa", "trainable": 1}]

    def tables(**scores: float) -> list[str]:
        both = {label: suite(**scores) for label in ("lora", "ffa")}
        return page._score_blocks(PLAN, rows, both)

    same = tables(likelihood_sum=50.0, accuracy=50.0, accuracy_legacy=40.0, rougeL=40.0)
    headings = [block for block in same if block.startswith("## ")]
    assert headings == ["## accuracy, percent", "## accuracy_legacy, percent"]
    assert "likelihood_sum: the same figures as accuracy." in same
    assert "rougeL: the same figures as accuracy_legacy." in same
    text = "\n".join(same)
    assert text.count("| 50.0 ± 1.0 |") == 2 and "this project's parser" in text
    assert "number in round brackets; greedy" in text and "±: the standard deviation of" in text
    assert "rougeL, rougeLsum: the F-measure of the best" in text and "F-measure" not in "".join(
        tables(accuracy=50.0)
    )


def suite(**means: float) -> SuiteScore:
    """Scores of boolq, the measure accuracy."""
    scores = {kind: {"boolq": Score(mean, mean - 9, mean + 9)} for kind, mean in means.items()}
    counted = {kind: {"boolq": 8} for kind in means}
    return SuiteScore("accuracy", scores, {"boolq": 8}, counted, 50.0, 1.0, {}, {})


@pytest.mark.parametrize("generate", [True, False])
def test_decoding_is_told_where_answers_are_generated(generate):
    plan = dataclasses.replace(PLAN, scoring=EvalConfig(generate=generate))
    rows = [{"method": "lora", "trainable": 1}]
    text = "\n".join(page._score_blocks(plan, rows, {"lora": suite(accuracy=50.0)}))
    assert ("greedy, at most 128 new tokens. Square brackets" in text) == generate
    assert ("in round brackets. Square brackets" in text) != generate
