"""How well class scores agree with labels. Dimension letters: N images, C classes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peerlearn.evaluation.uncertainty import accuracy_metrics

# Guo et al. 2017 bin confidences by 15 equal widths.
_CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class ClassificationScores:
    """Of one classifier on N test images; shares in percent.

    Attributes:
        top1: accuracy.
        top5: share of images whose class is among the five highest; None up to five classes.
        per_class_top1: accuracy within each class; None for a class without test images.
        calibration_error: expected calibration error, 0..100: by how much confidence and accuracy differ, over 15 bins
            (Guo et al. 2017, Eq. 5).
        confusion: int64 (C, C), how many images of the row's class were taken for the column's.
        n: how many test images.
    """

    top1: float
    top5: float | None
    per_class_top1: list[float | None]
    calibration_error: float
    confusion: Tensor
    n: int

    def metrics(self) -> dict[str, Any]:
        """What every result file tells of a classifier."""
        return {
            **accuracy_metrics(self.top1, self.n),
            "top5": self.top5,
            "calibration_error": self.calibration_error,
        }


def classification_scores(logits: Tensor, labels: Tensor) -> ClassificationScores:
    """Score logits (N, C) against labels (N,), N >= 1; of several highest classes the lowest is the prediction.

    Raises:
        ValueError: logits that are not finite.
    """
    if not logits.isfinite().all():
        raise ValueError("logits has entries that are not finite")
    n, classes = logits.shape
    logits, labels = logits.cpu().double(), labels.cpu().long()
    predicted = logits.argmax(dim=1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.view(classes, classes)
    correct, sizes = confusion.diagonal(), confusion.sum(1)
    return ClassificationScores(
        top1=100 * int(correct.sum()) / n,
        top5=_top5(logits, labels) if classes > 5 else None,
        per_class_top1=[
            100 * right / size if size else None
            for right, size in zip(correct.tolist(), sizes.tolist(), strict=True)
        ],
        calibration_error=100 * _calibration_error(logits, predicted == labels),
        confusion=confusion,
        n=n,
    )


def _calibration_error(logits: Tensor, correct: Tensor) -> float:
    """Over bins (b / 15, (b + 1) / 15] of the confidence: the gap to the accuracy, weighted by the bin's share."""
    confidence = logits.softmax(dim=1).amax(dim=1)
    bins = (confidence * _CALIBRATION_BINS).ceil().long().clamp(1, _CALIBRATION_BINS) - 1
    gaps = torch.zeros(_CALIBRATION_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, correct.double() - confidence)
    return float(gaps.abs().sum()) / len(logits)


def _top5(logits: Tensor, labels: Tensor) -> float:
    # A stable order, so that equal logits do not leave the answer to the sort.
    highest = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
    return 100 * float((highest == labels.view(-1, 1)).any(dim=1).double().mean())


def top1(logits: Tensor, labels: Tensor) -> float:
    """Accuracy in percent of (N, C) logits; 0 where they are not finite."""
    if not logits.isfinite().all():
        return 0.0
    return 100 * float((logits.argmax(dim=1) == labels).double().mean())
