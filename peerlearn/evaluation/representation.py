"""What features look like without labels: rank, spread, alignment, uniformity, LiDAR, agreement of peers.

All sums are in float64, and every function takes features of any real dtype.
Letters: M networks, N images, Q views of each, D feature dimensions.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peerlearn.knn import unit_rows

# Garrido et al. 2023, equation 1: added to each share of a spectrum.
_RANK_EPSILON = 1e-7
# Added to the covariance of the views, as a share of its mean variance.
_LIDAR_RIDGE = 1e-4

# Squared distances of `uniformity` held at once: 64 MiB, whatever N is.
_TILE_ELEMENTS = 2**23


def rankme(features: Tensor) -> float:
    """RankMe, a smooth rank: exp(-sum p_k log p_k) with p_k = sigma_k / sum(sigma) + 1e-7.

    Garrido et al. 2023, "RankMe", equation 1; features neither centred nor normalised. It lies
    between 1, all features on one line (all zero included), and min(N, D), so that it is
    comparable only at one N; the paper uses N = 25,600.

    Args:
        features: (N, D), N >= 1.

    Raises:
        ValueError: for no images, another shape, or entries that are not finite.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features must be (N, D) and not empty, not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features has entries that are not finite")
    return _smooth_rank(torch.linalg.svdvals(features.double()))


def _smooth_rank(spectrum: Tensor) -> float:
    """exp of the entropy of a spectrum's shares, (D,) float64 of at least 0; about 1 where all of it is 0."""
    share = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny) + _RANK_EPSILON
    return math.exp(-(share * share.log()).sum().item())


def feature_std(features: Tensor) -> float:
    """Mean over the dimensions of the standard deviation of the L2-normalised features.

    SimSiam's collapse monitor (Chen & He 2021, section 4.1): 0 when collapsed, 1 / sqrt(D) when
    isotropic, which is also the maximum, because the deviation is the population's.

    Args:
        features: (N, D), N >= 1.

    Raises:
        ValueError: for no images, another shape, or entries that are not finite.
    """
    return _unit_rows(features, "features").std(dim=0, correction=0).mean().item()


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of the L2-normalised features of two views: 0 (equal) to 4 (opposite).

    Wang & Isola 2020, section 4.1, alpha = 2.

    Args:
        a: (N, D), N >= 1, one view of each image.
        b: (N, D), the other view, in the same order.

    Raises:
        ValueError: for no images, shapes that differ, or entries that are not finite.
    """
    if a.shape != b.shape:
        raise ValueError(f"the views differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    difference = _unit_rows(a, "a") - _unit_rows(b, "b")
    return difference.square().sum(dim=1).mean().item()


def uniformity(a: Tensor) -> float:
    """log of the mean of exp(-2 squared distance) over all pairs of distinct images i < j.

    Wang & Isola 2020, section 4.1, t = 2, on L2-normalised features: 0 when collapsed, near
    -4 when uniform on a sphere of many dimensions, never below -8.

    Args:
        a: (N, D), N >= 2. Time is quadratic in N, memory is not.

    Raises:
        ValueError: for fewer than two images, another shape, or entries that are not finite.
    """
    rows = _unit_rows(a, "a")
    if len(rows) < 2:
        raise ValueError("uniformity needs at least two images")
    # Distances stay as they are, and keep their digits where all images are nearly alike.
    rows -= rows.mean(dim=0)
    squared_norm = rows.square().sum(dim=1)
    chunk = max(1, _TILE_ELEMENTS // len(rows))
    total = 0.0
    for start in range(0, len(rows), chunk):
        # Columns before `start` are pairs already counted the other way round.
        later = slice(start, None)
        block = slice(start, start + chunk)
        squared = squared_norm[block, None] + squared_norm[later] - 2 * rows[block] @ rows[later].T
        total += (-2 * squared).expm1_().triu_(diagonal=1).sum().item()
    # A sum of e^x - 1, as the mean of e^x may lie closer to 1 than a float holds.
    return math.log1p(total / math.comb(len(rows), 2))


def lidar(views: Tensor) -> float:
    """LiDAR, a smooth rank that counts only what tells images apart: what views of one image share.

    Thilak et al. 2024, "LiDAR" (arXiv:2312.04000, equations 1 to 4): the images are the classes of a linear
    discriminant analysis, and their views are its samples. With e the features of a view, mu_i the mean of image i
    over its views, S_b the covariance of the mu_i and S_w that of e - mu_i, it is exp(-sum p_k log p_k) with
    p_k = lambda_k / sum(lambda) + 1e-7 and lambda the eigenvalues of (S_w + delta I)^-1/2 S_b (S_w + delta I)^-1/2.

    Two things are our own. The paper takes the means over Q = 50 views for the mu_i. Those still hold S_w / Q, which
    counts for directions that tell nothing apart: it is subtracted, and eigenvalues below 0 count as 0, so that Q = 2
    suffices. And delta is 1e-4 of the mean variance in S_w, so that the figure does not depend on the features' scale.

    It lies between 1, one direction (or nothing) tells all images apart, and D. It is comparable only at one N, D and
    recipe of the views.

    Args:
        views: (Q, N, D), Q >= 2 views of each of N > D images, in one order.

    Raises:
        ValueError: for another shape, too few views or images, or entries that are not finite.
    """
    if views.ndim != 3 or len(views) < 2 or not 0 < views.shape[2] < views.shape[1]:
        raise ValueError(
            f"views must be (Q, N, D) with at least two views of more than D images, not {tuple(views.shape)}"
        )
    if not views.isfinite().all():
        raise ValueError("views has entries that are not finite")
    q, n, d = views.shape
    rows = views.double()
    means = rows.mean(dim=0)
    noise = (rows - means).flatten(0, 1)
    within = noise.T @ noise / (n * (q - 1))
    signal = means - means.mean(dim=0)
    between = signal.T @ signal / (n - 1) - within / q
    # Without noise, the rank is that of the means alone.
    ridge = _LIDAR_RIDGE * within.diagonal().mean().item() or 1.0
    root = torch.linalg.cholesky(
        within + ridge * torch.eye(d, dtype=rows.dtype, device=rows.device)
    )
    half = torch.linalg.solve_triangular(root, between, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
    return _smooth_rank(torch.linalg.eigvalsh(whitened).clamp_min(0))


def peer_agreement(predictions: Tensor) -> float:
    """Percent of images on which two networks predict one class, averaged over pairs of networks.

    Args:
        predictions: (M, N) integer classes, N >= 1, say of each network's kNN.

    Returns:
        0 to 100, or nan for M = 1, which has no pair.

    Raises:
        ValueError: for no images or another shape.
    """
    if predictions.ndim != 2 or predictions.numel() == 0:
        raise ValueError(
            f"predictions must be (M, N) and not empty, not {tuple(predictions.shape)}"
        )
    pairs = list(itertools.combinations(predictions, 2))
    if not pairs:
        return math.nan
    shares = [(i == j).double().mean().item() for i, j in pairs]
    return 100 * math.fsum(shares) / len(pairs)


def neighbour_agreement(features: Sequence[Tensor]) -> float:
    """Percent of images whose nearest other image is the same for two networks, averaged over pairs of networks.

    Nearest by cosine. Chance is about 100 / N.

    Args:
        features: (N, D_m) of each of M networks, N >= 2, of the same images.

    Returns:
        0 to 100, or nan for M = 1, which has no pair.

    Raises:
        ValueError: for fewer than two images, another shape, or entries that are not finite.
    """
    nearest = []
    for each in features:
        rows = _unit_rows(each, "features")
        if len(rows) < 2:
            raise ValueError("neighbour_agreement needs at least two images")
        # Distances stay as they are, and keep their digits where images differ little.
        rows -= rows.mean(dim=0)
        nearest.append(torch.cdist(rows, rows).fill_diagonal_(math.inf).argmin(dim=1))
    return peer_agreement(torch.stack(nearest))


def _unit_rows(features: Tensor, name: str) -> Tensor:
    rows = unit_rows(features, name)
    if len(rows) == 0:
        raise ValueError(f"{name} is empty: there is no image")
    return rows
