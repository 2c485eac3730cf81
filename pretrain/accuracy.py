"""How well the networks of a supervised cohort classify, each alone and together.

Dimensions: M networks, N images, C classes.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peerlearn.augment import EVALUATION_VIEW
from peerlearn.classification import ClassificationScores, classification_scores
from peerlearn.datasets import ImageDataset, load_dataset
from peerlearn.errors import UserError
from peerlearn.export import export_hash
from peerlearn.features import extract_features
from peerlearn.results import write_result
from peerlearn.uncertainty import accuracy_metrics
from peerlearn.unreadable import Unreadable
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.distill import ensemble_weights

ENSEMBLE, WEIGHTED = "ensemble", "weighted-ensemble"
TASK = "classification"


class AccuracyMonitor:
    """Watches accuracy on what is held out of training or, where nothing is, on the test split."""

    def __init__(
        self,
        config: PretrainConfig,
        watched: ImageDataset,
        *,
        held_out: bool,
        image_size: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.watched = watched
        self.held_out = held_out
        self.image_size = image_size
        self.device = device

    def measure(self, cohort: Cohort, weights: Tensor) -> dict[str, float]:
        """Top-1 and top-5 in percent of every network and of both ensembles, by their names in metrics.jsonl.

        Args:
            cohort: networks with classifiers.
            weights: (M,) or (M, C) of the weighted ensemble.
        """
        logits, labels = cohort_logits(
            cohort,
            self.watched,
            image_size=self.image_size,
            config=self.config,
            device=self.device,
        )
        split = "validation" if self.held_out else "test"
        row: dict[str, float] = {f"{split}/images": len(labels)}
        for name, scores in score_cohort(logits, labels, weights).items():
            prefix = f"net/{name}" if name.isdecimal() else name.replace("-", "_")
            row[f"{prefix}/{split}_top1"] = scores.top1
            if scores.top5 is not None:
                row[f"{prefix}/{split}_top5"] = scores.top5
        return row


def labelled_test_split(name: str, root: str | None, limit: int | None = None) -> ImageDataset:
    """The labelled test split of a dataset, or its first images.

    Raises:
        UserError: it cannot be had, or has no labels.
    """
    test = load_dataset(name, "test", root=root, limit=limit)
    if test.labels is None:
        raise UserError(f"{name} test has no labels to measure accuracy by")
    return test


class _Logits(nn.Module):
    """All networks' logits of a batch side by side (B, M * C), what they share run once."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__()
        self.cohort = cohort

    def forward(self, images: Tensor) -> Tensor:
        cohort = self.cohort
        return torch.cat(list(cohort.classify(cohort.branches(cohort.trunk(images)))), dim=1)


def cohort_logits(
    cohort: Cohort,
    dataset: ImageDataset,
    *,
    image_size: int,
    config: PretrainConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Logits (M, N, C) float32 and labels (N,) of the images that can be read, in eval mode, without augmentation."""
    assert dataset.labels is not None
    unreadable: list[Unreadable] = []
    (found,) = extract_features(
        [_Logits(cohort)],
        dataset,
        image_size=image_size,
        batch_size=config.batch_size,
        device=device,
        workers=config.data.workers,
        unreadable=unreadable,
    )
    readable = torch.ones(len(dataset), dtype=torch.bool)
    readable[[image.index for image in unreadable]] = False
    logits = found[readable].unflatten(1, (len(cohort.backbones), -1)).transpose(0, 1)
    return logits, dataset.labels[readable]


def score_cohort(
    logits: Tensor, labels: Tensor, weights: Tensor
) -> dict[str, ClassificationScores]:
    """Scores of networks "0", "1", ... and, for several, of the ensembles.

    Args:
        logits: (M, N, C).
        labels: (N,).
        weights: (M,) or (M, C), of the weighted ensemble, which says ``sum_m theta_m z_m`` (Eq. 9).
    """
    scores = {str(m): classification_scores(each, labels) for m, each in enumerate(logits)}
    if len(logits) > 1:
        scores[ENSEMBLE] = classification_scores(logits.mean(0), labels)
        theta = weights.view(len(logits), 1, -1)
        scores[WEIGHTED] = classification_scores((theta * logits).sum(0), labels)
    return scores


def write_final_accuracy(
    cohort: Cohort,
    config: PretrainConfig,
    *,
    root: str | None,
    trained: ImageDataset,
    validation: ImageDataset | None,
    image_size: int,
    weights: Tensor,
    exports: Path,
    results: Path,
    step: int,
    device: torch.device,
) -> dict[str, ClassificationScores]:
    """Measure the last epoch's networks on the whole test split and write a result file of each score.

    Neither an epoch nor a network is chosen by it. The weighted ensemble's theta is solved on the held-out images
    where there are any, else it is the moving average of training.

    Args:
        root: where the data lies; None = the usual places.
        trained: the images the networks were trained on.
        validation: those held out of training.
        weights: (M,) or (M, C), training's own theta.
        exports: the folder of this step's exports.
        results: the folder of result files.

    Raises:
        UserError: the test split cannot be had, or the folder cannot be written.
    """
    start = time.monotonic()
    test = labelled_test_split(trained.name, root)
    measured: dict[str, Any] = {"image_size": image_size, "config": config, "device": device}
    if validation is not None and len(cohort.backbones) > 1:
        held_out = cohort_logits(cohort, validation, **measured)
        weights = ensemble_weights(*held_out, per_class=config.supervised.weights_per_class)
    logits, labels = cohort_logits(cohort, test, **measured)
    scores = score_cohort(logits, labels, weights)
    seconds = round(time.monotonic() - start, 3)
    hashes = {str(m): export_hash(exports / f"net-{m}") for m in range(len(logits))}
    protocol = {
        "split": "test",
        "view": EVALUATION_VIEW,
        "image_size": image_size,
        "epoch": config.epochs,
        "epoch_chosen_by": "the config: the last",
        "train_split": trained.split,
        "train_images": len(trained),
    }
    for network, found in scores.items():
        own = dict(protocol)
        if network == ENSEMBLE:
            own["ensemble"] = "mean of logits"
        elif network == WEIGHTED:
            own["ensemble"] = "logits weighted by theta of Eq. 9" + (
                ", per class" if config.supervised.weights_per_class else ""
            )
            own["theta_from"] = (
                "training batches, moving average"
                if validation is None
                else f"{len(validation)} held-out images"
            )
        write_result(
            results,
            task=TASK,
            dataset=test.name,
            step=step,
            network=network,
            metrics={
                **accuracy_metrics(found.top1, found.n),
                "top5": found.top5,
                "calibration_error": found.calibration_error,
            },
            protocol=own,
            export_hash=hashes[network] if network.isdecimal() else hashes,
            seed=config.seed,
            seconds=seconds,
        )
    return scores
