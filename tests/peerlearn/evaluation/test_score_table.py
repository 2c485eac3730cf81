"""Columns of tables: what they tell of one run, and of several."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peerlearn.evaluation.score_table import ci95_column, interval_column, metric_column
from peerlearn.evaluation.uncertainty import interval_over_runs, is_percentage, score_interval

PERCENT = st.floats(0, 100)
INTERVAL = interval_column("top1", "top1_wilson95")
EPISODES = ci95_column("accuracy", "accuracy", "accuracy_ci95")


def runs_of(metric: str, *values: float) -> list[dict[str, object]]:
    return [{metric: value, "top1_wilson95": (1.0, 2.0), "accuracy_ci95": 0.84} for value in values]


@given(st.lists(PERCENT, min_size=3, max_size=9))
def test_the_interval_of_a_mean_of_percentages_is_students_within_0_and_100(values):
    found = interval_over_runs(values, "top1")
    assert found is not None
    mean, error = math.fsum(values) / len(values), stats.sem(values)
    half_width = stats.t.ppf(0.975, len(values) - 1) * error
    assert found[0] == pytest.approx(max(mean - half_width, 0.0), abs=1e-9)
    assert found[1] == pytest.approx(min(mean + half_width, 100.0), abs=1e-9)
    assert 0 <= found[0] <= found[1] <= 100


@given(st.lists(PERCENT, min_size=1, max_size=2))
def test_one_run_and_two_have_no_interval(values):
    assert interval_over_runs(values, "top1") is None
    assert interval_over_runs(values, "lr") is None


def test_what_is_no_percentage_is_not_cut():
    assert score_interval(0.5, 2.0, "lr") == (-1.5, 2.5)
    assert score_interval(0.5, 2.0, "calibration_error") == (0.0, 2.5)
    assert score_interval(99.0, 2.0, "ap50") == (97.0, 100.0)
    percentages = ["top1", "top5", "accuracy", "ap", "ap50", "ap75", "calibration_error"]
    assert all(map(is_percentage, [*percentages, "top1_standard_error", "ap50_std"]))
    assert not any(map(is_percentage, ["lr", "penalty_c", "apples", "n", "loss"]))


def test_a_column_of_intervals_of_one_two_and_three_runs():
    assert INTERVAL.cell(runs_of("top1", 50.0)) == "1.00 .. 2.00"
    # 27 .. 116 by Student's t.
    assert INTERVAL.cell(runs_of("top1", 68.0, 75.0)) == ""
    # Mean 95, s 5: half width 4.30265 x 5 / sqrt(3) = 12.42.
    assert INTERVAL.cell(runs_of("top1", 90.0, 95.0, 100.0)) == "82.58 .. 100.00"
    assert INTERVAL.cell(runs_of("top1", 0.0, 5.0, 10.0)) == "0.00 .. 17.42"
    assert metric_column("a", "top1").cell(runs_of("top1", 90.0, 100.0)) == "95.00 +- 7.07"


def test_a_column_of_means_and_half_widths_of_one_two_and_three_runs():
    assert EPISODES.cell(runs_of("accuracy", 62.31)) == "62.31 +- 0.84"
    assert EPISODES.cell(runs_of("accuracy", 99.5)) == "99.50 (98.66 .. 100.00)"
    assert EPISODES.cell(runs_of("accuracy", 0.5)) == "0.50 (0.00 .. 1.34)"
    assert EPISODES.cell(runs_of("accuracy", 68.0, 75.0)) == "71.50"
    assert EPISODES.cell(runs_of("accuracy", 55.0, 60.0, 65.0)) == "60.00 +- 12.42"
    assert EPISODES.cell(runs_of("accuracy", 90.0, 95.0, 100.0)) == "95.00 (82.58 .. 100.00)"
