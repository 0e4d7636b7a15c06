"""Comparisons with a reference: differences on the same rows and seeds, the order of the runs."""

import dataclasses
import json

import pytest
from support.runs import EVAL

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.evaluation.paired import Difference
from zflora_jax.evaluation.statistics import ROWS
from zflora_jax.experiments import compare, jobs
from zflora_jax.experiments.compare import compare_methods
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.overview import overview
from zflora_jax.experiments.progress import Progress

LORA = {"lora": AdapterConfig("lora", rank=2)}
RIGHT = {"lora": 20, "ffa": 30, "ffba": 5}  # of 40 rows, the first ones; the untrained model none


@pytest.fixture
def scored(monkeypatch):
    """Rows that methods answer rightly; one more with seed 1. Of openbookqa and boolq (transfer)
    everyone has ten. Runs draw no picture; calling this draws the last one.
    """

    def score(run, model, scoring, *_):
        label = "base" if run.adapter.method == "zflora-minimal" else run.adapter.method
        right = RIGHT.get(label, -1) + run.train.seed
        kept = {}
        for task in scoring.tasks:
            values = ("1" * max(right if task == "arc_easy" else 10, 0)).ljust(40, "0")
            mean = values.count("1") / 40
            scores = {"clean": {"accuracy": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}}
            kept[task] = {"clean_rows": 40, "scores": scores, ROWS: {"accuracy": values}}
        return kept

    monkeypatch.setattr(compare, "score", score)
    monkeypatch.setattr(jobs, "score", score)
    draw, last = compare._draw, []
    monkeypatch.setattr(compare, "_draw", lambda *given: last.append(given))
    return lambda: draw(*last[-1])


def reference_plan(two_steps, **changes):
    methods = LORA | {m: AdapterConfig(m, rank=2, **of) for m, of in (("ffa", {}), ("ffba", {}))}
    given = {
        "name": "paired_two",
        "tasks": ("arc_easy", "openbookqa"),
        "transfer": ("boolq",),
        "scoring": EVAL,
        "measure": "accuracy",
        "reference": "lora",
        "margin": 2.0,
        "settings": {"ffa": {"optim.weight_decay": 0.1}},
    } | changes
    name = given.pop("name")
    return Comparison(name, two_steps, methods, (1e-3,), (0, 1), **given)


def test_differences_to_a_reference_stand_on_the_page(two_steps, tmp_path, scored, fake_train):
    """The differences on the informative task, their verdicts, the overview, the settings."""
    plan = reference_plan(two_steps)
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert result["differences"]["ffa"].keys() == {"arc_easy"}  # openbookqa tells nothing
    assert result["differences"]["ffa"]["arc_easy"]["mean"] == 25.0
    assert result["differences"]["base"]["arc_easy"]["mean"] == -51.25
    means = {row["method"]: row["mean"] for row in result["rows"]}
    assert means["lora"] == (51.25 + 25) / 2  # not of boolq
    assert result["compared by"] == {"measure": "accuracy", "reference": "lora", "margin": 2.0}
    page = (tmp_path / "out" / "paired_two.md").read_text()
    [better] = [line for line in page.splitlines() if line.startswith("| ffa | +25.0 [")]
    [worse] = [line for line in page.splitlines() if line.startswith("| ffba | -")]
    assert "| as good | " in better and "| inferior | " in worse
    assert "lora does not clearly beat the untrained model on openbookqa" in page
    assert "| openbookqa (40) | mean | boolq (40) |" in page and "Failed:" not in page
    scored()
    assert (tmp_path / "out" / "paired_two.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "out" / "paired_two.svg").read_text()
    assert (
        "ffa °, as good" in drawn and "ffba °, inferior" in drawn and "shaded: the margin" in drawn
    )
    decays = {run.adapter.method: run.optim.weight_decay for run in fake_train.runs}
    assert decays == {"lora": 0.0, "ffa": 0.1, "ffba": 0.0}

    summary = overview([plan], tmp_path / "out").read_text()
    [line] = [line for line in summary.splitlines() if line.startswith("| ffba")]
    assert "-37.5 [" in line and "*, inferior" in line
    assert "![Differences](paired.png)" in summary and "| ffa | +25.0 [" in summary
    lines = summary.split("## Scores")[1].splitlines()
    [base] = [line for line in lines if line.startswith("| two | base | 0 | - |")]
    [lora] = [line for line in lines if line.startswith("| two | lora |")]
    assert "±" not in base and "| 38.1 ± 0.9 |" in lora and f"| {means['base']:.1f} |" in base


def test_contrasts_and_losses_are_compared(two_steps, tmp_path, scored, fake_train):
    """Methods with each other, as to the reference; losses over their seeds alone."""
    losses = {"lora": (1.0, 1.2), "ffa": (1.1, 1.4), "ffba": (1.0, 1.2)}
    fake_train.loss = lambda run: losses.get(run.adapter.method, (3.0, 3.0))[run.train.seed]
    pairs = (("ffba", "ffa"),)
    plan = reference_plan(two_steps, contrasts=pairs, category="math", tasks=("arc_easy",))
    result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    gap = result["contrasts"]["ffba - ffa"]["arc_easy"]
    assert gap["mean"] == -62.5 and gap["seeds"] == 2 and gap["high"] < 0
    assert result["loss differences"].keys() == {"ffa", "ffba"}
    loss = Difference(**result["loss differences"]["ffa"])
    reach = 12.706 * 0.05  # t of one degree of freedom times the standard error of 0.1 and 0.2
    assert (loss.mean, loss.high - loss.mean) == pytest.approx((0.15, reach), rel=1e-4)
    page = (tmp_path / "out" / "paired_two.md").read_text()
    between = page.split("## Differences between methods")[1].split("##")[0]
    assert "| ffba - ffa | -62.5 [" in between and "| 2 |" in between
    shown = f"+0.15 [{loss.low:+.3g}, {loss.high:+.3g}]"
    assert f"| as good | {shown} |" in page and "| inferior | +0 [+0, +0] |" in page
    summary = overview([plan], tmp_path / "out").read_text()
    assert "| [two (math)](paired_two.md) |" in summary and f"| {shown} |" in summary
    scored()
    assert "two (math)" in (tmp_path / "out" / "paired_two.svg").read_text()


def test_a_verdict_waits_for_all_seeds(two_steps, tmp_path, scored, fake_train, monkeypatch):
    """A seed that diverges is named, and the method gets no verdict and no star."""
    plan = reference_plan(two_steps, tasks=("arc_easy",), transfer=())
    train = jobs.train

    def diverges(run, *args, **kwargs):
        if (run.adapter.method, run.train.seed) == ("ffba", 1):
            raise NonFiniteError("the loss of step 1 is nan")
        return train(run, *args, **kwargs)

    monkeypatch.setattr(jobs, "train", diverges)
    compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    page = (tmp_path / "out" / "paired_two.md").read_text()
    assert "1 of 2 seeds" in page
    scores = page.split("## accuracy, percent")[1]
    deviations = {x.split("|")[1].strip(): "±" in x for x in scores.splitlines() if "| ff" in x}
    assert deviations == {"ffa": True, "ffba": False}  # none is known of one seed
    assert "Failed: ffba, seed 1, learning rate 0.001: the loss of step 1 is nan" in page
    summary = overview([plan], tmp_path / "out").read_text()
    [line] = [line for line in summary.splitlines() if line.startswith("| ffba")]
    assert "*" not in line and "1 of 2 seeds" in line
    drawn = (tmp_path / "out" / "paired.svg").read_text()
    assert "ffba, 1 of 2 seeds" in drawn and "#999999" in drawn  # in grey
    table = page.split("## Difference to lora")[1].split("\n\n")[1]
    cells = {row.split("|")[1].strip(): row.split("|")[3:5] for row in table.splitlines()}
    assert cells["ffba"][0].strip() == "1 of 2" and cells["ffba"][1].strip() == "-"  # and no p
    assert cells["ffa"][0].strip() == "2" and cells["ffa"][1].strip() != "-"


def test_the_overview_corrects_for_all_comparisons(two_steps, tmp_path):
    """By Holm: the least of four p counts four times, the second three times. Steps and tokens are
    those of the runs. A comparison that is not run yet counts, too.
    """
    plans = [reference_plan(two_steps, name=f"paired_{name}") for name in ("two", "three")]
    four = reference_plan(two_steps, name="paired_four")
    base = override(two_steps, {"train.steps": 7, "data.batch_size": 3, "data.packing": True})
    for plan, p in zip(plans, (0.01, 0.03), strict=True):
        gaps = {"ffa": Difference(5.0, 1.0, 9.0, p, 2), "ffba": Difference(0.0, -4.0, 4.0, 0.5, 2)}
        found = {
            "config": to_dict(base),
            "differences": {
                label: {"arc_easy": dataclasses.asdict(gap)} for label, gap in gaps.items()
            },
        }
        (tmp_path / f"{plan.name}.json").write_text(json.dumps(found))
        (tmp_path / f"{plan.name}.md").touch()
    summary = overview(plans, tmp_path).read_text()
    assert "| ffa | +5.0 [+1.0, +9.0] *, as good | +5.0 [+1.0, +9.0], as good |" in summary
    assert "| ffba | +0.0 [-4.0, +4.0], undecided |" in summary and "(4)" in summary
    tokens = f"{7 * 3 * two_steps.data.bucket_lengths[-1]:,}"
    assert f"| [two](paired_two.md) | arc_easy | 7 | {tokens} |" in summary
    with_four = overview([*plans, four], tmp_path).read_text()
    [line] = [line for line in with_four.splitlines() if line.startswith("| four |")]
    assert line.endswith("| all |") and "(6)" in with_four and "] *" not in with_four


def test_the_untrained_model_is_scored_as_its_runs_start(two_steps, tmp_path, scored, fake_train):
    plan, runs, out = reference_plan(two_steps), tmp_path / "runs", tmp_path / "out"
    compare_methods(plan.only(["lora"]), runs, out, console=False)
    codes = dataclasses.replace(plan, base=override(plan.base, {"quantize.kernels": "int8"}))
    found = [compare._untrained(p, None, {}, runs, out, False, run=False) for p in (plan, codes)]
    assert found[0] and not found[1]


def test_records_have_the_hash_from_before_the_base_was_loaded(
    two_steps, tmp_path, scored, fake_train, monkeypatch
):
    """So those of files that changed meanwhile do not count."""
    monkeypatch.setattr(compare, "model_digest", lambda _: "before")
    plan, out = reference_plan(two_steps).only(["lora"]), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"is of another run, model or rows. Move .*-seed0 away"):
        compare_methods(plan, tmp_path / "runs", out, console=False)
    records = [json.loads(file.read_text()) for file in (out / plan.name).glob("*.json")]
    assert len(records) > 1 and {record["model"] for record in records} == {"before"}


def test_more_seeds_of_some_methods(two_steps, tmp_path, scored, fake_train):
    """A difference is over the seeds that both have, and waits for no others."""
    more = {"lora": (2,), "ffba": (2, 3)}
    plan = reference_plan(two_steps, tasks=("arc_easy",), transfer=(), more_seeds=more)
    runs, out = tmp_path / "runs", tmp_path / "out"
    result = compare_methods(plan, runs, out, console=False)
    seeds = {label: of["arc_easy"]["seeds"] for label, of in result["differences"].items()}
    assert seeds == {"base": 3, "ffba": 3, "ffa": 2} and result["missing"] == []
    page = (out / "paired_two.md").read_text()
    assert "of 3 seeds" not in page and "of 2 seeds" not in page  # all verdicts are there
    table = page.split("## Difference to lora")[1].split("\n\n")[1].splitlines()
    cells = {line.split("|")[1].strip(): line.split("|") for line in table}
    at = [cell.strip() for cell in cells["method"]].index("seeds")
    assert (cells["ffba"][at].strip(), cells["ffa"][at].strip()) == ("3", "2")
    summary = overview([plan], out).read_text()
    [line] = [line for line in summary.splitlines() if line.startswith("| ffba")]
    assert "| 2 (lora 3, ffba 4) |" in summary and "*, inferior" in line
    assert Progress(plan, runs, out).left() == "18 of 18 steps of all runs"
    assert plan.only(["lora", "ffa"]).more_seeds == {"lora": (2,)}
    listed = dataclasses.replace(plan, seeds=[0, 1])  # as a config file may give them
    assert listed.seeds_of("ffba") == (0, 1, 2, 3)
    for wrong, said in (
        ({"dora": (2,)}, "no method"),
        ({"lora": (1,)}, "given twice"),
        (
            {"lora": 3},
            r"comparison.more_seeds\['lora'\]=3: expected a list of int, written as \[3\]",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            reference_plan(two_steps, more_seeds=wrong)
    with pytest.raises(ConfigError, match=r"comparison.seeds=\(0, 0\) has 0 twice: give each once"):
        dataclasses.replace(plan, seeds=(0, 0))


def test_tables_of_the_runs_that_are_there(two_steps, tmp_path, scored, fake_train):
    plan, out = reference_plan(two_steps), tmp_path / "out"
    compare_methods(plan, tmp_path / "runs", out, console=False)
    trained = len(fake_train.runs)
    (out / "paired_two" / "ffba-lr0.001-seed1.json").unlink()
    (out / "paired_two" / "base.json").unlink()
    result = compare_methods(plan, tmp_path / "runs", out, console=False, run=False)
    assert result["missing"] == ["ffba (seed 1)"] and len(fake_train.runs) == trained
    assert [row["method"] for row in result["rows"]] == ["lora", "ffa", "ffba"]
    assert "Not run yet: ffba (seed 1)." in (out / "paired_two.md").read_text()
    assert not (out / "paired_two" / "base.json").exists()


def test_a_measure_that_the_tasks_lack_is_named_before_a_run(
    two_steps, tmp_path, scored, fake_train
):
    plan = reference_plan(two_steps, measure="likelihood_norm")
    with pytest.raises(ConfigError, match="measure 'likelihood_norm': the tasks were scored by"):
        compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert not fake_train.runs


def test_a_reference_alone_has_no_differences(two_steps, tmp_path, scored, fake_train):
    plan = reference_plan(two_steps).only(["lora"])
    compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    scored()
    assert "## Differences" not in overview([plan], tmp_path / "out").read_text()


def test_a_method_that_diverges_at_every_rate_does_not_stop_the_others(
    two_steps, tmp_path, scored, fake_train
):
    plan = reference_plan(two_steps)
    fake_train.loss = lambda run: float("nan") if run.adapter.method == "lora" else 1.0
    with pytest.raises(ConfigError, match="method 'lora' diverged at every learning rate"):
        compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert {run.adapter.method for run in fake_train.runs} == {"lora", "ffa", "ffba"}
    assert "| ffba |" in (tmp_path / "out" / "paired_two.md").read_text()


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


@pytest.mark.parametrize("pick_steps", [None, 4])
def test_a_run_that_chose_the_rate_counts_once(two_steps, tmp_path, fake_train, caplog, pick_steps):
    caplog.set_level("INFO")
    base = override(two_steps, {"train.steps": 4})
    plan = Comparison("once", base, LORA, (1e-3, 1e-2), (0, 1), pick_steps=pick_steps)
    compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert "12 of 12 steps of all runs" in [r.getMessage() for r in caplog.records][-1]


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
