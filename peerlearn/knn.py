"""Weighted k-nearest-neighbour classification of frozen features, the cheapest look at a network.

The rule is the one of InstDisc (Wu et al. 2018, section 3.4), MoCo's CIFAR colab and DINO
(`eval_knn.py`): cosine similarity, and each of the k nearest training images votes for its class
with weight exp(similarity / temperature).

Early in training all images share one large direction, and their cosines differ in the seventh digit or
later, which float32 does not hold. So the search subtracts the mean of the training images' directions:

    q . t = (q - mean) . (t - mean) + (t - mean) . mean + q . mean

The first two summands rank the training images, and are as small as their differences. What float32 leaves
open even so is searched again in float64.

Dimensions: N training images, Q queries, D features, C classes.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peerlearn.compute.device import full_float32
from peerlearn.runs.stop import check_stop

_LOG = logging.getLogger(__name__)

# Similarities held at once by torch's searches: 128 MiB in float32, whatever N and Q are.
_TILE_ELEMENTS = 2**25
# Similarities of one group, of which the highest is looked at first.
_GROUP = 8
# Entries of features worked on in float64 at once: 1 MiB, which a core's cache holds.
_BLOCK_ELEMENTS = 2**17
_QUERIES_SEARCHED_AGAIN = 4096
# Candidates beyond the k that vote, among which float32 may not tell who is k-th.
_RUNNERS_UP = 8
# Rows whose mean is subtracted from all, up to twice as many.
_MEAN_OF_ROWS = 512

# A search of faiss cannot be interrupted: it takes a core some seconds for so many products.
_UNINTERRUPTED_PRODUCTS = 5e10
_FEWEST_QUERIES = 64

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
    images that are of class c. The neighbours and the predictions are those of a search in float64,
    at any offset and scale of the features. Faiss searches on the CPU where it is installed, else
    torch does. If several training images have exactly the k-th similarity, the search chooses which
    of them vote. A zero vector has similarity 0 to everything.

    Args:
        train_features: features of the training images, (N, D) with N >= 1, of any real dtype,
            normalised here. The search runs on their device.
        train_labels: classes of the training images, (N,) integers in [0, C).
        features: features of the queries, (Q, D), normalised here; Q may be 0.
        k: number of neighbours that vote; all N if k > N.
        temperature: divisor of the cosine similarity; `KNNProtocol` gives published values.
        num_classes: number of classes C; the labels at hand need not cover all of them.

    Returns:
        float64 (Q, C) on the queries' device, not normalised over the classes.

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
    _check_features(train_features, train_labels, features, num_classes)
    classes = train_labels.cpu().long()
    rivals = _Rivals(train_features, features)
    largest_k = min(max(protocol.k for protocol in protocols), len(classes))
    found = rivals.search(min(largest_k + _RUNNERS_UP, len(classes)))
    doubtful, beyond = _in_doubt(found, classes, protocols, num_classes)
    found = rivals.search_again(found, doubtful, beyond)
    return [
        _votes(found.cosines, classes[found.neighbours], protocol, num_classes).to(features.device)
        for protocol in protocols
    ]


class _Found(NamedTuple):
    """The nearest training images of every query, on the CPU, in descending order.

    cosines: float64 (Q, at least k).
    neighbours: numbers of the training images, of the same shape.
    error: how far the cosines may be off, (Q,).
    every: whether these are all training images.
    """

    cosines: Tensor
    neighbours: Tensor
    error: Tensor
    every: bool


class _Rivals:
    """Training features and queries, with what all directions share taken off."""

    def __init__(self, train_features: Tensor, features: Tensor) -> None:
        self._train = train_features
        device, size = train_features.device, train_features.shape[1]
        self._mean = _mean_direction(train_features)
        self._rows = torch.empty(
            (len(train_features), size + 1), dtype=torch.float32, device=device
        )
        for block in _blocks(train_features):
            self._rows[block, :size], self._rows[block, size] = _centred(
                train_features[block], self._mean, "train_features"
            )
        self._queries, offset = _centred(features.to(device), self._mean, "features")
        # What completes the cosine: q . mean.
        self._offset = (offset + self._mean @ self._mean).cpu()[:, None]

    def search(self, count: int) -> _Found:
        """The nearest ``count`` of each query, in float32."""
        asked = torch.ones((len(self._queries), self._rows.shape[1]), device=self._rows.device)
        asked[:, :-1] = self._queries
        similarities, neighbours = (
            each.cpu() for each in _search_for(asked.device)(self._rows, asked, count)
        )
        error = _rounding_error(self._rows, asked, neighbours)
        every = count == len(self._rows)
        return _Found(similarities.double() + self._offset, neighbours, error, every)

    def search_again(self, found: _Found, doubtful: Tensor, beyond: Tensor) -> _Found:
        """Search in float64 for the doubtful queries: among those found or, ``beyond`` them, among all."""
        device = self._queries.device
        near, far = ((doubtful & each).nonzero()[:, 0] for each in (~beyond, beyond))
        for again, candidates in (
            (near, found.neighbours[near].unique()),
            (far, torch.arange(len(self._rows))),
        ):
            for start in range(0, len(again), _QUERIES_SEARCHED_AGAIN):
                part = again[start : start + _QUERIES_SEARCHED_AGAIN]
                similarities, found.neighbours[part] = _search_in_float64(
                    self._train,
                    self._mean,
                    candidates.to(device),
                    self._queries[part.to(device)],
                    found.neighbours.shape[1],
                )
                found.cosines[part] = similarities + self._offset[part]
        return found


def _in_doubt(
    found: _Found, classes: Tensor, protocols: Sequence[KNNProtocol], num_classes: int
) -> tuple[Tensor, Tensor]:
    """For which queries rounding leaves open who votes or which class wins; and for which others may vote too."""
    doubtful, beyond = (torch.zeros(len(found.cosines), dtype=torch.bool) for _ in range(2))
    for protocol in protocols:
        votes = _votes(found.cosines, classes[found.neighbours], protocol, num_classes)
        doubtful |= _lead(votes) <= votes.sum(dim=1) * found.error / protocol.temperature
        if protocol.k < len(classes):
            edge = _edge(found.cosines, found.error, protocol.k)
            doubtful |= _several_classes(classes[found.neighbours], edge)
            if not found.every:
                beyond |= edge[:, -1]
    return doubtful, beyond


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
        float64 (N, sum of D_m).

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
    """L2-normalised copy of (N, D) features in float64, without gradient; a zero row stays zero.

    float64, because the directions of a network's images may differ by less than float32 resolves.

    Features of any finite scale keep their direction.

    Raises:
        ValueError: the shape is not (N, D) with D >= 1, or an entry is not finite.
    """
    _check_shape(features, name)
    # A copy, so that all that follows can be done in place.
    rows = features.to(torch.float64, copy=True)
    if features.dtype == torch.float64:
        # No square over- or underflows then. float64 holds the squares of every other dtype as they are.
        largest = torch.linalg.vector_norm(rows, ord=math.inf, dim=1, keepdim=True)
        rows.div_(largest.masked_fill_(largest == 0, 1))
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not norms.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")
    return rows.div_(norms.masked_fill_(norms == 0, 1))


def _check_shape(features: Tensor, name: str) -> None:
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with D >= 1, not {tuple(features.shape)}")


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


def _votes(cosines: Tensor, classes: Tensor, protocol: KNNProtocol, num_classes: int) -> Tensor:
    """The scores (Q, C) in float64, of neighbours (Q, at least k) in descending order."""
    # On the CPU, where the sum has one order. On CUDA scatter_add_ has none.
    votes = torch.zeros(len(cosines), num_classes, dtype=torch.float64)
    # Rounding may leave a cosine above 1, but KNNProtocol bounds the score by k exp(1 / T).
    weights = (cosines[:, : protocol.k].clamp(-1, 1) / protocol.temperature).exp_()
    return votes.scatter_add_(1, classes[:, : protocol.k], weights)


def _lead(votes: Tensor) -> Tensor:
    """How far the first class is ahead of the second, (Q,)."""
    if votes.shape[1] == 1:
        return votes[:, 0]
    highest: Tensor = votes.topk(2, dim=1).values
    return highest[:, 0] - highest[:, 1]


def _edge(similarities: Tensor, error: Tensor, k: int) -> Tensor:
    """Which of the candidates (Q, more than k) could be on either side of the k-th place, as far as float32 tells."""
    margin = 2 * error[:, None]
    last, first_left_out = similarities[:, k - 1 : k], similarities[:, k : k + 1]
    edge: Tensor = (similarities >= last - margin) & (similarities <= first_left_out + margin)
    return edge


def _several_classes(classes: Tensor, marked: Tensor) -> Tensor:
    """Whether the marked of each row are of more than one class, (Q,). Else it makes no odds which of them vote."""
    highest: Tensor = classes.masked_fill(~marked, -1).amax(dim=1)
    lowest: Tensor = classes.masked_fill(~marked, torch.iinfo(classes.dtype).max).amin(dim=1)
    return highest > lowest


def _check_features(
    train_features: Tensor, train_labels: Tensor, features: Tensor, num_classes: int
) -> None:
    for name, each in (("train_features", train_features), ("features", features)):
        _check_shape(each, name)
    if len(train_features) == 0:
        raise ValueError("train_features is empty: there is no neighbour to vote")
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            f"train_features has {train_features.shape[1]} dimensions, features {features.shape[1]}"
        )
    _check_labels("train_labels", train_labels, len(train_features), num_classes)


def _mean_direction(features: Tensor) -> Tensor:
    """About the mean of the L2-normalised rows, (D,) in float64: that of some, as the identity holds for any vector."""
    every = max(1, len(features) // _MEAN_OF_ROWS)
    return unit_rows(features[::every], "train_features").mean(dim=0)


def _centred(features: Tensor, mean: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """float64: each direction less the mean, (N, D), and the product of that with the mean, (N,)."""
    rows = unit_rows(features, name).sub_(mean)
    return rows, rows @ mean


def _blocks(features: Tensor) -> Iterator[slice]:
    """Slices of rows that are worked on in float64 at once."""
    rows = max(1, _BLOCK_ELEMENTS // features.shape[1])
    return (slice(start, start + rows) for start in range(0, len(features), rows))


def _rounding_error(train: Tensor, queries: Tensor, neighbours: Tensor) -> Tensor:
    """How far a float32 similarity of each query may be off, (Q,): some three standard deviations of its rounding."""
    lengths = torch.linalg.vector_norm(train[:, :-1], dim=1).cpu()[neighbours].amax(dim=1)
    along = train[:, -1].abs().cpu()[neighbours].amax(dim=1)
    size = torch.linalg.vector_norm(queries[:, :-1], dim=1).cpu() * lengths + along
    # The CPU's libraries add short sums of products, a GPU one long one.
    sums = 2 if train.device.type == "cpu" else math.sqrt(train.shape[1]) / 4
    error: Tensor = size * torch.finfo(torch.float32).eps * (2 + sums)
    return error


def _search_in_float64(
    train_features: Tensor, mean: Tensor, candidates: Tensor, queries: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k highest similarities of each centred query among some of the training rows, and the numbers of those rows.

    Both are (Q, k), on the CPU.
    """
    best = queries.new_empty((len(queries), 0))
    neighbours = torch.empty_like(best, dtype=torch.long)
    for rows in candidates.split(max(1, _TILE_ELEMENTS // max(len(queries), len(mean)))):
        block, along = _centred(train_features[rows], mean, "train_features")
        best = torch.cat([best, torch.addmm(along, queries, block.T)], dim=1)
        neighbours = torch.cat([neighbours, rows.expand(len(queries), -1)], dim=1)
        best, place = best.topk(min(k, best.shape[1]), dim=1)
        neighbours = neighbours.gather(1, place)
    return best.cpu(), neighbours.cpu()


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
        # Evenly, as faiss searches a few queries in another way.
        parts = max(1, math.ceil(len(queries) * train.numel() / _UNINTERRUPTED_PRODUCTS))
        found = []
        for part in queries.tensor_split(
            min(parts, math.ceil(len(queries) / _FEWEST_QUERIES) or 1)
        ):
            check_stop()
            found.append(knn(part.numpy(), train.numpy(), k, metric=METRIC_INNER_PRODUCT))
        similarities, neighbours = (np.concatenate(each) for each in zip(*found, strict=True))
        return torch.from_numpy(similarities), torch.from_numpy(neighbours)

    return search_with_faiss


def _search_with_torch(train: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest dot products of each query, (Q, k), and their training rows, (Q, k)."""
    chunk = max(1, min(_TILE_ELEMENTS // len(train), len(queries)))
    products = train.new_empty(chunk, len(train))
    found = []
    # An error of TF32 is about 5e-4, which at temperature 0.07 is a percent of a vote.
    with full_float32(train.device):
        for part in queries.split(chunk):
            found.append(_highest(torch.mm(part, train.T, out=products[: len(part)]), k))
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _highest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest entries of each row and their columns, in descending order: `topk`, sooner on long rows."""
    groups = rows.shape[1] // _GROUP
    if groups < 2 * k:
        return tuple(rows.topk(k, dim=1))  # type: ignore[return-value]
    # The k highest are all in the k groups with the highest maxima. Columns a whole `groups` apart are of one group, so
    # that maxima are of contiguous columns.
    grouped = rows[:, : groups * _GROUP].unflatten(1, (_GROUP, groups))
    best = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    starts = torch.arange(_GROUP, device=rows.device) * groups
    rest = torch.arange(groups * _GROUP, rows.shape[1], device=rows.device)
    columns = (best[:, None] + starts[:, None]).flatten(1)
    columns = torch.cat([columns, rest.expand(len(rows), -1)], dim=1)
    values, places = rows.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)
