"""How well the networks of a supervised cohort classify, each alone and together.

Dimensions: M networks, N images, C classes.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peerlearn.data.augment import EVALUATION_VIEW
from peerlearn.data.datasets import ImageDataset, first_images
from peerlearn.data.unreadable import Unreadable
from peerlearn.evaluation.classification import ClassificationScores, classification_scores
from peerlearn.evaluation.features import extract_features
from peerlearn.evaluation.results import write_result
from peerlearn.evaluation.uncertainty import accuracy_metrics
from peerlearn.export import export_hash
from peerlearn.runs.checkpoint import step_folder
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.distill import ensemble_weights
from pretrain.training_data import TrainingData

if TYPE_CHECKING:
    from pretrain.state import Training

ENSEMBLE, WEIGHTED = "ensemble", "weighted-ensemble"
TASK = "classification"


class AccuracyMonitor:
    """Watches accuracy on what is held out of training or, where nothing is, on the test split."""

    def __init__(
        self,
        config: PretrainConfig,
        data: TrainingData,
        *,
        image_size: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.image_size = image_size
        self.device = device
        assert data.test is not None
        self.split, self.watched = "validation", data.validation
        if self.watched is None:
            limit = config.monitor.test_limit or len(data.test)
            self.split, self.watched = "test", first_images(data.test, limit)

    def measure(self, cohort: Cohort, weights: Tensor) -> dict[str, float]:
        """Top-1 and top-5 in percent of every network and of both ensembles, by their names in metrics.jsonl.

        Args:
            cohort: networks with classifiers.
            weights: (M,) or (M, C) of the weighted ensemble.
        """
        assert self.watched is not None
        logits, labels = cohort_logits(
            cohort,
            self.watched,
            image_size=self.image_size,
            config=self.config,
            device=self.device,
        )
        row: dict[str, float] = {f"{self.split}/images": len(labels)}
        for name, scores in score_cohort(logits, labels, weights).items():
            prefix = f"net/{name}" if name.isdecimal() else name.replace("-", "_")
            row[f"{prefix}/{self.split}_top1"] = scores.top1
            if scores.top5 is not None:
                row[f"{prefix}/{self.split}_top5"] = scores.top5
        return row


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


def write_final_accuracy(training: "Training", weights: Tensor) -> dict[str, ClassificationScores]:
    """Measure the last epoch's networks on the whole test split and write a result file of each score.

    Neither an epoch nor a network is chosen by it. The weighted ensemble's theta is solved on the held-out images
    where there are any, else it is the moving average of training.

    Args:
        training: of the method supervised, at its last step, exported.
        weights: (M,) or (M, C), training's own theta.

    Raises:
        UserError: the folder of result files cannot be written.
    """
    start = time.monotonic()
    config, data, cohort = training.config, training.data, training.cohort
    assert data.test is not None
    measured = partial(
        cohort_logits,
        cohort,
        image_size=training.images.image_size,
        config=config,
        device=training.device,
    )
    if data.validation is not None and len(cohort.backbones) > 1:
        weights = ensemble_weights(
            *measured(data.validation), per_class=config.supervised.weights_per_class
        )
    scores = score_cohort(*measured(data.test), weights)
    seconds = round(time.monotonic() - start, 3)
    exports = training.run.exports / step_folder(training.step)
    hashes = {str(m): export_hash(exports / f"net-{m}") for m in range(len(cohort.backbones))}
    for network, found in scores.items():
        write_result(
            training.run.root / "results",
            task=TASK,
            dataset=data.test.name,
            step=training.step,
            network=network,
            metrics={
                **accuracy_metrics(found.top1, found.n),
                "top5": found.top5,
                "calibration_error": found.calibration_error,
            },
            protocol=_protocol(training, network),
            export_hash=hashes.get(network, hashes),
            seed=config.seed,
            seconds=seconds,
        )
    return scores


def _protocol(training: "Training", network: str) -> dict[str, Any]:
    """Under what a network's, or an ensemble's, final accuracy is measured."""
    config, data = training.config, training.data
    protocol = {
        "split": "test",
        "view": EVALUATION_VIEW,
        "image_size": training.images.image_size,
        "epoch": config.epochs,
        "epoch_chosen_by": "the config: the last",
        "train_split": data.train.split,
        "train_images": len(data.train),
    }
    if network == ENSEMBLE:
        protocol["ensemble"] = "mean of logits"
    elif network == WEIGHTED:
        per_class = ", per class" if config.supervised.weights_per_class else ""
        protocol["ensemble"] = f"logits weighted by theta of Eq. 9{per_class}"
        protocol["theta_from"] = (
            "training batches, moving average"
            if data.validation is None
            else f"{len(data.validation)} held-out images"
        )
    return protocol
