"""A dataset's images, decoded once and held in main memory.

Dimensions: N images.
"""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.data.datasets import ImageDataset
from peerlearn.data.unreadable import (
    Unreadable,
    check_unreadable_rate,
    decode_images,
    substitutes,
)
from peerlearn.data.workers import results, worker_pool
from peerlearn.errors import UserError

_DECODE_CHUNK = 64
_PROGRESS_INTERVAL_SECONDS = 10.0

logger = logging.getLogger(__name__)


class HeldImages(NamedTuple):
    """A dataset's images in main memory.

    Attributes:
        images: uint8 (N, channels, height, width); undefined for an unreadable image.
        source: number of the image to take for each image, int64 (N,): its own, or that of its
            substitute if it is unreadable.
        unreadable: images that could not be decoded, by their number, in rising order.
    """

    images: Tensor
    source: Tensor
    unreadable: dict[int, Unreadable]


def held_in_memory(
    dataset: ImageDataset, *, seed: int, max_unreadable_percent: float, workers: int = 0
) -> HeldImages:
    """Decode the image files of a dataset.

    Args:
        dataset: images to hold.
        seed: seed by which substitutes are drawn.
        max_unreadable_percent: largest share of images that may be unreadable.
        workers: number of processes that decode; 0 = this one.

    Raises:
        UserError: more images cannot be decoded, or the images have several sizes.
    """
    source = torch.arange(len(dataset))
    if isinstance(dataset.images, Tensor):
        return HeldImages(dataset.images, source, {})
    images, unreadable = _decoded_files(dataset.images, dataset.name, workers)
    check_unreadable_rate(
        len(unreadable), len(dataset), max_unreadable_percent, list(unreadable.values())
    )
    for index, image in unreadable.items():
        drawn = substitutes(image, images=len(dataset), seed=seed)
        source[index] = next(other for other in drawn if other not in unreadable)
    return HeldImages(images, source, unreadable)


def _decoded_files(
    files: tuple[Path, ...], name: str, workers: int
) -> tuple[Tensor, dict[int, Unreadable]]:
    """Images, uint8 (N, 3, height, width), all of the size of the first readable one; and the unreadable ones."""
    chunks = [files[first : first + _DECODE_CHUNK] for first in range(0, len(files), _DECODE_CHUNK)]
    images, model = torch.empty(0, dtype=torch.uint8), None
    unreadable: dict[int, Unreadable] = {}
    done, reported = 0, time.monotonic()
    pool = worker_pool(decode_images, chunks, workers=workers, device=torch.device("cpu"))
    for decoded in results(pool):
        for position, reason in decoded.failures.items():
            index = done + position
            unreadable[index] = Unreadable(index, str(files[index]), reason)
        for index, image in enumerate(decoded.images, done):
            if index in unreadable:
                continue
            if model is None:
                model, images = files[index], images.new_empty((len(files), *image.shape))
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"{files[index]} is {_extent(image)} and {model} is {_extent(images)} pixels: "
                    "images of several sizes need data.backend folder"
                )
            images[index] = image
        done += len(decoded.images)
        if time.monotonic() - reported > _PROGRESS_INTERVAL_SECONDS:
            reported = time.monotonic()
            logger.info("decoded %d of %d images of %s", done, len(files), name)
    return images, unreadable


def _extent(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
