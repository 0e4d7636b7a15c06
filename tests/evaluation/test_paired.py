"""Paired differences, Holm's correction, and what the pages of comparisons make of them."""

import dataclasses
import runpy

import numpy as np
import pytest
from scipy.stats import ttest_rel
from support.paths import ROOT

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.evaluation.paired import (
    Difference,
    holm,
    paired_difference,
    seed_difference,
    verdict,
)
from zflora_jax.evaluation.statistics import DIGEST, ROWS, digest, row_scores
from zflora_jax.experiments import difference_view
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.differences import (
    ALL,
    UNTRAINED,
    differences,
    headline,
    informative,
    scores_by_seed,
)


def test_the_interval_of_one_seed_is_that_of_its_rows():
    rng = np.random.default_rng(0)
    gap = rng.choice([-1.0, 0.0, 1.0], size=(1, 400), p=[0.1, 0.7, 0.2])
    found = paired_difference([gap], [np.zeros_like(gap)])
    error = gap.std() / 20
    assert found.mean == pytest.approx(gap.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.p < 0.01


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    rows = rng.normal(0.0, 0.1, (1, 400))
    apart = rows + np.array([[-0.3], [0.0], [0.3]])
    together, wide = (
        paired_difference([gap], [np.zeros_like(gap)]) for gap in (np.repeat(rows, 3, 0), apart)
    )
    assert together.mean == pytest.approx(wide.mean) and (together.seeds, wide.seeds) == (3, 3)
    # Student's t of two degrees of freedom times 0.3 / sqrt(3), at both ends, however it is drawn.
    for seed in range(4):
        wide = paired_difference([apart], [np.zeros_like(apart)], seed)
        for end in (wide.high - wide.mean, wide.mean - wide.low):
            assert end == pytest.approx(4.303 * 0.3 / 3**0.5, rel=0.01)
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.1)


@pytest.mark.parametrize(
    ("of_seeds", "of_answers", "of_rows"), [(0.0, 0.3, 0.1), (0.02, 0.3, 0.2), (0.02, 0.0, 0.0)]
)
def test_intervals_cover_a_true_difference(of_seeds, of_answers, of_rows):
    """200 draws of three seeds and 300 rows, by what varies: the interval holds the truth 95% of
    the time, within three standard errors of that share.
    """
    rng, held = np.random.default_rng(0), 0

    def scores():
        parts = (of_seeds, (3, 1)), (of_answers, (3, 300)), (of_rows, (1, 300))
        return sum(rng.normal(0, deviation, shape) for deviation, shape in parts)

    reach = 0.0
    for _ in range(200):
        found = paired_difference([scores()], [scores()], resamples=1000)
        held += found.low <= 0 <= found.high
        reach += (found.high - found.low) / 200
    assert abs(held / 200 - 0.95) < 3 * (0.95 * 0.05 / 200) ** 0.5
    # Where seeds change nothing of their own, the noise of answers is not counted twice.
    error = 2 * (of_seeds**2 / 3 + of_answers**2 / 900 + of_rows**2 / 300)
    assert of_seeds or reach < 1.5 * 2 * 1.96 * error**0.5


def test_tasks_count_the_same():
    few, many = np.full((2, 10), 0.5), np.full((2, 1000), 0.1)
    found = paired_difference([few, many], [np.zeros_like(few), np.zeros_like(many)])
    unseen = (3 / 10 + 3 / 1000) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - 1.3 * unseen, 0.3))


def test_few_rows_are_not_certainty():
    """One method right and the other wrong, on every row; or both wrong."""
    for rows, p in ((1, 1.0), (5, 1 / 16), (20, 2 / 10_001), (200, 2 / 10_001)):
        right, wrong = np.full((3, rows), 100.0), np.zeros((3, rows))
        found = paired_difference([right], [wrong], best=100.0)
        assert found.p == pytest.approx(p) and found.low == pytest.approx(
            100 - 200 * min(1, 3 / rows)
        )
        assert found.high == 100
        won = wrong.copy()
        won[:, 0] = 100.0  # one row for the method and none against it
        one = verdict(paired_difference([won], [wrong], best=100.0), 3.0)
        assert (one == "as good") == (rows > 100)
        same = paired_difference([wrong], [wrong], best=100.0)
        assert (same.low, same.high) == pytest.approx((-min(100, 300 / rows), min(100, 300 / rows)))
        assert same.p == 1 and (verdict(same, 3.0) == "as good") == (rows > 100)


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ([np.zeros((2, 3))], [np.zeros((3, 3))]),
        ([np.zeros((2, 0))], [np.zeros((2, 0))]),
        ([], []),
        ([np.zeros((2, 3)), np.zeros((3, 3))], [np.zeros((2, 3)), np.zeros((3, 3))]),
    ],
)
def test_scores_that_are_no_pairs_are_refused(method, reference):
    with pytest.raises(ConfigError, match=r"of equal shapes|of the same seeds"):
        paired_difference(method, reference)


def test_losses_are_compared_over_their_seeds():
    """As scipy's test of pairs does; equal losses leave nothing open."""
    ours, theirs = [2.48, 2.45, 2.47, 2.44], [2.43, 2.41, 2.44, 2.42]
    found, want = seed_difference(ours, theirs), ttest_rel(ours, theirs)
    ends = want.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.p == pytest.approx(want.pvalue) and found.seeds == 4
    assert seed_difference([1.0, 2.0], [1.0, 2.0]) == Difference(0.0, 0.0, 0.0, 1.0, 2)
    assert seed_difference([2.0, 3.0], [1.0, 2.0]).p == 0.0
    for wrong in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ConfigError, match="same seeds, two or more"):
            seed_difference(*wrong)


def test_holm_is_the_published_procedure():
    # Holm (1979): p times the number of those left, in order, never below one before.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"] and holm({}) == {}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_a_verdict_is_about_the_whole_interval():
    assert verdict(Difference(-0.5, -1.9, 0.9, 0.5), 2.0) == "as good"
    assert verdict(Difference(1.0, -2.1, 4.1, 0.5), 2.0) == "undecided"
    assert verdict(Difference(-4.0, -5.0, -2.1, 0.0), 2.0) == "inferior"
    assert verdict(Difference(-2.0, -3.5, -0.1, 0.0), 2.0) == "worse"
    assert verdict(Difference(-2.0, -4.0, 0.0, 0.0), 2.0) == "undecided"


def test_whether_seeds_vary_more_than_single_answers():
    """Three seeds that move all rows by 0, 1 and 2; three that share their mean; one seed."""
    noise = np.random.default_rng(0).normal(size=(3, 400))
    noise -= noise.mean(axis=1, keepdims=True)
    zeros = np.zeros((3, 400))
    moved = paired_difference([noise + np.arange(3)[:, None]], [zeros])
    # the seeds' own variance of 1, less what the noise of 400 rows makes of it
    assert moved.seed_std == pytest.approx(1.0, abs=0.01) and not moved.of_rows_alone
    still = paired_difference([noise], [zeros])
    assert still.seed_std == 0 and still.of_rows_alone
    one = paired_difference([noise[:1]], [zeros[:1]])
    assert one.seed_std is None and not one.of_rows_alone


def run(values: dict[str, str]) -> dict:
    return {task: {ROWS: {"accuracy": text}} for task, text in values.items()}


def test_differences_are_of_common_seeds_and_of_the_mean_of_tasks():
    lora = {0: run({"a": "1100", "b": "0000"}), 1: run({"a": "1000", "b": "1000"})}
    other = {0: run({"a": "1111", "b": "0000"}), 2: run({"a": "0000", "b": "0000"})}
    found = differences(other, lora, ("a", "b"), "accuracy")
    assert {task: gap.mean for task, gap in found.items()} == {"a": 50.0, "b": 0.0, ALL: 25.0}
    assert headline(found) is found[ALL]
    # Of four rows none was lost: three in four may be, in each task and in their mean.
    assert all(-75 <= gap.low < -70 for gap in (found["b"], found[ALL])) and found["a"].low < -50
    base = differences({UNTRAINED: run({"a": "0000"})}, lora, ("a",), "accuracy")
    assert base["a"].mean == -37.5 and headline(base) is base["a"]
    assert informative(("a", "b"), None) == ["a", "b"]
    ends = {"a": Difference(-2.0, -3.0, -0.1, 0.01), "b": Difference(-2.0, -4.0, 0.1, 0.06)}
    assert informative(("a", "b"), ends) == ["a"]
    assert differences({2: other[2]}, lora, ("a",), "accuracy") == {}


def test_rows_are_compared_with_themselves_alone():
    records = [
        {"prompt": "Q", "input": "", "answer": "1"},
        {"prompt": "R", "input": "", "answer": "2"},
    ]
    assert digest(records) == digest(list(records)) != digest(records[::-1])
    one = {0: {"a": {ROWS: {"accuracy": "10"}, DIGEST: digest(records)}}}
    other = {0: {"a": {ROWS: {"accuracy": "01"}, DIGEST: digest(records[:1])}}}
    assert differences(one, one, ("a",), "accuracy")["a"].mean == 0
    with pytest.raises(ConfigError, match="the records of a are of different rows"):
        differences(one, other, ("a",), "accuracy")


def test_records_keep_the_scores_of_their_rows():
    records = [
        {"correct": True, "correct_sum": False, "rougeL": 0.123456},
        {"correct": False, "correct_sum": False, "rougeL": 0.5},
        {"correct": True, "rougeL": 1.0},
    ]
    scores = {"accuracy": "101", "likelihood_sum": "00", "rougeL": [0.1235, 0.5, 1.0]}
    assert row_scores(records) == scores  # some rows may have no answer
    assert row_scores([]) == {}
    runs = [{"seed": 0, "scores": run({"a": "1"})}, {"seed": 1, "scores": {"a": {}}}, {"seed": 2}]
    assert list(scores_by_seed(runs)) == [0]


def test_several_tasks_have_a_panel_each(tmp_path, monkeypatch):
    """Beside that of their mean, which alone has a margin; the untrained model is not drawn. What
    has not all its seeds is grey, and nothing else.
    """
    of = {task: Difference(i, i - 1.0, i + 1.0, 0.5, 1) for i, task in enumerate(("a", "b", ALL))}
    of[ALL] = dataclasses.replace(of[ALL], seed_std=0.0)  # on rows alone
    plan = Comparison(
        "paired_two",
        RunConfig(),
        {label: AdapterConfig(label) for label in ("lora", "ffa")},
        (1e-3,),
        (0,),
        tasks=("a", "b"),
        scoring=EvalConfig(),
        reference="lora",
        margin=2.0,
        category="math",
    )
    drawn = []
    monkeypatch.setattr(difference_view, "forest", lambda *given: drawn.append(given))
    other = dataclasses.replace(plan, name="paired_three", seeds=(0, 1), margin=None)
    for plans in ([plan], [plan, other]):
        found = [(plan, {"base": of, "ffa": of}) for plan in plans]
        difference_view.draw_differences(found, tmp_path / "f", "title", "points")
    (panels, *_, label, margins, faint), (two, *_, long_label, both, greys) = drawn
    assert panels == {
        "mean of tasks": {"ffa °, as good": (2, 1.0, 3.0)},
        "a": {"ffa": (0, -1.0, 1.0)},
        "b": {"ffa": (1, 0.0, 2.0)},
    }
    assert margins == {"mean of tasks": 2.0} and not faint
    assert list(two)[:2] == ["two (math), mean of tasks", "two (math), a"] and len(two) == 6
    assert both == {"two (math), mean of tasks": 2.0}
    assert greys == {
        (f"three (math), {panel}", label)
        for panel, label in (("mean of tasks", "ffa °"), ("a", "ffa"), ("b", "ffa"))
    }
    assert (label, long_label) == ("points", "points (grey: not all seeds yet)")


def test_simulated_tables_tell_intervals_of_rows_alone():
    """The script behind results/paired_intervals.md, with few draws."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "paired_intervals.py"))
    simulate = script["simulate"]
    simulate.__globals__.update(DRAWS=20, RESAMPLES=200)
    moved = simulate(3, 50.0, 0.0, 1.0, 40)
    assert moved["°"] == 0.0 and moved["holds 0, of °"] is None and moved["holds 0"] > 0.5
    still = simulate(3, 0.0, 10.0, 30.0, 40)
    assert 0.0 < still["°"] < 1.0 and still["holds 0, of °"] > 0.5
