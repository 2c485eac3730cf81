"""A detector's detections in the images of a data set, shared by all ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from detection.config import ModelConfig
from peerlearn.compute.dist import Ranks
from peerlearn.compute.precision import Precision
from peerlearn.data.detection_loader import DetectionView, test_images
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.evaluation.features import eval_mode
from peerlearn.runs.progress import phase

Detections = list[dict[str, Tensor]]
# Corners, score and label.
_COLUMNS = 6


def view_of(model: ModelConfig, *, training: bool) -> DetectionView:
    """How images are read for a detector: torchvision's resizes them itself."""
    own = model.detector == "torchvision_fpn"
    sides = () if own else tuple(model.short_sides)
    return DetectionView(short_sides=sides, longest_side=model.longest_side, flip=training)


@torch.inference_mode()
def detect(
    detector: nn.Module,
    dataset: DetectionDataset,
    model: ModelConfig,
    *,
    channels: int,
    precision: Precision,
    workers: int,
    ranks: Ranks,
) -> Detections:
    """Detections in every image of a data set. All ranks call it together, and all get those of all images.

    Args:
        detector: what `build_detector` made.
        dataset: images.
        model: config of the detector.
        channels: channels of its images.
        precision: number format of its passes.
        workers: number of processes that read images.
        ranks: processes that share the images.

    Returns:
        {boxes float32 (n, 4), scores (n,), labels int64 (n,)} of each image, on the CPU. Corners are in the pixels of
        the image file, from 0; labels count from 0, without the background.

    Raises:
        UserError: an image cannot be read.
    """
    numbers = list(range(ranks.rank, len(dataset), ranks.world_size))
    read = test_images(
        dataset,
        numbers,
        view_of(model, training=False),
        channels=channels,
        device=ranks.device,
        workers=workers,
    )
    found: dict[int, Tensor] = {}
    with (
        eval_mode([detector]),
        phase("testing", len(dataset), quiet=not ranks.main) as advance,
    ):
        for number, image in read:
            with precision.autocast():
                (seen,) = detector([image.float() / 255])
            found[number] = _in_file(seen, image, dataset.sizes[number])
            advance(ranks.world_size if ranks.main else 1)
    rows = _of_all_ranks(found, len(dataset), ranks)
    return [
        {"boxes": row[:, :4], "scores": row[:, 4], "labels": row[:, 5].long() - 1} for row in rows
    ]


def _in_file(seen: dict[str, Tensor], image: Tensor, size: Tensor) -> Tensor:
    """The detections of an image as rows (n, 6), with corners in the pixels of its file."""
    height, width = image.shape[-2:]
    scale = size.to(image.device) / torch.tensor([width, height], device=image.device)
    corners = seen["boxes"].float() * scale.repeat(2)
    others = [seen[name].float().unsqueeze(1) for name in ("scores", "labels")]
    return torch.cat([corners, *others], dim=1)


def _of_all_ranks(found: dict[int, Tensor], images: int, ranks: Ranks) -> list[Tensor]:
    """The rows of every image, on the CPU, from the ranks that have them."""
    if ranks.world_size == 1:
        return [found[number].cpu() for number in range(images)]
    counts = torch.zeros(images, dtype=torch.int64, device=ranks.device)
    for number, rows in found.items():
        counts[number] = len(rows)
    most = int(ranks.add_up(counts).max())
    padded = torch.zeros(images, most, _COLUMNS, device=ranks.device)
    for number, rows in found.items():
        padded[number, : len(rows)] = rows
    every, sizes = ranks.add_up(padded).cpu(), ranks.add_up(counts).tolist()
    return [rows[:size].clone() for rows, size in zip(every, sizes, strict=True)]


def for_rule(
    detections: Detections, dataset: DetectionDataset, *, rule: str, rounded: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Detections and targets as `detection.voc.evaluate` compares them.

    The rules of VOC count pixels from 1, and xmin and ymin alone move: a box is then as wide as its last pixel minus
    its first, plus 1. The rule of COCO takes corners as they are.

    Args:
        detections: what `detect` returned.
        dataset: images of the detections, with their objects.
        rule: rule of the average precision.
        rounded: whether scores have 3 decimals and corners 1, as in the files of Detectron2.
    """
    first = 0.0 if rule == "coco" else 1.0
    shift = torch.tensor([first, first, 0.0, 0.0])
    found = [{**each, "boxes": each["boxes"] + shift} for each in detections]
    if rounded:
        found = [
            {**each, "boxes": _rounded(each["boxes"], 1), "scores": _rounded(each["scores"], 3)}
            for each in found
        ]
    targets = [
        {"boxes": boxes + shift, "labels": labels, "difficult": difficult}
        for boxes, labels, difficult in zip(
            dataset.boxes, dataset.labels, dataset.difficult, strict=True
        )
    ]
    return found, targets


def _rounded(values: Tensor, decimals: int) -> Tensor:
    """As printing them with so many decimals rounds, float64 of the same shape."""
    # torch.round multiplies first, which moves some values to the other side of a half.
    each = [round(value, decimals) for value in values.flatten().tolist()]
    return torch.tensor(each, dtype=torch.float64).view(values.shape)
