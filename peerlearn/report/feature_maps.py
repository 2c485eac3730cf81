"""Features as points of a plane: principal components and t-SNE. Dimensions: N images, D features, C classes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peerlearn.knn import unit_rows

FEWEST_IMAGES = 10
PERPLEXITY, TSNE_SEED, TSNE_STEPS = 30.0, 0, 500
# t-SNE sees so many principal components, as van der Maaten and Hinton (2008) have it.
TSNE_COMPONENTS = 50
# The standard deviation of t-SNE's first coordinates at the start, as in scikit-learn.
_START_DEVIATION = 1e-4

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """Two maps of a network's features.

    Attributes:
        components: principal components, (N, 2).
        explained_percent: share of the variance that each of the two components explains.
        neighbours: t-SNE of the same features, (N, 2).
        perplexity: perplexity of t-SNE.
    """

    components: Points
    explained_percent: tuple[float, float]
    neighbours: Points
    perplexity: float


def map_features(features: Tensor) -> FeatureMap | None:
    """Both maps of features of unit length, the same each time on the same machine.

    Args:
        features: features, (N, D) with N of at least 10, of any length.

    Returns:
        The maps, or None where all features are the same: there is nothing to spread out.
    """
    # Imported here: scikit-learn takes a second. Of several threads each adds in an order of its own.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        scores, shares = principal_components(unit_rows(features.double()).numpy())
        if not shares.any():
            return None
        perplexity = min(PERPLEXITY, (len(scores) - 1) / 3)
        start = scores[:, :2] * (_START_DEVIATION / scores[:, 0].std())
        placed = TSNE(
            perplexity=perplexity,
            init=start.astype(np.float32),
            max_iter=TSNE_STEPS,
            random_state=TSNE_SEED,
            n_jobs=1,
        ).fit_transform(scores[:, :TSNE_COMPONENTS])
    return FeatureMap(
        components=scores[:, :2],
        explained_percent=(100 * float(shares[0]), 100 * float(shares[1])),
        neighbours=placed.astype(np.float64),
        perplexity=perplexity,
    )


def principal_components(features: Points) -> tuple[Points, Points]:
    """Coordinates along all principal components, and the share of the variance that each explains.

    The sign of a component is such that its largest coordinate, by absolute value, is positive.

    Args:
        features: features, (N, D) with N and D of at least 2.

    Returns:
        Coordinates (N, min(N, D)), components in falling order of variance; shares (min(N, D),), all 0 where the
        features are the same but for rounding.
    """
    centred = features - features.mean(0)
    left, deviations, _ = np.linalg.svd(centred, full_matrices=False)
    scores = left * deviations
    largest = np.abs(scores).argmax(0)
    scores *= np.where(scores[largest, range(scores.shape[1])] < 0, -1.0, 1.0)
    variances = deviations**2
    rounding = np.finfo(np.float32).eps * np.linalg.norm(features)
    if deviations[0] <= rounding:
        return scores, np.zeros_like(variances)
    return scores, variances / variances.sum()


def neighbour_percent(points: Points, labels: NDArray[np.int64]) -> float:
    """The percentage of points whose nearest other point is of the same class; in a random map `chance_percent`."""
    return 100 * float((labels[nearest_on_map(points)] == labels).mean())


def chance_percent(labels: NDArray[np.int64]) -> float:
    """The percentage of pairs of images that are of the same class."""
    counts = np.unique_counts(labels).counts
    return 100 * float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def nearest_on_map(points: Points) -> NDArray[np.int64]:
    """The number of the nearest other point of each, (N,); of several equally near ones the first."""
    places = torch.from_numpy(points)
    distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    nearest: NDArray[np.int64] = distances.fill_diagonal_(math.inf).argmin(1).numpy()
    return nearest
