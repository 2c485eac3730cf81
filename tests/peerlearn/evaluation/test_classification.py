"""Scores of classifiers against scikit-learn's, and calibration against its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score

from peerlearn.evaluation.classification import classification_scores, top1
from peerlearn.evaluation.uncertainty import spread_over_runs, wilson_interval


def random_scores(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = 2 * torch.randn(n, classes, generator=generator)
    logits[range(n), labels] += 1.5
    return logits, labels


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (103, 7), (400, 10)])
def test_shares_and_confusion_are_scikit_learns(n, classes):
    logits, labels = random_scores(n, classes, seed=n)
    scores = classification_scores(logits, labels)
    predicted, known = logits.argmax(1), list(range(classes))
    assert scores.top1 == pytest.approx(100 * accuracy_score(labels, predicted))
    assert scores.top1 == pytest.approx(top1(logits, labels))
    np.testing.assert_array_equal(
        scores.confusion, confusion_matrix(labels, predicted, labels=known)
    )
    recalls = recall_score(labels, predicted, labels=known, average=None, zero_division=math.nan)
    for ours, expected in zip(scores.per_class_top1, recalls, strict=True):
        assert ours is None if math.isnan(expected) else ours == pytest.approx(100 * expected)
    if classes > 5:
        expected = top_k_accuracy_score(labels, logits, k=5, labels=known)
        assert scores.top5 == pytest.approx(100 * expected)
    else:
        assert scores.top5 is None


def test_calibration_error_is_its_definition():
    """Guo et al. 2017, Eq. 5, written out."""
    logits, labels = random_scores(500, 6, seed=0)
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    scores = classification_scores(logits, labels)
    assert scores.calibration_error == pytest.approx(100 * expected)


def test_full_confidence_belongs_to_the_last_bin():
    """Half of the images at confidence 1, right but for 20; half at 0.965, all right: one bin, errors that offset."""
    logits = torch.zeros(200, 3)
    logits[:100, 0], logits[100:, 0] = 1000, 4
    labels = torch.zeros(200, dtype=torch.int64)
    labels[:20] = 1
    confidence = logits.double().softmax(1)[:, 0].mean()
    expected = 100 * abs(float(confidence) - 180 / 200)
    found = classification_scores(logits, labels).calibration_error
    assert found == pytest.approx(expected) == pytest.approx(8.233, abs=1e-3)


def test_sure_and_right_is_calibrated_sure_and_wrong_is_not():
    logits = 100 * torch.eye(3)
    assert classification_scores(logits, torch.arange(3)).calibration_error == pytest.approx(0)
    wrong = classification_scores(logits, torch.tensor([1, 2, 0]))
    assert wrong.calibration_error == pytest.approx(100)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        classification_scores(torch.tensor([[0.0, math.nan]]), torch.tensor([0]))


@given(n=st.integers(1, 2000), data=st.data())
def test_wilson_interval_is_that_of_scipy(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(correct, n)
    theirs = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert low == pytest.approx(100 * theirs.low, abs=1e-9)
    assert high == pytest.approx(100 * theirs.high, abs=1e-9)
    assert 0 <= low <= 100 * (correct / n) <= high <= 100


def test_spread_of_runs_is_students():
    """Four runs: the quantile of Student's t with 3 degrees of freedom is 3.182."""
    spread = spread_over_runs([90.0, 92.0, 91.0, 95.0])
    std = math.sqrt((4 + 0 + 1 + 9) / 3)
    assert spread.mean == 92.0
    assert spread.std == pytest.approx(std)
    assert spread.ci95 == pytest.approx(3.1824463 * std / 2)
    assert spread.runs == 4
    alone = spread_over_runs([90.0])
    assert alone.mean == 90.0
    assert math.isnan(alone.std)
    assert math.isnan(alone.ci95)
