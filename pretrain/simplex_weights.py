"""The ensemble's weights of Ensemble Teaching (Eq. 9 of the MCL paper): the best mixture of the networks' logits.

Dimensions: M networks, B batch, C classes, S simplices (1, or C with weights per class), K = M - 1 free coordinates.

    minimise over theta  f(theta) = mean_b CE(softmax(sum_m theta_m z_m[b]), y_b),  theta >= 0, sum_m theta_m = 1

f is convex, yet this is no linear programme as the paper says. It is solved by a primal-dual interior-point method
(Nocedal and Wright, Numerical Optimization, chapter 19), until the Frank-Wolfe gap is small, which bounds
``f(theta) - min f``:

    sum over simplices of max_m <grad f(theta), theta - e_m>  <=  1e-6 max(1, f(theta))
"""

import logging
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cho_factor, cho_solve, helmert
from torch import Tensor

from pretrain.finite import require_finite

Array = npt.NDArray[np.float64]

RELATIVE_GAP = 1e-6
_TINY = 1e-300
# Usual batches take 5 to 15 steps, the hardest known (logits of 1e6, weights per class) some 150.
_MAX_STEPS = 300
# Networks further apart than this are first mixed at a temperature that brings them so near: at temperature 1 f would
# be all but piecewise linear, and Newton's method would crawl from kink to kink.
_EASY_SPREAD = 10.0

logger = logging.getLogger(__name__)


def ensemble_weights(logits: Tensor, labels: Tensor, *, per_class: bool = False) -> Tensor:
    """theta of Eq. 9: the weights that give the mixed logits the lowest cross-entropy, without gradient.

    Solved in float64 on the CPU to the gap stated at the top of this file, deterministically. Should that gap be out of
    reach, the best point found is returned and a warning logged once.

    Args:
        logits: (M, B, C) float, on any device.
        labels: (B,) integer classes.
        per_class: one simplex for every class, which is what ``theta in R^C`` in print says:
            ``z_e[b, c] = sum_m theta[m, c] z[m, b, c]``.

    Returns:
        (M,), or (M, C) with ``per_class``: float32, or float64 where the logits are, on the logits' device.

    Raises:
        NonFiniteError: the logits hold NaN or Inf.
        ValueError: shapes that do not fit, or a label that is none of the C classes.
    """
    # The solver waits for the device anyway, and must not be given NaN.
    check_logits("ensemble_weights", logits, labels, at_once=True)
    z = logits.detach().to("cpu", torch.float64).numpy()
    y = labels.detach().cpu().numpy()
    if not (y.min() >= 0 and y.max() < z.shape[2]):
        raise ValueError(f"labels must be 0..{z.shape[2] - 1}, got {y.min()}..{y.max()}")
    theta = torch.from_numpy(_solve(_Mixture(z, y, per_class)))
    if not per_class:
        theta = theta[:, 0]
    return theta.to(
        logits.device, torch.float64 if logits.dtype == torch.float64 else torch.float32
    )


def check_logits(
    term: str, logits: Tensor, labels: Tensor | None = None, *, at_once: bool = False
) -> None:
    """Refuse logits that are no non-empty (M, B, C) or not finite, and labels that are not (B,).

    ``at_once`` is that of `require_finite`.

    Raises:
        NonFiniteError: names the term and the network.
        ValueError: the shapes.
    """
    if logits.ndim != 3 or 0 in logits.shape:
        raise ValueError(f"logits must be (M, B, C), none of them 0, got {tuple(logits.shape)}")
    if labels is not None and labels.shape != logits.shape[1:2]:
        raise ValueError(
            f"labels must be (B,) with B of logits {tuple(logits.shape)}, got {tuple(labels.shape)}"
        )
    require_finite(term, "logits", logits, at_once=at_once)


class _Point(NamedTuple):
    """f at a theta (M, S).

    Attributes:
        value: f.
        p: (B, C), the mixture's probabilities.
        gradient: (M, S), up to a constant per simplex, which no feasible direction sees.
    """

    value: float
    p: Array
    gradient: Array


class _Mixture:
    """f in coordinates that leave the simplices' sums alone: ``theta = 1/M + basis @ x`` with x (K, S).

    The mixture is then ``mean + sum_k x_k spread_k``: what the networks have in common costs no digits of their
    differences.

    Attributes:
        shape: (M, S), theta's.
        basis: (M, K), orthonormal columns that sum to 0.
        mean: (B, C). spread: (K, B, C).
        rounding: f is not known better than this.
    """

    def __init__(self, z: Array, y: npt.NDArray[np.int64], per_class: bool) -> None:
        networks, self.batch, classes = z.shape
        self.rows = np.arange(self.batch)
        self.y = y
        self.per_class = per_class
        self.shape = (networks, classes if per_class else 1)
        self.basis: Array = (
            np.ascontiguousarray(helmert(networks).T) if networks > 1 else np.zeros((1, 0))
        )
        self.mean: Array = z.mean(0)
        self.rounding = 1e-15 * max(1.0, float(np.abs(z).max()))
        self.spread: Array = np.tensordot(self.basis.T, z - z[0], 1)

    def evaluate(self, theta: Array, temperature: float) -> _Point:
        """f, with ``temperature * CE(softmax(z_e / temperature))`` in place of the CE."""
        logits = self.mean.copy()
        for x, spread in zip(self.basis.T @ theta, self.spread, strict=True):
            logits += x * spread
        logits -= logits[self.rows, self.y][:, None]
        logits /= temperature
        highest = logits.max(1, keepdims=True)
        p = np.exp(logits - highest)
        total = p.sum(1, keepdims=True)
        p /= total
        value = temperature * float((highest + np.log(total)).mean())
        error = p.copy()
        error[self.rows, self.y] -= 1.0
        if self.per_class:
            slope = np.einsum("bc,kbc->kc", error, self.spread)
        else:
            slope = np.tensordot(self.spread, error, 2)[:, None]
        return _Point(value, p, self.basis @ (slope / self.batch))

    def newton_step(
        self, p: Array, temperature: float, weight: Array, target: Array, damping: float
    ) -> Array:
        """Solve ``(Hessian of f + diag(weight)) step = target`` within the feasible directions.

        Args:
            p: (B, C), the mixture's probabilities at the present theta and temperature.
            weight, target: (M, S), the weight positive.
            damping: this share of its mean diagonal is added to the Hessian's diagonal.

        Returns:
            (M, S), summing to 0 over M.

        Raises:
            LinAlgError: the matrix is numerically not positive definite.
        """
        barrier = np.einsum("mk,ms,ml->skl", self.basis, weight, self.basis)
        solve = self._solve_per_class if self.per_class else self._solve_single
        scale = 1 / (self.batch * temperature)
        step: Array = self.basis @ solve(p, scale, barrier, self.basis.T @ target, damping)
        return step

    def _solve_single(
        self, p: Array, scale: float, barrier: Array, target: Array, damping: float
    ) -> Array:
        """The Hessian is the covariance of the spread under p: (K, K)."""
        means = np.einsum("bc,kbc->kb", p, self.spread)
        centred = (self.spread - means[:, :, None]).reshape(len(self.spread), -1)
        hessian = scale * ((centred * p.ravel()) @ centred.T)
        _damp(hessian, damping)
        x: Array = cho_solve(cho_factor(hessian + barrier[0], lower=True), target)
        return x

    def _solve_per_class(
        self, p: Array, scale: float, barrier: Array, target: Array, damping: float
    ) -> Array:
        """The Hessian is a (K, K) block per class less a product of rank B: of (K C, K C) and, by Woodbury's
        identity, (B, B) the smaller system is factorised."""
        coordinates, batch, classes = self.spread.shape
        weighted = p * self.spread
        blocks = np.empty((classes, coordinates, coordinates))
        for k in range(coordinates):
            for j in range(k + 1):
                product = scale * np.einsum("bc,bc->c", weighted[k], self.spread[j])
                blocks[:, k, j] = blocks[:, j, k] = product
        _damp(blocks, damping)
        blocks += barrier
        if coordinates * classes <= batch:
            return _solve_dense(blocks, weighted, scale, target)
        return _solve_woodbury(blocks, weighted, scale, target)


def _damp(hessian: Array, damping: float) -> None:
    """Add a share of its mean diagonal to the diagonal of (..., K, K), in place."""
    diagonal = np.einsum("...kk->...k", hessian)
    diagonal += damping * diagonal.mean()


def _solve_dense(blocks: Array, weighted: Array, scale: float, target: Array) -> Array:
    """``(blockdiag(blocks) - scale * W W^T) x = target`` with W (K C, B) from weighted (K, B, C); target, x (K, C)."""
    coordinates, batch, classes = weighted.shape
    low_rank = weighted.transpose(0, 2, 1).reshape(-1, batch)
    matrix = (-scale * (low_rank @ low_rank.T)).reshape(coordinates, classes, coordinates, classes)
    each = np.arange(classes)
    matrix[:, each, :, each] += blocks
    size = coordinates * classes
    factor = cho_factor(matrix.reshape(size, size), lower=True, overwrite_a=True)
    x: Array = cho_solve(factor, target.ravel())
    return x.reshape(target.shape)


def _solve_woodbury(blocks: Array, weighted: Array, scale: float, target: Array) -> Array:
    """As `_solve_dense`: with blocks = L L^T, F = L^-1 W, y = L^-1 target,
    ``x = L^-T (y + F (1 / scale - F^T F)^-1 F^T y)``."""
    coordinates, batch, _ = weighted.shape
    inverse = np.linalg.inv(np.linalg.cholesky(blocks))
    system = np.eye(batch) / scale
    halves: list[Array] = []
    for k in range(coordinates):
        half = inverse[:, k, 0] * weighted[0]
        for j in range(1, k + 1):
            half += inverse[:, k, j] * weighted[j]
        system -= half @ half.T
        halves.append(half)
    y = np.einsum("ckj,jc->kc", inverse, target)
    seen = sum(half @ row for half, row in zip(halves, y, strict=True))
    seen = cho_solve(cho_factor(system, lower=True, overwrite_a=True), seen)
    for half, row in zip(halves, y, strict=True):
        row += seen @ half
    x: Array = np.einsum("cjk,jc->kc", inverse, y)
    return x


def _gap(theta: Array, gradient: Array) -> float:
    """The Frank-Wolfe gap, summed over the simplices of theta (M, S)."""
    return float(((theta * gradient).sum(0) - gradient.min(0)).sum())


def _solve(mixture: _Mixture) -> Array:
    """theta (M, S) of the smallest f, by following the solutions of ``theta * s = mu`` as mu goes to 0, where s are the
    reduced costs ``grad f - lambda`` and lambda the multipliers of the sums."""
    theta = np.full(mixture.shape, 1 / mixture.shape[0])
    temperature = max(1.0, float(np.abs(mixture.spread).max(initial=0.0)) / _EASY_SPREAD)
    point = mixture.evaluate(theta, temperature)
    mu = max(_gap(theta, point.gradient) / theta.size, _TINY)
    costs = mu / theta
    best, best_gap = theta, np.inf
    for _ in range(_MAX_STEPS):
        if temperature > 1.0:
            best = theta
        else:
            gap = _gap(theta, point.gradient) / max(1.0, point.value)
            if gap < best_gap:
                best, best_gap = theta, gap
            # Half of what is promised: whoever checks it adds up in another order.
            if gap <= 0.5 * RELATIVE_GAP:
                return theta
        step, decrement = _newton_step(mixture, point, theta, costs, mu, temperature)
        costs_step = mu / theta - costs - costs / theta * step
        length, theta, point = _search(mixture, point, theta, step, decrement, mu, temperature)
        costs = costs + _share_within(costs, costs_step) * costs_step
        costs = np.clip(costs, 1e-8 * mu / theta, 1e8 * mu / theta)
        if length == 0 and temperature == 1.0:
            break
        # Only from near the solution for this mu and temperature does Newton's method find the next one quickly, and
        # only if neither falls far ahead of the other.
        if length == 0 or (length > 0.5 and decrement < 10 * mu * theta.size):
            enough = 0.1 * RELATIVE_GAP * max(1.0, point.value) / theta.size
            mu = max((0.3 if temperature > 1.0 else 0.1) * mu, min(mu, enough))
            if temperature > 1.0:
                temperature = max(1.0, 0.5 * temperature)
                point = mixture.evaluate(theta, temperature)
    if best_gap > RELATIVE_GAP:
        _warn_once()
    return best


def _newton_step(
    mixture: _Mixture, point: _Point, theta: Array, costs: Array, mu: float, temperature: float
) -> tuple[Array, float]:
    """The step of theta, damped as little as makes it lower f, and its decrement: minus the slope of
    ``f - mu sum(log theta)`` along it. A step of zeros if no damping helps."""
    target = mu / theta - point.gradient
    for damping in (0.0, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        try:
            step = mixture.newton_step(point.p, temperature, costs / theta, target, damping)
        except np.linalg.LinAlgError:
            continue
        decrement = float((step * target).sum())
        if decrement > 0:
            return step, decrement
    return np.zeros_like(theta), 0.0


def _search(
    mixture: _Mixture,
    point: _Point,
    theta: Array,
    step: Array,
    decrement: float,
    mu: float,
    temperature: float,
) -> tuple[float, Array, _Point]:
    """Go the longest of 1, 1/2, 1/4 ... of the way that lowers ``f - mu sum(log theta)`` enough (Armijo's rule).

    Returns:
        The share of the step taken, 0 if none serves, with the new theta and its point.
    """
    share = _share_within(theta, step) if decrement > 0 else 0.0
    merit = point.value - mu * float(np.log(theta).sum())
    while share > 1e-12:
        new_theta = theta + share * step
        new_theta /= new_theta.sum(0)
        new_point = mixture.evaluate(new_theta, temperature)
        new_merit = new_point.value - mu * float(np.log(new_theta).sum())
        if new_merit <= merit - 1e-4 * share * decrement + mixture.rounding:
            return share, new_theta, new_point
        share /= 2
    return 0.0, theta, point


def _share_within(value: Array, step: Array) -> float:
    """The share of the step, at most 1, that leaves a positive value positive."""
    steepest = float((-step / value).max())
    return min(1.0, 0.99 / steepest) if steepest > 0 else 1.0


@cache
def _warn_once() -> None:
    logger.warning(
        "the ensemble's weights (Eq. 9) of a batch could not be solved to a duality gap of %g: the best found "
        "are used, here and whenever it happens again. Logits of 1e6 and more do this.",
        RELATIVE_GAP,
    )
