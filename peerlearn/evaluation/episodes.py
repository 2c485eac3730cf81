"""Few-shot episodes: which images are support and query, and how well features tell their classes apart.

An episode draws W classes, S support images of each to learn from, and Q query images of each to be asked. The rules
are those of prototypical networks (Snell et al. 2017), SimpleShot's nearest centroid (Wang et al. 2019) and the
logistic-regression head of Tian et al. 2020.

Dimensions: E episodes, W ways, S shots, Q queries of a class, N images, D features.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peerlearn.counter_random import EPISODE_CLASSES, EPISODE_IMAGES, random_bits
from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.evaluation.uncertainty import interval_of_mean
from peerlearn.knn import unit_rows
from peerlearn.runs.files import write_text
from peerlearn.runs.text import printable

Distance = Literal["sqeuclidean", "cosine"]
# Scores (e, W Q, W) of the queries of some episodes, from the numbers of support (e, W, S) and query (e, W Q).
Scorer = Callable[[Tensor, Tensor], Tensor]

# Entries of features, or random words, worked on at once: 8 MiB of float32.
_TILE_ELEMENTS = 2**21
_TILE_WORDS = 2**18


@dataclass(frozen=True)
class Episodes:
    """Which images every episode takes.

    Attributes:
        support: numbers of the images to learn from, int64 (E, W, S).
        query: numbers of the images to be asked, int64 (E, W, Q); row w is of the class of support row w.
    """

    support: Tensor
    query: Tensor

    def __len__(self) -> int:
        return len(self.support)


class FewShotResult(NamedTuple):
    """Accuracy over episodes, in percent.

    mean: of the episodes' accuracies.
    ci95: half the width of the 95 % interval of that mean over episodes, 1.96 times their sample deviation / sqrt(E).
        It says how far other episodes of the same classes would differ, and nothing of other training runs.
    accuracies: of each episode, float64 (E,).
    """

    mean: float
    ci95: float
    accuracies: Tensor


def draw_from(
    dataset: ImageDataset, *, ways: int, shots: int, queries: int, episodes: int, seed: int
) -> Episodes:
    """`draw_episodes` of a labelled dataset.

    Raises:
        UserError: as it does; the message names the dataset, its split and the class.
    """
    assert dataset.labels is not None
    try:
        return draw_episodes(
            dataset.labels,
            ways=ways,
            shots=shots,
            queries=queries,
            episodes=episodes,
            seed=seed,
            class_names=dataset.class_names,
        )
    except UserError as error:
        raise UserError(f"{dataset.title} {dataset.split}: {error}") from error


def draw_episodes(
    labels: Tensor,
    *,
    ways: int,
    shots: int,
    queries: int,
    episodes: int,
    seed: int,
    class_names: Sequence[str] = (),
) -> Episodes:
    """Episodes by counters: episode e is a pure function of (seed, e), the same for every network and machine.

    So the first 600 of 10,000 episodes are those of 600, and episodes of 1 shot and of 5 take the same classes.

    Args:
        labels: classes of the images, int64 (N,).
        ways: W, classes of an episode. shots: S. queries: Q. episodes: E.
        seed: of the draws.
        class_names: names of the classes, for messages; () = their numbers.

    Raises:
        UserError: there are fewer classes than ways, or a class has fewer than S + Q images.
    """
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < ways:
        raise UserError(
            f"episodes of {ways} ways need as many classes, and there are {len(classes)}: lower ways, or take "
            "other images"
        )
    needed = shots + queries
    if (short := counts < needed).any():
        first = int(short.nonzero()[0])
        number, count = int(classes[first]), int(counts[first])
        name = printable(class_names[number]) if class_names else number
        raise UserError(
            f"an episode takes {shots} shots and {queries} queries of a class, and class {name} has {count} "
            f"{'image' if count == 1 else 'images'}: lower shots or queries, or leave that class out"
        )
    # Row c: the images of class c, in order, and then nothing.
    members = torch.full((len(classes), int(counts.max())), -1, dtype=torch.long)
    order = labels.argsort(stable=True)
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    members[torch.arange(len(classes)).repeat_interleave(counts), within] = order
    parts = [
        _draw(members, first, last, ways=ways, needed=needed, seed=seed)
        for first, last in _ranges(episodes, ways * members.shape[1], _TILE_WORDS)
    ]
    images = torch.cat(parts)
    return Episodes(images[:, :, :shots].clone(), images[:, :, shots:].clone())


def _draw(members: Tensor, first: int, last: int, *, ways: int, needed: int, seed: int) -> Tensor:
    """Images of the episodes from ``first`` on: int64 (e, W, S + Q), all of a row of one class."""
    episode = torch.arange(first, last)[:, None]
    classes = torch.arange(len(members))
    chosen = random_bits(EPISODE_CLASSES, seed, episode, classes).argsort(dim=1, stable=True)
    chosen = chosen[:, :ways]
    images = members[chosen]
    # Every image of the class has a lot of its own in the episode; what is no image comes last.
    lot = random_bits(EPISODE_IMAGES, seed, episode[:, :, None], images)
    lot = lot.masked_fill(images < 0, torch.iinfo(torch.int64).max)
    places = lot.topk(needed, dim=2, largest=False, sorted=True).indices
    return images.gather(2, places)


def _ranges(total: int, elements_of_one: int, elements: int) -> Iterator[tuple[int, int]]:
    size = max(1, elements // max(1, elements_of_one))
    return ((start, min(start + size, total)) for start in range(0, total, size))


def nearest_centroid(features: Tensor, *, distance: Distance) -> Scorer:
    """Scores of queries by the prototypes of the classes, which are the means of their support features.

    Args:
        features: (N, D), of any real dtype.
        distance: sqeuclidean (Snell et al. 2017, equation 2), or the cosine of query and prototype.

    Returns:
        From the numbers of some episodes' support (e, W, S) and queries (e, W Q) to scores (e, W Q, W). They are in
        the order of the distances, but for a summand that a query's scores share.
    """
    if distance == "sqeuclidean":
        rows = features.to(_wide_enough(features))
        # What all features share takes the digits of what they differ in. Any vector near the mean serves.
        return partial(_by_distance, _Rows(rows - rows.mean(dim=0)))
    directions = unit_rows(features)
    origin = directions.mean(dim=0)
    return partial(
        _by_cosine, _Rows(features), origin, _Rows((directions - origin).to(_wide_enough(features)))
    )


def _wide_enough(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


class _Rows:
    """Takes rows into memory that it keeps: fresh memory for each tile would cost more than the copy."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._taken = rows.new_empty((0, rows.shape[1]))

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers (...): (..., D), until the next call."""
        if len(self._taken) < numbers.numel():
            self._taken = self._rows.new_empty((numbers.numel(), self._rows.shape[1]))
        out = self._taken[: numbers.numel()]
        torch.index_select(self._rows, 0, numbers.flatten().to(self._rows.device), out=out)
        rows: Tensor = out.unflatten(0, numbers.shape)
        return rows


def _by_distance(centred: _Rows, support: Tensor, query: Tensor) -> Tensor:
    prototype = centred[support].mean(dim=2)
    # -|q - p|^2 + |q|^2
    return torch.baddbmm(
        -prototype.square().sum(dim=2)[:, None], centred[query], prototype.transpose(1, 2), alpha=2
    )


def _by_cosine(
    features: _Rows, origin: Tensor, directions: _Rows, support: Tensor, query: Tensor
) -> Tensor:
    # In float64, as what all directions share takes the digits of what they differ in.
    mean = features[support].double().mean(dim=2)
    prototype = unit_rows(mean.flatten(0, 1)).sub_(origin).view_as(mean)
    along = prototype @ origin
    asked = directions[query]
    # q . p - q . origin, of unit q and p
    return torch.baddbmm(
        along[:, None].to(asked.dtype), asked, prototype.transpose(1, 2).to(asked.dtype)
    )


def logistic_regression(features: Tensor, *, penalty_c: float) -> Scorer:
    """Scores of queries by scikit-learn's logistic regression on each episode's support (Tian et al. 2020).

    Args:
        features: (N, D), of any real dtype.
        penalty_c: C, inverse strength of the L2 penalty.

    Returns:
        As `nearest_centroid` does: log-probabilities.
    """
    return partial(_by_logistic_regression, features, penalty_c)


def _by_logistic_regression(
    features: Tensor, penalty_c: float, support: Tensor, query: Tensor
) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    ways, shots = support.shape[1:]
    labels = np.repeat(np.arange(ways), shots)
    scores = []
    for learnt, asked in zip(support.flatten(1), query, strict=True):
        rows = features[torch.cat([learnt, asked]).to(features.device)].cpu().double().numpy()
        # The bias takes up any shift, and the fit is sooner done without it.
        rows -= rows.mean(axis=0)
        fit = LogisticRegression(C=penalty_c, max_iter=1000).fit(rows[: len(labels)], labels)
        scores.append(torch.from_numpy(fit.predict_log_proba(rows[len(labels) :])))
    return torch.stack(scores)


def score_episodes(size: int, episodes: Episodes, scorer: Scorer) -> FewShotResult:
    """The accuracy of every episode: the share of its queries whose own class scores highest.

    Among classes of equal score the first of the episode counts.

    Args:
        size: D, by which the episodes that are scored at once are counted.
        episodes: whose numbers are below N.
        scorer: `nearest_centroid(...)`, or another head.
    """
    count, ways, shots = episodes.support.shape
    queries = episodes.query.shape[2]
    truth = torch.arange(ways).repeat_interleave(queries)
    accuracies = []
    for first, last in _ranges(count, ways * (shots + queries) * size, _TILE_ELEMENTS):
        support = episodes.support[first:last]
        scores = scorer(support, episodes.query[first:last].flatten(1, 2))
        accuracies.append((scores.argmax(dim=2).cpu() == truth).double().mean(dim=1))
    shares = 100 * torch.cat(accuracies)
    return FewShotResult(float(shares.mean()), interval_of_mean(shares.tolist()), shares)


def write_episodes(file: Path, episodes: Mapping[int, Episodes], *, fingerprint: str) -> None:
    """Keep episodes, by their shots, for other networks and machines.

    Args:
        file: JSON file to write.
        episodes: episodes by their number of shots.
        fingerprint: hash of the images that their numbers count.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "images": fingerprint,
        "episodes": {
            str(shots): {"support": each.support.tolist(), "query": each.query.tolist()}
            for shots, each in episodes.items()
        },
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(
            f"episodes_file {file} cannot be written ({error.strerror}): choose another"
        ) from error


def read_episodes(
    file: Path,
    shots: Sequence[int],
    *,
    ways: int,
    queries: int,
    episodes: int,
    images: int,
    fingerprint: str,
) -> dict[int, Episodes]:
    """The episodes that `write_episodes` wrote, by their shots.

    Args:
        file: the JSON file.
        shots: numbers of shots to read the episodes of.
        ways: W. queries: Q. episodes: E.
        images: number of images that there are.
        fingerprint: hash of these images.

    Raises:
        UserError: the file holds other images, or no such episodes, or is no such file.
    """
    try:
        content = json.loads(file.read_text())
        kept = {
            int(each): Episodes(torch.tensor(those["support"]), torch.tensor(those["query"]))
            for each, those in content["episodes"].items()
        }
        of_images = content["images"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"episodes_file {file} holds no episodes ({error}): remove it, or name another"
        ) from error
    if of_images != fingerprint:
        raise UserError(
            f"episodes_file {file} is of other images: give the data set that it was written for, or name another file"
        )
    for each in shots:
        asked, has = (episodes, ways, each, queries), None
        if each in kept:
            support, query = kept[each].support.shape, kept[each].query.shape
            has = (*support, query[2]) if len(support) == len(query) == 3 else None
        if has != asked:
            raise UserError(
                f"episodes_file {file} has no {episodes} episodes of {ways} ways, {each} shots and {queries} queries"
                + (f", but {has[0]} of {has[1]}, {has[2]} and {has[3]}" if has else "")
                + ": set the keys to its numbers, or name another file"
            )
        numbers = torch.cat([kept[each].support.flatten(), kept[each].query.flatten()])
        if (
            numbers.is_floating_point()
            or not 0 <= int(numbers.min()) <= int(numbers.max()) < images
        ):
            raise UserError(
                f"episodes_file {file} numbers images beyond the {images:,} that there are: remove it, or name another"
            )
    return {each: kept[each] for each in shots}
