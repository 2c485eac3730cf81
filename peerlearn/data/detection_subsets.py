"""The images of a detection dataset that are trained on: those with objects, and shares of them drawn by counters.

Dimensions: N images, n objects of an image.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from peerlearn.counter_random import SUBSET, random_bits
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.errors import UserError


def training_part(
    dataset: DetectionDataset,
    *,
    difficult: Literal["keep", "drop"],
    percent: float = 100.0,
    seed: int = 0,
) -> DetectionDataset:
    """What a detector is trained on, in the order of the dataset.

    Images without objects are left out, as in Detectron2 (FILTER_EMPTY_ANNOTATIONS).

    Args:
        dataset: images with their objects.
        difficult: whether difficult objects, and with them COCO's crowds, count as objects or are left out. Detectron2
            trains on the difficult ones of Pascal VOC, and on no crowds.
        percent: share of the images with objects, within (0, 100], see `share`.
        seed: seed of the share.

    Raises:
        UserError: no image has an object.
    """
    part = without_difficult(dataset) if difficult == "drop" else dataset
    filled = torch.tensor([len(labels) for labels in part.labels]).nonzero()[:, 0]
    if not len(filled):
        none_left = (
            f"{dataset.title} {dataset.split}: none of its {len(dataset)} images has an object"
        )
        dropped = sum(len(labels) for labels in dataset.labels)
        if dropped:
            raise UserError(
                f"{none_left} left, as all {dropped} are difficult and are dropped: "
                "keep difficult objects, or choose another split"
            )
        raise UserError(
            f"{none_left}, and images without objects are not trained on: choose another split"
        )
    part = select_images(part, filled)
    return part if percent == 100 else select_images(part, share(part.labels, percent, seed=seed))


def without_difficult(dataset: DetectionDataset) -> DetectionDataset:
    """The dataset with the same images, and no difficult objects."""
    kept = [~of_image for of_image in dataset.difficult]

    def chosen(of_images: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(each[mask] for each, mask in zip(of_images, kept, strict=True))

    return replace(
        dataset,
        boxes=chosen(dataset.boxes),
        labels=chosen(dataset.labels),
        difficult=chosen(dataset.difficult),
        truncated=chosen(dataset.truncated),
    )


def share(labels: Sequence[Tensor], percent: float, *, seed: int) -> Tensor:
    """``percent`` of the images, rounded, but at least as many as it takes to have every class.

    The images are put in an order, and the first of them are taken: so a smaller share is part of every larger one of
    the same seed. The order is that of random numbers of (seed, image), except that images come first which are the
    first of a class in it.

    Args:
        labels: classes of each image's objects, N times (n,), n > 0.
        percent: share of the images, within (0, 100].
        seed: seed of the share.

    Returns:
        int64 numbers of the images, rising.
    """
    place = random_bits(SUBSET, seed, torch.arange(len(labels))).argsort(stable=True).argsort()
    classes, of_object = torch.cat(list(labels)).unique(return_inverse=True)
    of_image = place.repeat_interleave(torch.tensor([len(each) for each in labels]))
    first = torch.full((len(classes),), len(labels)).scatter_reduce(0, of_object, of_image, "amin")
    comes_first = torch.isin(place, first)
    images = max(round(len(labels) * percent / 100), int(comes_first.sum()))
    order = (place + len(labels) * ~comes_first).argsort()
    return order[:images].sort().values


def first_images(dataset: DetectionDataset, limit: int) -> DetectionDataset:
    """The first ``limit`` images of the dataset, or all if it has fewer.

    Raises:
        UserError: ``limit`` is below 1.
    """
    if limit < 1:
        raise UserError(f"data.limit is {limit}: give a positive number of images, or leave it out")
    return select_images(dataset, torch.arange(min(limit, len(dataset))))


def select_images(dataset: DetectionDataset, index: Tensor) -> DetectionDataset:
    """The images with these numbers, int64 (n,), in this order, with their objects."""
    numbers = index.tolist()
    return replace(
        dataset,
        images=tuple(dataset.images[i] for i in numbers),
        sizes=dataset.sizes[index],
        boxes=tuple(dataset.boxes[i] for i in numbers),
        labels=tuple(dataset.labels[i] for i in numbers),
        difficult=tuple(dataset.difficult[i] for i in numbers),
        truncated=tuple(dataset.truncated[i] for i in numbers),
    )
