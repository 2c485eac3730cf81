"""A dataset's images, decoded once and held in main memory.

Dimensions: N images.
"""

from collections.abc import Callable, Mapping
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
from peerlearn.runs.progress import phase

_DECODE_CHUNK = 64


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
    dataset: ImageDataset,
    *,
    seed: int,
    max_unreadable_percent: float,
    workers: int = 0,
    quiet: bool = False,
) -> HeldImages:
    """Decode the image files of a dataset.

    Args:
        dataset: images to hold.
        seed: seed by which substitutes are drawn.
        max_unreadable_percent: largest share of images that may be unreadable.
        workers: number of processes that decode; 0 = this one.
        quiet: whether not to tell how far it is.

    Raises:
        UserError: more images cannot be decoded, or the images have several sizes.
    """
    if isinstance(dataset.images, Tensor):
        return HeldImages(dataset.images, torch.arange(len(dataset)), {})
    with phase("reading", len(dataset), quiet=quiet) as advance:
        images, unreadable = _decoded_files(dataset.images, workers, advance)
    check_unreadable_rate(
        len(unreadable), len(dataset), max_unreadable_percent, list(unreadable.values())
    )
    return HeldImages(images, readable_sources(len(dataset), unreadable, seed=seed), unreadable)


def readable_sources(images: int, unreadable: Mapping[int, Unreadable], *, seed: int) -> Tensor:
    """The number of the image to take for each image, int64 (N,): its own, or that of its substitute.

    Args:
        images: number of images, N.
        unreadable: those that cannot be decoded, by their number.
        seed: seed by which substitutes are drawn.

    Raises:
        UserError: no substitute is found.
    """
    source = torch.arange(images)
    for index, image in unreadable.items():
        drawn = substitutes(image, images=images, seed=seed)
        source[index] = next(other for other in drawn if other not in unreadable)
    return source


def _decoded_files(
    files: tuple[Path, ...], workers: int, advance: Callable[[int], None]
) -> tuple[Tensor, dict[int, Unreadable]]:
    """Images, uint8 (N, 3, height, width), all of the size of the first readable one; and the unreadable ones."""
    chunks = [files[first : first + _DECODE_CHUNK] for first in range(0, len(files), _DECODE_CHUNK)]
    images, model = torch.empty(0, dtype=torch.uint8), None
    unreadable: dict[int, Unreadable] = {}
    done = 0
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
        advance(len(decoded.images))
    return images, unreadable


def _extent(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
