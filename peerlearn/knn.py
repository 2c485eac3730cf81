"""Weighted k-nearest-neighbour classification of frozen features, the cheapest look at a network.

The rule is the one of InstDisc (Wu et al. 2018, section 3.4), MoCo's CIFAR colab and DINO
(`eval_knn.py`): cosine similarity, and each of the k nearest training images votes for its class
with weight exp(similarity / temperature).

Dimensions: N training images, Q queries, D features, C classes.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peerlearn.compute.device import full_float32

_LOG = logging.getLogger(__name__)

# How many similarities the torch search holds at once: 128 MiB, whatever N and Q are.
_TILE_ELEMENTS = 2**25

_Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class KNNProtocol:
    """The settings of a kNN score. The same features score points apart under other settings, so publish them together.

    The defaults are those of MoCo's colab, lightly and VISSL. Elsewhere: InstDisc (200, 0.07),
    DINO (10 to 200, 0.07), solo-learn (20, 0.07).

    Args:
        k: number of neighbours that vote; of a smaller training set all images vote.
        temperature: divisor of the cosine similarity, without unit.

    Raises:
        ValueError: k is below 1, or the temperature is not positive and finite, or it is so low
            that k exp(1 / temperature) exceeds float64 (below 0.00143 at k = 200).
    """

    k: int = 200
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}: at least one neighbour has to vote")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: it must be positive and finite")
        if self._log_highest_score() > math.log(torch.finfo(torch.float64).max):
            raise ValueError(
                f"temperature is {self.temperature}: {self.k} exp(1 / temperature) exceeds float64"
            )

    @property
    def score_dtype(self) -> torch.dtype:
        """float32 where the highest possible score fits (from 0.012 up at k = 200), else float64.

        The dtype follows from the protocol alone, so that no data set changes it.
        """
        fits = self._log_highest_score() <= math.log(torch.finfo(torch.float32).max)
        return torch.float32 if fits else torch.float64

    def _log_highest_score(self) -> float:
        return 1 / self.temperature + math.log(self.k)


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """Score every query for every class by weighted kNN.

    score_c is the sum of exp(cosine / temperature) over those of the query's k nearest training
    images that are of class c. The search is exact and in float32: by faiss on the CPU where it is
    installed, else by torch. Votes are added up in float64. If several training images have exactly
    the k-th similarity, the search chooses which of them vote. A zero vector has similarity 0 to
    everything.

    Args:
        train_features: features of the training images, (N, D) with N >= 1, of any real dtype,
            normalised here. The search runs on their device.
        train_labels: classes of the training images, (N,) integers in [0, C).
        features: features of the queries, (Q, D), normalised here; Q may be 0.
        k: number of neighbours that vote; all N if k > N.
        temperature: divisor of the cosine similarity; `KNNProtocol` gives published values.
        num_classes: number of classes C; the labels at hand need not cover all of them.

    Returns:
        (Q, C) on the queries' device, not normalised over the classes. float32, or float64 where
        the temperature is so low that float32 could overflow (`KNNProtocol.score_dtype`).

    Raises:
        ValueError: the training set is empty, sizes do not match, labels are out of range,
            features are not finite, or `KNNProtocol` refuses k or temperature.

    Example:
        >>> import torch
        >>> from peerlearn.knn import knn_scores, knn_top1
        >>> train = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> queries = torch.tensor([[3.0, 1.0], [0.0, 5.0]])
        >>> scores = knn_scores(train, torch.tensor([0, 0, 1]), queries, k=1, temperature=0.1, num_classes=2)
        >>> scores.argmax(dim=1)
        tensor([0, 1])
        >>> knn_top1(scores, torch.tensor([0, 0]))
        50.0
    """
    (scores,) = knn_sweep(
        train_features,
        train_labels,
        features,
        protocols=[KNNProtocol(k=k, temperature=temperature)],
        num_classes=num_classes,
    )
    return scores


def knn_sweep(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    protocols: Sequence[KNNProtocol],
    num_classes: int,
) -> list[Tensor]:
    """`knn_scores` under every protocol, by one search for the largest k.

    Args:
        train_features: as in `knn_scores`.
        train_labels: as in `knn_scores`.
        features: as in `knn_scores`.
        protocols: settings to score by, at least one.
        num_classes: as in `knn_scores`.

    Returns:
        One (Q, C) per protocol, each as `knn_scores` gives it. Only the choice among training images of exactly the
        k-th similarity may differ.

    Raises:
        ValueError: as in `knn_scores`.
    """
    train = unit_rows(train_features, "train_features").float()
    queries = unit_rows(features, "features").float().to(train.device)
    if len(train) == 0:
        raise ValueError("train_features is empty: there is no neighbour to vote")
    if train.shape[1] != queries.shape[1]:
        raise ValueError(
            f"train_features has {train.shape[1]} dimensions, features {queries.shape[1]}"
        )
    _check_labels("train_labels", train_labels, len(train), num_classes)

    # The votes are added up on the CPU, where the sum has one order. On CUDA scatter_add_ has none.
    largest_k = min(max(protocol.k for protocol in protocols), len(train))
    search = _search_for(train.device)
    similarities, neighbours = (each.cpu() for each in search(train, queries, largest_k))
    # Rounding may leave a cosine above 1, but KNNProtocol bounds the score by k exp(1 / T).
    similarities = similarities.double().clamp_(-1, 1)
    classes = train_labels.cpu().long()[neighbours]
    scores = []
    for protocol in protocols:
        votes = torch.zeros(len(queries), num_classes, dtype=torch.float64)
        weights = (similarities[:, : protocol.k] / protocol.temperature).exp_()
        votes.scatter_add_(1, classes[:, : protocol.k], weights)
        scores.append(votes.to(features.device, protocol.score_dtype))
    return scores


def knn_top1(scores: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent. If several classes have the highest score, the lowest is the prediction.

    Args:
        scores: scores of the queries, (Q, C) with Q >= 1.
        labels: classes of the queries, (Q,) integers in [0, C).

    Raises:
        ValueError: there are no queries, sizes do not match, or labels are out of range.
    """
    if scores.ndim != 2 or len(scores) == 0:
        raise ValueError(f"scores must be (Q, C) with Q >= 1, not {tuple(scores.shape)}")
    _check_labels("labels", labels, len(scores), scores.shape[1])
    # argmax returns the first of equal maxima (torch documents it), hence the lowest class.
    correct = scores.argmax(dim=1).cpu() == labels.cpu()
    return 100 * correct.double().mean().item()


def ensemble_features(features: Sequence[Tensor]) -> Tensor:
    """One feature for a cohort: its networks' L2-normalised features side by side.

    The cosine of two such rows is the mean of the networks' cosines, so every network has the same
    weight whatever its scale and width.

    Args:
        features: features of each network m, (N, D_m), all on one device.

    Returns:
        (N, sum of D_m), float64 if any of the inputs is, else float32.

    Raises:
        ValueError: there is no network, N differs, or features are not finite.
    """
    if len(features) == 0:
        raise ValueError("features is empty: an ensemble needs at least one network")
    rows = [unit_rows(each, f"features[{network}]") for network, each in enumerate(features)]
    if len({len(each) for each in rows}) > 1:
        raise ValueError(f"the networks have features of {[len(each) for each in rows]} images")
    return torch.cat(rows, dim=1)


@torch.no_grad()
def unit_rows(features: Tensor, name: str = "features") -> Tensor:
    """L2-normalised copy of (N, D) features, without gradient; a zero row stays zero.

    Rows are first divided by their largest entry. So no square over- or underflows, and features of
    any finite scale keep their direction.

    Returns:
        (N, D), float64 for float64, float32 for every other dtype.

    Raises:
        ValueError: the shape is not (N, D) with D >= 1, or an entry is not finite.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with D >= 1, not {tuple(features.shape)}")
    rows = features if features.dtype == torch.float64 else features.float()
    largest: Tensor = torch.linalg.vector_norm(rows, ord=math.inf, dim=1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")
    rows = rows / largest.masked_fill(largest == 0, 1)
    # Now 1 <= norm <= sqrt(D), except for zero rows.
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(1))


def _check_labels(name: str, labels: Tensor, size: int, num_classes: int) -> None:
    if labels.shape != (size,):
        raise ValueError(f"{name} must be ({size},), not {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be integers, not {labels.dtype}")
    if size > 0:
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"{name} lie in [{lowest}, {highest}], outside the {num_classes} classes"
            )


def _search_for(device: torch.device) -> _Search:
    if device.type == "cpu":
        return _faiss_search() or _search_with_torch
    return _search_with_torch


@functools.cache
def _faiss_search() -> _Search | None:
    """The search by faiss, or None where faiss cannot be imported; a warning says so once per process."""
    try:
        from faiss import METRIC_INNER_PRODUCT, knn
    except ImportError as error:
        _LOG.warning("kNN searches with torch, faiss is missing (pip install faiss-gpu): %s", error)
        return None

    # faiss.knn is IndexFlatIP's search without the index's copy of the training features.
    def search_with_faiss(train: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        similarities, neighbours = knn(
            queries.numpy(), train.numpy(), k, metric=METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(similarities), torch.from_numpy(neighbours)

    return search_with_faiss


def _search_with_torch(train: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest dot products of each query, (Q, k), and their training rows, (Q, k)."""
    chunk = max(1, _TILE_ELEMENTS // len(train))
    # An error of TF32 is about 5e-4, which at temperature 0.07 is a percent of a vote.
    with full_float32(train.device):
        found = [(part @ train.T).topk(k, dim=1) for part in queries.split(chunk)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
