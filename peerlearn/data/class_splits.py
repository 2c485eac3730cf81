"""Splits of different classes, as few-shot learning has them: what they may not share.

Dimensions: N images.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from torch import Tensor

from peerlearn.data.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256
from peerlearn.runs.progress import phase


def check_disjoint(splits: Sequence[ImageDataset]) -> None:
    """Refuse splits that share a class, by its name, or an image: the pixels of one in memory, the bytes of a file.

    Files that cannot be read are passed over. They are reported when they are decoded.

    Raises:
        UserError: two splits share one. The message names the class, or both images.
    """
    for one, other in combinations(splits, 2):
        shared = sorted(set(one.class_names) & set(other.class_names))
        if shared:
            more = f", and {len(shared) - 1:,} more are" if len(shared) > 1 else " is"
            raise UserError(
                f"{one.title}: the class {shared[0]!r}{more} in the {one.split} split and in the {other.split} "
                "split, which must be of different classes: leave it in one of them"
            )
    with phase("comparing", sum(map(len, splits))) as advance:
        _check_images(splits, advance)


def _check_images(splits: Sequence[ImageDataset], advance: Callable[[int], None]) -> None:
    sizes = [_file_sizes(split) for split in splits]
    seen: dict[bytes, tuple[int, int]] = {}
    for which, split in enumerate(splits):
        # A file of a size that no other split has is none of theirs, and need not be read.
        others = {size for other in range(len(splits)) if other != which for size in sizes[other]}
        for index, digest in _hashes(split, sizes[which], others):
            advance(1)
            if digest is None:
                continue
            first = seen.setdefault(digest, (which, index))
            if first[0] != which:
                raise UserError(
                    f"{split.title}: {_image_name(splits[first[0]], first[1])} is the same image as "
                    f"{_image_name(split, index)}, and the splits must share none: remove one of the two"
                )


def _hashes(
    split: ImageDataset, sizes: Sequence[int], others: set[int]
) -> Iterator[tuple[int, bytes | None]]:
    """The SHA-256 of every image by its number; None for a file that is surely in no other split."""
    if isinstance(split.images, Tensor):
        shape = repr(tuple(split.images.shape[1:])).encode()
        for index, image in enumerate(split.images.contiguous().numpy()):
            yield index, hashlib.sha256(shape + image.tobytes()).digest()
        return
    for index, (path, size) in enumerate(zip(split.images, sizes, strict=True)):
        yield index, _sha256_of(path) if size in others else None


def _file_sizes(split: ImageDataset) -> list[int]:
    """The sizes of the image files in bytes; -1 for one that is missing, and nothing for images in memory."""
    return [] if isinstance(split.images, Tensor) else [_size(path) for path in split.images]


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _sha256_of(path: Path) -> bytes | None:
    try:
        return bytes.fromhex(file_sha256(path))
    except OSError:
        return None


def _image_name(split: ImageDataset, index: int) -> str:
    if isinstance(split.images, Tensor):
        return f"image {index} of the {split.split} split"
    return f"{split.images[index]} ({split.split} split)"
