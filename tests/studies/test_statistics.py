"""Paired differences and Holm's correction, against SciPy and the definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from studies.statistics import holm, paired_difference

P_VALUES = st.lists(st.floats(0, 1), max_size=12)


def test_a_paired_difference_is_that_of_scipy() -> None:
    ours = {0: 74.5, 1: 75.25, 2: 73.0, 3: 76.5, 9: 1.0}
    theirs = {3: 74.0, 2: 72.5, 1: 73.75, 0: 74.0, 7: 99.0}
    found = paired_difference(ours, theirs)
    assert found is not None
    seeds = [0, 1, 2, 3]
    test = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    low, high = test.confidence_interval(0.95)
    assert found.seeds == seeds
    assert found.mean == pytest.approx(np.mean([0.5, 1.5, 0.5, 2.5]))
    assert found.ci95 == pytest.approx((high - low) / 2)
    assert found.mean - found.ci95 == pytest.approx(low)
    assert (found.p, found.p_holm) == (pytest.approx(test.pvalue), None)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=9))
def test_p_is_that_of_scipy_whatever_the_scores(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (dict(enumerate(values)) for values in zip(*pairs, strict=True))
    found = paired_difference(ours, theirs)
    assert found is not None
    if found.p is not None:
        expected = stats.ttest_rel(list(ours.values()), list(theirs.values())).pvalue
        assert found.p == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert 0 <= found.p <= 1


def test_of_two_seeds_a_difference_keeps_its_interval_and_its_sign() -> None:
    # d = -1 and -3: mean -2, s = sqrt(2), half width t(0.975, 1) s / sqrt(2) = 12.7062; t = -2, p = 0.2952 (Cauchy).
    found = paired_difference({0: 0.5, 1: 0.0}, {0: 1.5, 1: 3.0})
    assert found is not None
    assert found.mean == -2
    assert found.ci95 == pytest.approx(12.7062, abs=1e-4)
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_differences_without_spread_have_no_p() -> None:
    first = {0: 70.0, 1: 80.5}
    for other, mean in (({0: 70.0, 1: 80.5}, 0.0), ({0: 69.9, 1: 80.4}, 0.1), ({1: 80.0}, 0.5)):
        found = paired_difference(first, other)
        assert found is not None
        assert (found.ci95, found.p, found.p_holm) == (None, None, None)
        assert found.mean == pytest.approx(mean)
        assert found.seeds == list(other)
    assert paired_difference(first, {5: 1.0}) is None


def test_a_worked_example_of_holm() -> None:
    """Holm (1979) by hand: R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def rejected(p_values: list[float], level: float) -> set[int]:
    """Holm's step-down procedure as he states it: go on from the smallest p while p <= level / (comparisons left)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found: set[int] = set()
    for done, i in enumerate(order):
        if p_values[i] * (len(order) - done) > level:
            break
        found.add(i)
    return found


@given(P_VALUES, st.floats(0.001, 0.999))
def test_corrected_values_reject_what_the_procedure_rejects(
    p_values: list[float], level: float
) -> None:
    corrected = holm(p_values)
    assert {i for i, p in enumerate(corrected) if p <= level} == rejected(p_values, level)


@given(P_VALUES)
def test_corrected_values_are_monotone_and_within_raw_and_one(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert len(corrected) == len(p_values)
    assert all(raw <= p <= 1 for raw, p in zip(p_values, corrected, strict=True))
    pairs = sorted(zip(p_values, corrected, strict=True))
    assert [p for _, p in pairs] == sorted(corrected)
    assert all(p <= min(1, len(p_values) * raw) for raw, p in pairs)
