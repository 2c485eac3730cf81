"""How well the networks of a supervised cohort classify, each alone and together.

Dimensions: M networks, N images, C classes.
"""

import torch
from torch import Tensor, nn

from peerlearn.data.datasets import ImageDataset, first_images
from peerlearn.data.unreadable import Unreadable
from peerlearn.evaluation.classification import ClassificationScores, classification_scores
from peerlearn.evaluation.features import extract_features
from peerlearn.runs.score_names import ENSEMBLE, TOP1, TOP5, WEIGHTED_ENSEMBLE, score_name
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.training_data import TrainingData


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
            row[score_name(name, self.split + TOP1)] = scores.top1
            if scores.top5 is not None:
                row[score_name(name, self.split + TOP5)] = scores.top5
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
    (encoded,) = extract_features(
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
    logits = encoded[readable].unflatten(1, (len(cohort.backbones), -1)).transpose(0, 1)
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
        scores[WEIGHTED_ENSEMBLE] = classification_scores((theta * logits).sum(0), labels)
    return scores
