"""Logistic regression against scikit-learn's, and against the conditions of an optimum."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from linear_eval.logistic import fit_logistic

GRID = [1.0, 0.001, 0.1]


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    features = torch.from_numpy(pixels / 16).float()
    return features[:900], torch.from_numpy(labels[:900]), features[900:], labels[900:]


def test_coefficients_and_accuracy_are_scikit_learns(digits):
    features, labels, others, other_labels = digits
    fits = fit_logistic(
        features, labels, classes=10, penalties_c=GRID, max_iterations=5000, tolerance=1e-8
    )
    for c, fit in zip(GRID, fits, strict=True):
        oracle = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(features.double(), labels)
        assert fit.converged
        # Adding a constant to every class's bias changes nothing; scikit-learn's sum to 0.
        bias = fit.bias - fit.bias.mean()
        np.testing.assert_allclose(fit.weight.T, oracle.coef_, atol=2e-4)
        np.testing.assert_allclose(bias, oracle.intercept_ - oracle.intercept_.mean(), atol=2e-4)
        ours = (fit.logits(others).argmax(1).numpy() == other_labels).mean()
        assert ours == pytest.approx(oracle.score(others.double(), other_labels), abs=1e-9)


def test_the_gradient_of_the_stated_objective_vanishes(digits):
    """By autograd, from the formula of the docstring."""
    features, labels, _, _ = digits
    for c, fit in zip(
        GRID,
        fit_logistic(
            features, labels, classes=10, penalties_c=GRID, max_iterations=5000, tolerance=1e-7
        ),
        strict=True,
    ):
        weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
        logits = features.double() @ weight + bias
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (c * loss + 0.5 * weight.square().sum()).backward()
        scale = c * len(features)
        assert float(weight.grad.abs().max()) < 2e-7 * scale
        assert float(bias.grad.abs().max()) < 2e-7 * scale


def test_too_few_iterations_are_told(digits):
    features, labels, _, _ = digits
    (fit,) = fit_logistic(
        features, labels, classes=10, penalties_c=[10.0], max_iterations=3, tolerance=1e-6
    )
    assert not fit.converged


def test_correlated_repeated_and_constant_features_are_no_harder(digits):
    """Scales over two decades, a feature in all others, one twice, two that never vary: at rest in 60 steps, where
    plain L-BFGS needs hundreds."""
    features, labels, _, _ = digits
    spoilt = features * torch.logspace(-1, 1, 64) + features[:, 20:21]
    spoilt = torch.cat([spoilt, spoilt[:, :1], torch.full((900, 1), 7.0), torch.zeros(900, 1)], 1)
    (fit,) = fit_logistic(
        spoilt, labels, classes=10, penalties_c=[0.01], max_iterations=60, tolerance=1e-5
    )
    assert fit.converged
    oracle = LogisticRegression(C=0.01, tol=1e-6, max_iter=20_000).fit(spoilt.double(), labels)
    np.testing.assert_allclose(fit.weight.T, oracle.coef_, atol=2e-3)


@pytest.mark.parametrize("offset", [1e2, 1e5])
def test_an_offset_of_the_features_changes_nothing_but_the_bias(digits, offset):
    features, labels, others, _ = (torch.as_tensor(each).double() for each in digits)
    labels = labels.long()

    def fit(shift):
        (found,) = fit_logistic(
            features + shift,
            labels,
            classes=10,
            penalties_c=[0.1],
            max_iterations=200,
            tolerance=1e-7,
        )
        assert found.converged
        return found

    plain, shifted = fit(0.0), fit(offset)
    torch.testing.assert_close(shifted.weight, plain.weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        shifted.logits(others + offset), plain.logits(others), rtol=0, atol=1e-3
    )
