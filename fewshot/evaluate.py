"""Few-shot accuracy of features, and of one checkpoint's networks.

Dimensions: N images, D features.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fewshot.config import FewShotConfig
from peerlearn.compute.dist import Ranks
from peerlearn.data.class_splits import check_disjoint
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.published import is_split_by_class
from peerlearn.evaluation.data import find_dataset, load_split
from peerlearn.evaluation.episodes import (
    Distance,
    Episodes,
    FewShotResult,
    Scorer,
    draw_episodes,
    draw_from,
    logistic_regression,
    nearest_centroid,
    read_episodes,
    score_episodes,
    write_episodes,
)
from peerlearn.evaluation.feature_cache import Extraction
from peerlearn.evaluation.feature_sets import FeatureSet, load_feature_sets
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.selection import Selection
from peerlearn.knn import unit_rows

__all__ = ["FewShotResult", "evaluate_features", "score"]


def evaluate_features(
    features: Tensor,
    labels: Tensor,
    *,
    ways: int,
    shots: int,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
    distance: Distance = "sqeuclidean",
) -> FewShotResult:
    """Accuracy of nearest prototypes over random episodes (Snell et al. 2017, sections 2.2 and 3.2).

    Args:
        features: (N, D), of any real dtype.
        labels: classes, (N,) integers.
        ways: number of classes of an episode.
        shots: number of support images of each class.
        queries: number of query images of each class.
        episodes: number of episodes.
        seed: seed of the episodes, which are the same for every network and machine.
        distance: sqeuclidean or cosine.

    Returns:
        Mean, half the width of its 95 % interval over episodes, and every episode's accuracy, in percent.

    Raises:
        UserError: there are fewer classes than ways, or a class has too few images.

    Example:
        >>> import torch
        >>> from fewshot.evaluate import evaluate_features
        >>> labels = torch.arange(3).repeat_interleave(20)
        >>> corners = torch.eye(3)[labels]  # every class in a corner of its own
        >>> result = evaluate_features(corners, labels, ways=3, shots=1, episodes=10)
        >>> result.mean, result.ci95
        (100.0, 0.0)
    """
    drawn = draw_episodes(
        labels, ways=ways, shots=shots, queries=queries, episodes=episodes, seed=seed
    )
    scorer = nearest_centroid(features, distance=distance)
    return score_episodes(features.shape[1], drawn, scorer)


def score(config: FewShotConfig, selection: Selection, ranks: Ranks) -> Iterator[Score]:
    """Score every selected network, and their ensemble, with every number of shots.

    All ranks call it together; the main one yields the scores.

    Raises:
        UserError: a dataset or an export that cannot be had; or too few classes or images for the episodes.
    """
    images, base = ranks.main_first(lambda: _load(config, selection))
    assert images.labels is not None
    episodes = _episodes(config, images, ranks)
    how = Extraction(
        ranks=ranks, batch_size=config.batch_size, workers=config.data.workers, cached=config.cache
    )
    novel, *others = load_feature_sets(selection, [images] if base is None else [images, base], how)
    if not ranks.main:
        return
    for name in filter(selection.wants, novel.features):
        features = _normalised(config, novel, others, name)
        scorer = _head(config, features)
        for shots, drawn in episodes.items():
            result = score_episodes(features.shape[1], drawn, scorer)
            yield Score(
                network=name,
                dataset=images.title,
                metrics={
                    "accuracy": result.mean,
                    "accuracy_ci95": result.ci95,
                    "n": config.episodes,
                    "accuracies": result.accuracies.tolist(),
                },
                protocol=_protocol(config, shots, images, base),
                variant=f"{config.ways}-way {shots}-shot",
            )


def _load(config: FewShotConfig, selection: Selection) -> tuple[ImageDataset, ImageDataset | None]:
    place = find_dataset(config.data, selection)
    images = load_split(place, config.data.split, config.data.limit, own_classes=True)
    if config.data.base_split is None:
        return images, None
    base = load_split(place, config.data.base_split, config.data.limit, own_classes=True)
    # Splits of the same classes, as most data sets have them, are what they are: no class is new to anyone there.
    if is_split_by_class(place.name) or set(base.class_names) != set(images.class_names):
        check_disjoint([base, images])
    return images, base


def _episodes(config: FewShotConfig, images: ImageDataset, ranks: Ranks) -> dict[int, Episodes]:
    """By their shots: those of the file, where it is there, else drawn, and written to it."""
    size = {"ways": config.ways, "queries": config.queries, "episodes": config.episodes}
    file = None if config.episodes_file is None else Path(config.episodes_file)
    if file is not None and ranks.from_main(file.exists):
        return read_episodes(
            file,
            config.shot_numbers(),
            **size,
            images=len(images),
            fingerprint=images.fingerprint(),
        )
    drawn = {
        shots: draw_from(images, shots=shots, seed=config.seed, **size)
        for shots in config.shot_numbers()
    }
    if file is not None:
        ranks.from_main(lambda: write_episodes(file, drawn, fingerprint=images.fingerprint()))
    return drawn


def _normalised(
    config: FewShotConfig, novel: FeatureSet, others: list[FeatureSet], name: str
) -> Tensor:
    """The features as the head sees them (Wang et al. 2019, section 3.2: CL2N centres by the base classes)."""
    features = novel.features[name]
    if config.features == "raw":
        return features
    if config.features == "cl2n":
        (base,) = others
        features = features.double() - base.features[name].double().mean(dim=0)
    return unit_rows(features)


def _head(config: FewShotConfig, features: Tensor) -> Scorer:
    if config.head == "logistic_regression":
        return logistic_regression(features, penalty_c=config.penalty_c)
    return nearest_centroid(features, distance=config.distance)


def _protocol(
    config: FewShotConfig, shots: int, images: ImageDataset, base: ImageDataset | None
) -> dict[str, Any]:
    head = {"distance": config.distance} if config.head == "centroid" else {"C": config.penalty_c}
    return {
        "ways": config.ways,
        "shots": shots,
        "queries": config.queries,
        "episodes": config.episodes,
        "episodes_seed": config.seed,
        "head": config.head,
        **head,
        "features": f"pooled backbone output, {config.features}",
        "interval": "1.96 sample std of the episodes' accuracies / sqrt(episodes)",
        "split": config.data.split,
        "test_images": len(images),
        "test_fingerprint": images.fingerprint(),
        "base_split": config.data.base_split,
        "base_fingerprint": None if base is None else base.fingerprint(),
    }
