"""Image files that cannot be decoded: what takes their place in training, and when they are too many."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.counter_random import SUBSTITUTE, random_bits
from peerlearn.data.image_folders import DecodeError, decode_image
from peerlearn.errors import UserError

# With half of a dataset unreadable, one search in 2**100 fails.
_ATTEMPTS = 100
_NAMED = 3


class Unreadable(NamedTuple):
    """An image file that cannot be decoded: its number in the dataset, its path and, in one line, why."""

    index: int  # type: ignore[assignment]  # not tuple.index
    path: str
    reason: str


class Decoded(NamedTuple):
    """Several image files, decoded.

    images: uint8 (3, height, width) each; a black pixel for one that cannot be decoded.
    failures: why not, by the position among ``images``.
    """

    images: list[Tensor]
    failures: dict[int, str]


def decode_images(files: Sequence[Path]) -> Decoded:
    """As ``decode_image``, but what cannot be decoded is noted instead of raised."""
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
    """The numbers of the images that may take its place; the first of them that can be decoded does.

    They are drawn from 0 .. images - 1 by (seed, image.index, attempt) alone: as long as the same files can be
    decoded, an image has the same substitute in every epoch, on every rank and after every resume.
    Raises UserError once all attempts are used up.
    """
    for attempt in range(_ATTEMPTS):
        yield int(random_bits(SUBSTITUTE, seed, image.index, attempt)) % images
    raise UserError(
        f"cannot decode {image.path} ({image.reason}), nor any of {_ATTEMPTS} images drawn in its "
        "place: restore the files or mend data.root"
    )


def read_substitute(image: Unreadable, files: Sequence[Path], *, seed: int) -> tuple[int, Tensor]:
    """The first of ``substitutes`` that can be decoded: its number, and uint8 (3, height, width)."""
    drawn = substitutes(image, images=len(files), seed=seed)
    decoded = ((index, decode_images([files[index]])) for index in drawn)
    return next((index, found.images[0]) for index, found in decoded if not found.failures)


def check_unreadable_rate(
    count: int, images: int, max_percent: float, examples: Sequence[Unreadable]
) -> None:
    """Refuse a dataset of which too much cannot be decoded.

    Args:
        count: how many of its images cannot, each counted once.
        images: how many it has.
        max_percent: the largest share that may be substituted, 0..100.
        examples: some of those images; the message names the first three.

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
