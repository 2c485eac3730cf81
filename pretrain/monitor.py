"""What is watched while a cohort trains: kNN accuracy, and figures that show a collapse early.

Nothing here touches training: networks run in eval mode, and random views come from counters, not from a generator.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peerlearn.data.datasets import ImageDataset, first_images, load_dataset
from peerlearn.data.loader import ViewLoader, sampler_of
from peerlearn.data.published import is_split_by_class
from peerlearn.data.recipes import Augmentation
from peerlearn.data.unreadable import Unreadable, warn_of_unreadable
from peerlearn.errors import UserError
from peerlearn.evaluation.classification import classification_scores
from peerlearn.evaluation.data import warn_of_missing_classes
from peerlearn.evaluation.features import eval_mode, extract_features
from peerlearn.evaluation.representation import (
    alignment,
    feature_std,
    lidar,
    neighbour_agreement,
    peer_agreement,
    rankme,
    uniformity,
)
from peerlearn.knn import ensemble_features, knn_scores, knn_top1
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import KEY_PREFIX
from peerlearn.runs.score_names import (
    AGREEMENT,
    ENSEMBLE,
    KNN_K,
    KNN_TEMPERATURE,
    KNN_TEST_IMAGES,
    KNN_TOP1,
    KNN_TRAIN_IMAGES,
    LINEAR_TOP1,
    NEIGHBOUR_AGREEMENT,
    PIXELS,
    measured_part,
    parse_score_name,
    score_name,
)
from pretrain.cohort import Cohort
from pretrain.config import Backend, PretrainConfig
from pretrain.online_probe import OnlineProbe

# RankMe's singular values cost N D^2; some thousands of images settle them.
_RANKME_IMAGES = 4096
_PROBE_IMAGES = 512
# LiDAR compares two covariances, which fewer images than this for each dimension of the embedding do not settle.
_LIDAR_IMAGES_PER_DIMENSION = 2
# Distances of all pairs cost N^2 D.
_NEIGHBOUR_IMAGES = 2048
# Beyond small images, raw pixels are too wide to search and no baseline anyone quotes.
_LARGEST_PIXEL_COUNT = 4096

# Below this mean deviation, features differ by no more than the rounding of float32.
_COLLAPSED_STD = 1e-8
# Early in training embeddings lie close together (uniformity near 0) and yet tell images apart. They have collapsed
# where, as close together as this, the squared distance of two views of an image is not even so much below that of two
# images.
_COLLAPSED_UNIFORMITY = -0.01
_COLLAPSED_DISTANCE_RATIO = 0.9

# Features by network, and the images' labels.
_Encoded = tuple[dict[str, Tensor], Tensor | None]

logger = logging.getLogger(__name__)


class Monitor:
    """Measures a cohort on the dataset it trains on: its labelled train split votes, its test split is asked."""

    def __init__(
        self,
        config: PretrainConfig,
        dataset: ImageDataset,
        data_root: str | None,
        *,
        augmentation: Sequence[Augmentation],
        backend: Backend,
        image_size: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.image_size = image_size
        self.device = device
        self.train, self.test = _labelled_splits(config, dataset, data_root)
        probed = first_images(dataset, min(_PROBE_IMAGES, len(dataset)))
        self._probe = ViewLoader(
            probed,
            augmentation,
            sampler=sampler_of(probed, batch_size_global=min(64, len(probed)), seed=config.seed),
            backend=backend,
            image_size=image_size,
            seed=config.seed,
            device=device,
            workers=config.data.workers,
            # Training counts them; these few may well be the bad ones.
            max_unreadable_percent=100.0,
        )

    def measure(
        self,
        cohort: Cohort,
        peers: Cohort | None = None,
        *,
        probe: OnlineProbe | None = None,
        pixels: bool = False,
    ) -> dict[str, float]:
        """Every figure of every network, by its name in metrics.jsonl; accuracies in percent.

        Args:
            cohort: the query networks.
            peers: the momentum networks, measured too where the config asks for them.
            probe: linear classifiers of the query networks, measured where the test images have labels.
            pixels: whether raw pixels are measured too, which a network has to beat.
        """
        row: dict[str, float] = {}
        networks = {str(m): backbone for m, backbone in enumerate(cohort.backbones)}
        if peers is not None and self.config.monitor.key_networks:
            networks |= {f"{KEY_PREFIX}{m}": backbone for m, backbone in enumerate(peers.backbones)}
        test, test_labels = self._features(self.test, networks)
        for name, features in test.items():
            row[score_name(name, "rankme")] = rankme(features[:_RANKME_IMAGES])
            row[score_name(name, "feature_std")] = feature_std(features)
        if self.train is not None:
            train, train_labels = self._features(self.train, networks)
            names = list(networks)[: len(cohort.backbones)]
            row |= self._knn((train, train_labels), (test, test_labels), cohort_names=names)
            if probe is not None:
                row |= _linear(probe, [test[name] for name in names], test_labels)
        elif len(cohort.backbones) > 1:
            few = [test[str(m)][:_NEIGHBOUR_IMAGES] for m in range(len(cohort.backbones))]
            row[NEIGHBOUR_AGREEMENT] = neighbour_agreement(few)
        row |= self._probe_figures(cohort)
        if pixels and (top1 := self.pixels_top1()) is not None:
            row[score_name(PIXELS, KNN_TOP1)] = top1
        return row

    def pixels_top1(self) -> float | None:
        """kNN top-1 of the raw pixels in percent, which a network has to beat; None for large images and files."""
        if self.train is None:
            return None
        train, test = self.train.images, self.test.images
        if not (isinstance(train, Tensor) and isinstance(test, Tensor)):
            return None
        if train[0].numel() > _LARGEST_PIXEL_COUNT:
            return None
        assert self.train.labels is not None
        assert self.test.labels is not None
        scores = self._scores(train.flatten(1).float(), self.train.labels, test.flatten(1).float())
        return knn_top1(scores, self.test.labels)

    def _features(
        self, dataset: ImageDataset, networks: dict[str, nn.Module]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every network's features of the images that can be read, and their labels."""
        unreadable: list[Unreadable] = []
        encoded = extract_features(
            list(networks.values()),
            dataset,
            image_size=self.image_size,
            batch_size=self.config.batch_size,
            device=self.device,
            workers=self.config.data.workers,
            unreadable=unreadable,
        )
        readable = torch.ones(len(dataset), dtype=torch.bool)
        readable[[image.index for image in unreadable]] = False
        warn_of_unreadable(dataset, unreadable, "are left out of the monitor")
        labels = None if dataset.labels is None else dataset.labels[readable]
        features = [rows[readable.to(rows.device)] for rows in encoded]
        return dict(zip(networks, features, strict=True)), labels

    def _knn(self, train: _Encoded, test: _Encoded, *, cohort_names: list[str]) -> dict[str, float]:
        (train_features, train_labels), (test_features, test_labels) = train, test
        assert train_labels is not None
        assert test_labels is not None
        scores = {
            name: self._scores(train_features[name], train_labels, test_features[name])
            for name in train_features
        }
        row = {
            score_name(name, KNN_TOP1): knn_top1(votes, test_labels)
            for name, votes in scores.items()
        }
        joint = [
            ensemble_features([features[name] for name in cohort_names])
            for features in (train_features, test_features)
        ]
        row[score_name(ENSEMBLE, KNN_TOP1)] = knn_top1(
            self._scores(joint[0], train_labels, joint[1]), test_labels
        )
        if len(cohort_names) > 1:
            row[AGREEMENT] = peer_agreement(
                torch.stack([scores[name].argmax(-1) for name in cohort_names])
            )
        monitor = self.config.monitor
        protocol = {
            KNN_K: min(monitor.k, len(train_labels)),
            KNN_TEMPERATURE: monitor.temperature,
            KNN_TRAIN_IMAGES: len(train_labels),
            KNN_TEST_IMAGES: len(test_labels),
        }
        return row | protocol

    def _scores(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        assert self.train is not None
        return knn_scores(
            train,
            labels,
            test,
            k=self.config.monitor.k,
            temperature=self.config.monitor.temperature,
            num_classes=self.train.num_classes,
        )

    @torch.no_grad()
    def _probe_figures(self, cohort: Cohort) -> dict[str, float]:
        """Alignment, uniformity and LiDAR of the embeddings of two views of the first training images."""
        with eval_mode([cohort]):
            pairs = [[cohort(view) for view in batch.views] for batch in self._probe.epoch(0)]
        first, second = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
        row = {}
        for m in range(len(first)):
            row[score_name(m, "alignment")] = alignment(first[m], second[m])
            row[score_name(m, "uniformity")] = uniformity(first[m])
            if len(first[m]) >= _LIDAR_IMAGES_PER_DIMENSION * first[m].shape[1]:
                row[score_name(m, "lidar")] = lidar(torch.stack([first[m], second[m]]))
        return row


def _linear(
    probe: OnlineProbe, features: Sequence[Tensor], labels: Tensor | None
) -> dict[str, float]:
    """Top-1 in percent of every network's linear classifier, and of their mean logits."""
    assert labels is not None
    logits = probe.logits(features)
    named = {**{str(m): each for m, each in enumerate(logits)}, ENSEMBLE: logits.mean(0)}
    return {
        score_name(name, LINEAR_TOP1): classification_scores(each, labels).top1
        for name, each in named.items()
    }


def warn_of_collapse(run: RunDirectory, step: int, row: dict[str, float]) -> None:
    """Say, and leave an event, where a network's features or embeddings no longer tell images apart."""
    scores = {name: row[key] for key in row if (name := parse_score_name(key))}
    for network in sorted({name.network for name in scores}):
        figures = {name.figure: scores[name] for name in scores if name.network == network}
        for vectors, signs in _collapsed_vectors(figures).items():
            text = ", ".join(f"{name} {value:.2g}" for name, value in signs.items())
            part = measured_part(network)
            logger.warning(
                "%s: its %s no longer tell images apart at step %d: %s", part, vectors, step, text
            )
            run.event("collapse", step=step, network=part, vectors=vectors, **signs)


def _collapsed_vectors(figures: dict[str, float]) -> dict[str, dict[str, float]]:
    """Which vectors of a network have collapsed, by their name, and the figures that say so."""
    collapsed = {}
    std = figures.get("feature_std", math.inf)
    if std < _COLLAPSED_STD:
        collapsed["features (pooled backbone output)"] = {"feature_std": std}
    uniformity, alignment = (figures.get(name, -math.inf) for name in ("uniformity", "alignment"))
    # Near 0, uniformity is -2 times the mean squared distance of two images.
    distance = -uniformity / 2
    if uniformity > _COLLAPSED_UNIFORMITY and alignment >= _COLLAPSED_DISTANCE_RATIO * distance:
        collapsed["embeddings (output of the head)"] = {
            "uniformity": uniformity,
            "alignment": alignment,
        }
    return collapsed


def _labelled_splits(
    config: PretrainConfig, dataset: ImageDataset, data_root: str | None
) -> tuple[ImageDataset | None, ImageDataset]:
    """The images that vote and those that are asked; without labels, none vote and training's are looked at."""
    limits = config.monitor
    if is_split_by_class(dataset.name):
        logger.warning("kNN is off: the splits of %s are of different classes", dataset.title)
        return None, _unlabelled(dataset)

    def load(split: str, limit: int | None) -> ImageDataset:
        return load_dataset(dataset.name, split, root=data_root, limit=limit)

    try:
        train, test = load("train", limits.train_limit), load("test", limits.test_limit)
    except UserError as error:
        logger.warning("kNN is off: %s", error)
    else:
        for remark in dict.fromkeys((*train.remarks, *test.remarks)):
            # Those of the images that are trained on are told already.
            if remark not in dataset.remarks:
                logger.warning("%s", remark)
        if train.labels is not None and test.labels is not None:
            warn_of_missing_classes(train, test)
            return train, test
        split = train if train.labels is None else test
        why = f" ({split.why_unlabelled})" if split.why_unlabelled else ""
        logger.warning("kNN is off: %s %s has no labels%s", split.title, split.split, why)
    return None, _unlabelled(dataset)


def _unlabelled(dataset: ImageDataset) -> ImageDataset:
    """The images that label-free figures are measured on."""
    return first_images(
        dataclasses.replace(dataset, labels=None), min(_RANKME_IMAGES, len(dataset))
    )
