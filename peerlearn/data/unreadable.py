"""Image files that cannot be decoded: their substitutes in training, and the largest share that is accepted."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peerlearn.counter_random import SUBSTITUTE, random_bits
from peerlearn.data.image_folders import DecodeError, decode_image
from peerlearn.errors import UserError

if TYPE_CHECKING:
    from peerlearn.data.datasets import ImageDataset

logger = logging.getLogger(__name__)

# If half of a dataset is unreadable, one search in 2**100 fails.
_ATTEMPTS = 100
_NAMED = 3


class Unreadable(NamedTuple):
    """An image file that cannot be decoded.

    Attributes:
        index: number of the image in the dataset.
        path: path of the file.
        reason: why it cannot be decoded, in one line.
    """

    index: int  # type: ignore[assignment]  # not tuple.index
    path: str
    reason: str


class Decoded(NamedTuple):
    """Several image files, decoded.

    Attributes:
        images: uint8 (3, height, width) each; a black pixel for a file that cannot be decoded.
        failures: position among ``images`` -> why that file cannot be decoded.
    """

    images: list[Tensor]
    failures: dict[int, str]


def decode_images(files: Sequence[Path]) -> Decoded:
    """`decode_image` of several files. A file that cannot be decoded is noted, and nothing is raised."""
    decoded = Decoded([], {})
    for position, file in enumerate(files):
        try:
            image = decode_image(file)
        except DecodeError as error:
            decoded.failures[position] = error.reason
            image = torch.zeros((3, 1, 1), dtype=torch.uint8)
        decoded.images.append(image)
    return decoded


def substitutes(image: Unreadable, *, images: int, seed: int) -> Iterator[int]:
    """Candidates for the place of an unreadable image. The first of them that can be decoded takes it.

    They are drawn from 0 .. images - 1 by (seed, image.index, attempt) alone. As long as the same files can be
    decoded, an image has the same substitute in every epoch, on every rank and after every resume.

    Raises:
        UserError: all attempts are used up.
    """
    for attempt in range(_ATTEMPTS):
        yield int(random_bits(SUBSTITUTE, seed, image.index, attempt)) % images
    raise UserError(
        f"cannot decode {image.path} ({image.reason}), nor any of {_ATTEMPTS} images drawn in its "
        "place: restore the files or mend data.root"
    )


def read_substitute(image: Unreadable, files: Sequence[Path], *, seed: int) -> tuple[int, Tensor]:
    """The first of ``substitutes`` that can be decoded: its number, and its pixels, uint8 (3, height, width)."""
    drawn = substitutes(image, images=len(files), seed=seed)
    tried = ((index, decode_images([files[index]])) for index in drawn)
    return next((index, decoded.images[0]) for index, decoded in tried if not decoded.failures)


def kinds_of(images: Sequence[Unreadable]) -> str:
    """How many there are, by suffix and reason: ``3 .jpg (image file is truncated), 1 .png (...)``."""
    kinds = Counter((os.path.splitext(image.path)[1].lower(), image.reason) for image in images)
    named = [f"{count:,} {suffix} ({reason})" for (suffix, reason), count in kinds.most_common()]
    more = f" and {len(named) - _NAMED:,} more kinds" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more


def check_unreadable_rate(
    count: int, images: int, max_percent: float, examples: Sequence[Unreadable]
) -> None:
    """Refuse a dataset of which too much cannot be decoded.

    Args:
        count: number of images that cannot be decoded, each counted once.
        images: number of images in the dataset.
        max_percent: largest share of images that may have a substitute, 0..100.
        examples: some of the unreadable images; the message names the first three.

    Raises:
        UserError: ``count`` is more than that share of ``images``.
    """
    if count <= images * max_percent / 100:
        return
    named = ", ".join(f"{image.path} ({image.reason})" for image in examples[:_NAMED])
    more = ", ..." if count > min(len(examples), _NAMED) else ""
    raise UserError(
        f"{count} of {images} images ({100 * count / images:.3g} %) cannot be decoded: {named}{more}: "
        f"restore or remove them, or raise data.max_unreadable_percent ({max_percent:g})"
    )


def warn_of_unreadable(dataset: "ImageDataset", images: Sequence[Unreadable], fate: str) -> None:
    """Say that some images of a dataset cannot be read, and what becomes of them; nothing where all can."""
    if images:
        logger.warning(
            "%d of %d images of %s %s cannot be read and %s: %s; the first is %s",
            *(len(images), len(dataset), dataset.title, dataset.split, fate),
            *(kinds_of(images), images[0].path),
        )
