"""A detector's average precision on the images of a data set, and the detections that it comes from."""

from typing import Any, NamedTuple

from torch import nn

from detection.config import DetectConfig, ModelConfig
from detection.inference import Detections, detect, for_rule
from detection.voc import Rule, VOCResult, evaluate
from peerlearn.compute.dist import Ranks
from peerlearn.compute.precision import Precision
from peerlearn.data.detection_sets import DetectionDataset


class Measured(NamedTuple):
    """Detections in the images of a data set, and their average precision.

    Attributes:
        detections: what `detect` returned.
        compared: detections and targets, as the rule compares them.
        rule: rule of the average precision.
        result: average precision.
    """

    detections: Detections
    compared: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    rule: Rule
    result: VOCResult


def measure(
    config: DetectConfig,
    detector: nn.Module,
    images: DetectionDataset,
    *,
    model: ModelConfig,
    channels: int,
    precision: Precision,
    ranks: Ranks,
) -> Measured:
    """Find the objects in all images, and compare them. All ranks call it together, and all get the same.

    Args:
        config: config that asks for it: rule, rounding and workers.
        detector: what `build_detector` made.
        images: images with their objects.
        model: config of the detector.
        channels: channels of its images.
        precision: number format of its passes.
        ranks: processes that share the images.

    Raises:
        UserError: an image cannot be read.
    """
    detections = detect(
        detector.to(ranks.device),
        images,
        model,
        channels=channels,
        precision=precision,
        workers=config.data.workers,
        ranks=ranks,
    )
    rule = config.chosen_rule
    found, targets = for_rule(detections, images, rule=rule, rounded=config.round_like_detectron2)
    result = evaluate(found, targets, num_classes=images.num_classes, rule=rule)
    return Measured(detections, (found, targets), rule, result)
