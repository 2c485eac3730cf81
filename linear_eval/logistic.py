"""L2-regularised logistic regression on features held in memory, along a grid of penalties.

Dimension letters: N images, D feature dimensions, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class LogisticFit(NamedTuple):
    """One fitted classifier.

    weight: float64 (D, C).
    bias: float64 (C,), not penalised.
    c: of its penalty.
    converged: whether it came to rest within the iterations allowed.
    """

    weight: Tensor
    bias: Tensor
    c: float
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) to float64 (N, C)."""
        return features.double() @ self.weight + self.bias


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalties_c: Sequence[float],
    max_iterations: int,
    tolerance: float,
    progress: Callable[[int], object] = lambda fits: None,
) -> Iterator[LogisticFit]:
    """Minimise ``C * sum_i cross_entropy_i + 0.5 * ||weight||^2`` for every C (scikit-learn's objective).

    By L-BFGS in float64, from the solution of the nearest smaller C on: along a grid each fit is a short way from the
    one before it.

    Args:
        features: (N, D), any device.
        labels: (N,) integers below ``classes``.
        penalties_c: C, inverse strengths of the penalty.
        max_iterations: of each fit.
        tolerance: of the largest entry of the objective's gradient, divided by C N.
        progress: is told of each fit done.

    Yields:
        A fit per C, in the order of ``penalties_c``.
    """
    wide = features.double()
    start = np.zeros((features.shape[1] + 1) * classes)
    fits: dict[float, LogisticFit] = {}
    for c in sorted(penalties_c):
        start, converged = _minimise(wide, labels, start, classes, c, max_iterations, tolerance)
        solution = torch.from_numpy(start.copy()).view(-1, classes).to(features.device)
        fits[c] = LogisticFit(solution[:-1], solution[-1], c, converged)
        progress(1)
    return iter([fits[c] for c in penalties_c])


def _minimise(
    features: Tensor,
    labels: Tensor,
    start: np.ndarray,
    classes: int,
    c: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[np.ndarray, bool]:
    from scipy.optimize import minimize

    # Divided by C N, so that the tolerance means the same for every grid and every number of images.
    decay = 1.0 / (c * len(features))
    target = labels.view(-1, 1)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(-1, classes).to(features.device)
        weight, bias = weights[:-1], weights[-1]
        log_probabilities = torch.addmm(bias, features, weight).log_softmax(dim=1)
        loss = -log_probabilities.gather(1, target).mean() + 0.5 * decay * weight.square().sum()
        error = log_probabilities.exp_()
        error.scatter_add_(1, target, error.new_full((), -1.0).expand(target.shape))
        error /= len(features)
        # In this order: the product with the transposed features takes three times as long.
        weight_gradient = (error.T @ features).T + decay * weight
        gradient = torch.cat([weight_gradient, error.sum(0, keepdim=True)])
        return float(loss), gradient.cpu().numpy().ravel()

    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "gtol": tolerance,
            "ftol": 0.0,
        },
    )
    # Success is also an objective that no longer falls, which rounding can bring about just above the tolerance.
    return found.x, bool(found.success)
