"""What features look like without labels: rank, spread, alignment, uniformity, agreement of peers.

All sums are in float64, and every function takes features of any real dtype.
Letters: M networks, N images, D feature dimensions.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peerlearn.knn import unit_rows

# Garrido et al. 2023, equation 1: added to each normalised singular value.
_RANKME_EPSILON = 1e-7

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
    sigma = torch.linalg.svdvals(features.double())
    share = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny) + _RANKME_EPSILON
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
