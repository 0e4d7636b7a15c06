"""Paired differences with their intervals, units that are drawn whole, Holm's correction."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_rel
from support.grids import always

from studies.intervals import simulate
from studies.statistics import Difference, paired_difference, seed_difference, verdict

DIALOGUES, TURNS = 40, 5
ROW_UNITS = np.repeat(np.arange(DIALOGUES), TURNS)


def of(gap: np.ndarray, **given: object) -> Difference:
    """The difference of one task's scores [seeds, rows] to zero."""
    return paired_difference([gap], [np.zeros_like(gap)], **given)


def test_the_interval_of_one_seed_is_that_of_its_rows():
    rng = np.random.default_rng(0)
    gap = rng.choice([-1.0, 0.0, 1.0], size=(1, 400), p=[0.1, 0.7, 0.2])
    found = of(gap)
    assert found.mean == pytest.approx(gap.mean()) and found.p < 0.01
    assert found.high - found.low == pytest.approx(2 * 1.96 * gap.std() / 20, rel=0.05)


def test_seeds_that_differ_widen_the_interval():
    rows = np.random.default_rng(0).normal(0.0, 0.1, (1, 400))
    differ = rows + np.array([[-0.3], [0.0], [0.3]])
    together = of(np.repeat(rows, 3, 0))
    assert together.high - together.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.1)
    # Student's t of two degrees of freedom times 0.3 / sqrt(3), at both ends, however it is drawn.
    for seed in range(4):
        wide = of(differ, seed=seed)
        assert wide.mean == pytest.approx(together.mean) and wide.seeds == together.seeds == 3
        for end in (wide.high - wide.mean, wide.mean - wide.low):
            assert end == pytest.approx(4.303 * 0.3 / 3**0.5, rel=0.01)


@pytest.mark.parametrize(
    "case",
    always([[0.0, 0.1, 0.3], [0.02, 0.2, 0.3], [0.02, 0.0, 0.0]], lambda case: case[1] == 0.2),
)
def test_intervals_cover_a_true_difference(case):
    """In 200 draws the interval holds the truth in 95%, within three standard errors."""
    found = simulate(3, case, 300, draws=200)
    assert abs(found["holds 0"] - 0.95) < 3 * (0.95 * 0.05 / 200) ** 0.5
    # Where seeds change nothing of their own, the noise of answers is not counted twice.
    seed, row, answer = case
    error = 2 * (seed**2 / 3 + answer**2 / 900 + row**2 / 300)
    assert seed or found["width"] < 1.5 * 2 * 1.96 * error**0.5


def test_tasks_count_the_same():
    few, many = np.full((2, 10), 0.5), np.full((2, 1000), 0.1)
    found = paired_difference([few, many], [np.zeros_like(few), np.zeros_like(many)])
    unseen = (3 / 10 + 3 / 1000) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3 - 1.3 * unseen, 0.3))


def test_few_rows_are_not_certainty():
    """One method right and the other wrong, on every row; or both wrong."""
    for rows, p in ((1, 1.0), (5, 1 / 16), (20, 2 / 10_001), (200, 2 / 10_001)):
        right, wrong = np.full((3, rows), 100.0), np.zeros((3, rows))
        found = of(right, best=100.0)
        assert found.p == pytest.approx(p) and found.high == 100
        assert found.low == pytest.approx(100 - 200 * min(1, 3 / rows))
        won = wrong.copy()
        won[:, 0] = 100.0  # one row for the method and none against it
        assert (verdict(of(won, best=100.0), 3.0) == "as good") == (rows > 100)
        same = of(wrong, best=100.0)
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
def test_scores_that_are_not_paired_are_refused(method, reference):
    with pytest.raises(ValueError, match="of equal seeds"):
        paired_difference(method, reference)


def test_whether_seeds_vary_more_than_single_answers():
    """Three seeds that move all rows by 0, 1 and 2; three that share their mean; one seed."""
    noise = np.random.default_rng(0).normal(size=(3, 400))
    noise -= noise.mean(axis=1, keepdims=True)
    moved = of(noise + np.arange(3)[:, None])
    # The seeds' own variance of 1 minus what the noise of 400 rows makes of it.
    assert moved.seed_std == pytest.approx(1.0, abs=0.01) and not moved.of_rows_only
    assert of(noise).seed_std == 0 and of(noise).of_rows_only
    assert of(noise[:1]).seed_std is None and not of(noise[:1]).of_rows_only


# --- losses, families, verdicts -------------------------------------------------------------------


def test_losses_are_compared_over_their_seeds():
    """As scipy's test of pairs does; equal losses leave nothing open, equal gaps everything."""
    ours, theirs = [2.48, 2.45, 2.47, 2.44], [2.43, 2.41, 2.44, 2.42]
    found, want = seed_difference(ours, theirs), ttest_rel(ours, theirs)
    ends = want.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert found.p == pytest.approx(want.pvalue) and found.seeds == 4
    assert seed_difference([1.0, 2.0], [1.0, 2.0]) == Difference(0.0, 0.0, 0.0, 1.0, 2)
    for seeds in (2, 3):  # 0.06 - 0.01 is not 0.05 in floats
        theirs = 0.01 * np.arange(1, seeds + 1)
        found = seed_difference(theirs + 0.05, theirs)
        assert (found.low, found.high, found.p) == (-np.inf, np.inf, 2.0 ** (1 - seeds))
    for wrong in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="same seeds, two or more"):
            seed_difference(*wrong)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-1.9, 0.9, "as good"),
        (-2.1, 4.1, "undecided"),
        (-5.0, -2.1, "inferior"),
        (-3.5, -0.1, "worse"),
        (-4.0, 0.0, "undecided"),
    ],
)
def test_a_verdict_is_about_the_whole_interval(low, high, said):
    assert verdict(Difference(0.0, low, high, 0.5), 2.0) == said


def test_a_difference_is_shown_with_its_interval_and_mark():
    assert str(Difference(-1.0, -2.25, 0.25, 0.5, 3, 0.0)) == "-1.0 [-2.2, +0.2] °"
    assert Difference(0.0289, 0.0144, 0.04341, 0.5).losses() == "+0.0289 [+0.0144, +0.0434]"


# --- units ----------------------------------------------------------------------------------------


def test_rows_written_several_times_say_no_more_than_once():
    """In a unit of equal rows, whatever their order; and a unit of one row is the row."""
    rng = np.random.default_rng(0)
    gap = rng.random((3, DIALOGUES)) - 0.3
    order = rng.permutation(DIALOGUES * TURNS)
    copies = np.repeat(gap, TURNS, axis=1)[:, order]
    once = dataclasses.astuple(of(gap))
    for found in (of(copies, units=[ROW_UNITS[order]]), of(gap, units=[range(DIALOGUES)])):
        assert dataclasses.astuple(found) == pytest.approx(once)
    rows, whole = (of(copies[:1], units=[units]) for units in (None, ROW_UNITS[order]))
    assert rows.high - rows.low < 0.6 * (whole.high - whole.low)


def test_few_units_are_not_certainty_and_count_by_their_rows():
    won = np.full((3, 4), 100.0)
    once, turns = of(won, best=100.0), np.repeat(won, TURNS, axis=1)
    assert of(turns, best=100.0, units=[np.repeat(np.arange(4), TURNS)]) == once
    assert once.p == 1 / 8 and once.low == 100 - 200 * 3 / 4
    assert of(np.array([[1.0] * 9 + [0.0]]), units=[[0] * 9 + [1]]).mean == 0.9
    with pytest.raises(ValueError, match="got 2 unit numbers for 3 rows"):
        of(np.zeros((2, 3)), units=[[0, 1]])
