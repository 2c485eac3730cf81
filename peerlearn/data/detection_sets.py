"""Images with boxes: what a reader of detection data returns, and how it tells what is wrong with the data.

Dimensions: N images, n objects of an image.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.data.datasets import hash_files
from peerlearn.data.image_folders import DecodeError, decode_image, image_extent
from peerlearn.errors import UserError

# No side of an image and no corner of a box is as large; a float32 holds all that are smaller.
MOST_PIXELS = 2.0**31
# COCO rounds its boxes to hundredths of a pixel, and people's programs to halves.
_ROUNDED_PIXELS = 0.5
# So far out lies a box whose corners were counted from 0 in place of 1.
_SLIGHT_PIXELS = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionDataset:
    """One split of a detection data set.

    Attributes:
        name: name of the data set.
        split: name of the split.
        class_names: names of the classes.
        images: N image files, each decoded when it is read.
        sizes: width and height of each image, int64 (N, 2).
        boxes: corners x1, y1, x2, y2 of each image's objects in pixels from 0, float32 (n, 4).
        labels: class of each object as an index into ``class_names``, int64 (n,).
        difficult: whether an object counts neither as found nor as missed, bool (n,).
        truncated: whether an object goes beyond its box, bool (n,).
        title: name of the data set for people.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    images: tuple[Path, ...]
    sizes: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    difficult: tuple[Tensor, ...]
    truncated: tuple[Tensor, ...]
    title: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, index: int) -> Tensor:
        """Image number ``index``: uint8 (3, height, width).

        Raises:
            DecodeError: the image file cannot be decoded.
        """
        return decode_image(self.images[index])

    def fingerprint(self) -> str:
        """A SHA-256 in hex of images and objects, the same wherever the data lies; files count as in ImageDataset."""
        digest = hashlib.sha256(repr((self.name, self.split, self.class_names)).encode())
        hash_files(digest, self.images)
        digest.update(self.sizes.numpy().astype("<i8").tobytes())
        digest.update(repr([len(labels) for labels in self.labels]).encode())
        for kind, of_images in (
            ("<f4", self.boxes),
            ("<i8", self.labels),
            ("?", self.difficult),
            ("?", self.truncated),
        ):
            digest.update(torch.cat(of_images).numpy().astype(kind).tobytes())
        return digest.hexdigest()


class Kind(StrEnum):
    """What can be wrong with detection data; the values are headings."""

    EMPTY_SPLIT = "lists without images"
    LISTED_TWICE = "listed twice"
    TWO_SPLITS = "images in two splits"
    MISSING_IMAGE = "missing images"
    UNDECODABLE = "images that cannot be decoded"
    MISSING_ANNOTATION = "missing annotations"
    MALFORMED = "malformed annotations"
    SIZE = "sizes unlike the file's"
    UNKNOWN_CLASS = "unknown classes"
    EMPTY_BOX = "empty boxes"
    OUTSIDE = "boxes outside the image"
    SAME = "same image twice in a split"
    SAME_ACROSS = "same image in two splits"
    NEAR = "near duplicates in a split"
    NEAR_ACROSS = "near duplicates in two splits"


class Fault(NamedTuple):
    """Something that is wrong with detection data.

    Attributes:
        kind: what is wrong.
        files: files that it is about.
        line: what is wrong where, and how to mend it.
        slight: whether a network can be trained with it all the same.
    """

    kind: Kind
    files: tuple[Path, ...]
    line: str
    slight: bool = False


# What a reader does with a fault. If it returns, the reader leaves out what is wrong and goes on.
Report = Callable[[Fault], None]


def refuse(fault: Fault) -> None:
    """Stop at a fault, unless it is slight.

    Raises:
        UserError: it is not.
    """
    if not fault.slight:
        raise UserError(fault.line)


class Objects(NamedTuple):
    """The objects of an image as lists, and its size as the annotation has it; None if it has none."""

    size: tuple[int, int] | None
    boxes: list[tuple[float, ...]]
    labels: list[int]
    difficult: list[bool]
    truncated: list[bool]

    def add(
        self, box: tuple[float, ...], label: int, *, difficult: bool, truncated: bool = False
    ) -> None:
        self.boxes.append(box)
        self.labels.append(label)
        self.difficult.append(difficult)
        self.truncated.append(truncated)


def no_objects(size: tuple[int, int] | None = None) -> Objects:
    return Objects(size, [], [], [], [])


def size_of(path: Path, report: Report) -> tuple[int, int]:
    """Width and height of an image file; 0, 0 after a report if it cannot be decoded."""
    extent = image_extent(path)
    if extent is None:
        try:
            height, width = decode_image(path).shape[1:]
        except DecodeError as error:
            report(Fault(Kind.UNDECODABLE, (path,), str(error)))
            return 0, 0
        return width, height
    return extent


def box_is_whole(
    box: Sequence[float], size: tuple[int, int], where: str, files: tuple[Path, ...], report: Report
) -> bool:
    """Whether a box can be used. One without area, or not within the image, is reported.

    Args:
        box: corners x1, y1, x2, y2, from 0.
        size: width and height of the image; 0 = unknown.
        where: file, object and the box as the file has it.
        files: files that a fault is about.
        report: what is done with a fault.
    """
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        report(
            Fault(Kind.EMPTY_BOX, files, f"{where} is empty: mend its corners or remove the object")
        )
        return False
    width, height = size
    beyond = max(-x1, -y1, x2 - width, y2 - height)
    if not (width and height) or beyond <= _ROUNDED_PIXELS:
        return True
    slight = beyond <= _SLIGHT_PIXELS
    line = f"{where} lies outside the image, which is {width}x{height}: mend its corners"
    report(Fault(Kind.OUTSIDE, files, line, slight))
    return slight


def dataset_of(
    name: str,
    split: str,
    class_names: Sequence[str],
    annotated: Sequence[tuple[Path, tuple[int, int], Objects]],
    title: str,
) -> DetectionDataset:
    """A data set of image files, their sizes and their objects."""
    objects = [of_image for _, _, of_image in annotated]
    return DetectionDataset(
        name=name,
        split=split,
        class_names=tuple(class_names),
        images=tuple(path for path, _, _ in annotated),
        sizes=torch.tensor([size for _, size, _ in annotated]).reshape(-1, 2),
        boxes=tuple(
            torch.tensor(each.boxes, dtype=torch.float32).reshape(-1, 4) for each in objects
        ),
        labels=tuple(torch.tensor(each.labels, dtype=torch.int64) for each in objects),
        difficult=tuple(torch.tensor(each.difficult, dtype=torch.bool) for each in objects),
        truncated=tuple(torch.tensor(each.truncated, dtype=torch.bool) for each in objects),
        title=title,
    )
