"""L2-regularised logistic regression on features held in memory, along a grid of penalties.

Dimension letters: N images, D feature dimensions, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
) -> list[LogisticFit]:
    """Minimise ``C * sum_i cross_entropy_i + 0.5 * ||weight||^2`` for every C (scikit-learn's objective).

    By L-BFGS in float64, from the solution of the nearest smaller C on: along a grid each fit is a short way from the
    one before it. It searches in coordinates in which the features are uncorrelated, where far fewer steps lead there.

    Args:
        features: (N, D), any device.
        labels: (N,) integers below ``classes``.
        penalties_c: C, inverse strengths of the penalty.
        max_iterations: of each fit.
        tolerance: of the largest entry of the objective's gradient, divided by C N.
        progress: is told of each fit done.

    Returns:
        A fit per C, in the order of ``penalties_c``.
    """
    # The bias takes up what is subtracted, and is not penalised: the objective is the same, but features that differ
    # little beside their mean keep their digits.
    centre = features.double().mean(dim=0)
    centred = features.double() - centre
    # The bias is the weight of a feature that is always 1.
    wide = torch.cat([centred, centred.new_ones((len(centred), 1))], dim=1)
    gram = wide.T @ wide / len(wide)
    weights = wide.new_zeros((wide.shape[1], classes))
    fits: dict[float, LogisticFit] = {}
    for c in sorted(penalties_c):
        weights, converged = _minimise(
            wide, gram, labels, weights, c=c, max_iterations=max_iterations, tolerance=tolerance
        )
        bias = weights[-1] - centre @ weights[:-1]
        fits[c] = LogisticFit(weights[:-1], bias, c, converged)
        progress(1)
    return [fits[c] for c in penalties_c]


def _minimise(
    features: Tensor,
    gram: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    c: float,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, bool]:
    """The weights (D + 1, C), the last row of which is not penalised, and whether they came to rest."""
    from scipy.optimize import minimize

    # Divided by C N, so that the tolerance means the same for every grid and every number of images.
    penalty = torch.full_like(gram[:, :1], 1.0 / (c * len(features)))
    penalty[-1] = 0.0
    root = _preconditioner(gram, penalty, start.shape[1])
    target = labels.view(-1, 1)
    steepest = math.inf

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal steepest
        weights = _to_weights(root, flat)
        log_probabilities = (features @ weights).log_softmax(dim=1)
        loss = (
            -log_probabilities.gather(1, target).mean() + 0.5 * (penalty * weights.square()).sum()
        )
        error = log_probabilities.exp_()
        error.scatter_add_(1, target, error.new_full((), -1.0).expand(target.shape))
        error /= len(features)
        # In this order: the product with the transposed features takes three times as long.
        gradient = (error.T @ features).T + penalty * weights
        steepest = float(gradient.abs().max())
        rotated = torch.linalg.solve_triangular(root, gradient, upper=False)
        return float(loss), rotated.cpu().numpy().ravel()

    def stop_at_rest(intermediate_result: Any) -> None:
        if steepest <= tolerance:
            raise StopIteration

    solution = minimize(
        objective,
        (root.T @ start).cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        callback=stop_at_rest,
        options={"maxiter": max_iterations, "maxfun": 2 * max_iterations, "gtol": 0.0, "ftol": 0.0},
    )
    objective(solution.x)
    # Success is also an objective that no longer falls, which rounding can bring about just above the tolerance.
    return _to_weights(root, solution.x), steepest <= tolerance or bool(solution.success)


def _to_weights(root: Tensor, flat: np.ndarray) -> Tensor:
    rotated = torch.from_numpy(flat.copy()).view(len(root), -1).to(root.device)
    weights: Tensor = torch.linalg.solve_triangular(root.T, rotated, upper=True)
    return weights


def _preconditioner(gram: Tensor, penalty: Tensor, classes: int) -> Tensor:
    """A root R, lower triangular, of R R^T close to the Hessian: its value for evenly spread probabilities."""
    hessian = gram / classes + torch.diag(penalty[:, 0])
    # A little of the largest entry keeps features that never vary, or repeat another, from making it singular.
    hessian += 1e-10 * hessian.diagonal().max() * torch.eye(len(gram), device=gram.device)
    root: Tensor = torch.linalg.cholesky(hessian)
    return root
