"""People's own detection data: a folder of images and a JSON file in COCO's format."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerlearn.config import nearest
from peerlearn.data.detection_sets import (
    MOST_PIXELS,
    DetectionDataset,
    Fault,
    Kind,
    Objects,
    Report,
    box_is_whole,
    dataset_of,
    no_objects,
    refuse,
    size_of,
)
from peerlearn.data.files import read_bytes
from peerlearn.errors import UserError
from peerlearn.runs.progress import phase
from peerlearn.runs.text import listed, printable


def coco(images: Path, annotations: Path, *, report: Report = refuse) -> DetectionDataset:
    """The images that a JSON file lists, also those without objects. Crowds are difficult, and no object is truncated.

    Labels follow the order of the file's categories, whatever their ids are.

    Args:
        images: folder that the names of the images start from.
        annotations: the JSON file. Its name is the split's.
        report: what is done with a fault.

    Raises:
        UserError: the file is not in COCO's format, or `report` refuses a fault.
    """
    return _Reader(images, annotations, report).read()


def listed_images(annotations: Path) -> list[str]:
    """The names of the images that a JSON file in COCO's format lists.

    Raises:
        UserError: the file is not in COCO's format.
    """
    names = (_field(entry, "file_name") for entry in _lists(annotations)["images"])
    return [name for name in names if isinstance(name, str) and name]


def _lists(path: Path) -> dict[str, list[Any]]:
    """The lists of images, annotations and categories."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no JSON ({reason}): restore it or write it again") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict):
        raise UserError(f"{path} is no object with {', '.join(keys)}: it needs COCO's format")
    for key in keys:
        if not isinstance(content.get(key), list):
            near = nearest(key, content) if key not in content else ""
            raise UserError(f"{path} has no list {key!r}{near}: it needs {', '.join(keys)}")
    return {key: content[key] for key in keys}


class _Reader:
    """What the parts of a file refer to each other by."""

    def __init__(self, folder: Path, path: Path, report: Report) -> None:
        self._folder, self._path, self._report = folder, path, report

    def read(self) -> DetectionDataset:
        lists = _lists(self._path)
        class_names, number = self._categories(lists["categories"])
        images = self._images(lists["images"])
        if not lists["images"]:
            self._fault(Kind.EMPTY_SPLIT, "lists no images: add them to 'images'")
        with phase(f"reading {self._path.stem}", len(images)) as advance:
            annotated = {}
            for key, (file, size) in images.items():
                advance(1)
                if os.path.isfile(file):
                    annotated[key] = (file, size or size_of(file, self._report), no_objects(size))
                else:
                    line = f"{file} is missing, and {self._path} lists it: restore it or give the folder of the images"
                    self._report(Fault(Kind.MISSING_IMAGE, (file,), line))
        of_image = {
            key: (annotated[key][1], annotated[key][2])
            if key in annotated
            else (size or (0, 0), no_objects(size))
            for key, (_, size) in images.items()
        }
        self._annotations(lists["annotations"], of_image, number)
        return dataset_of(
            "coco", self._path.stem, class_names, list(annotated.values()), self._path.stem
        )

    def _fault(self, kind: Kind, text: str) -> None:
        self._report(Fault(kind, (self._path,), f"{self._path}: {text}"))

    def _categories(self, entries: list[Any]) -> tuple[list[str], dict[Any, int]]:
        """The names of the classes, and the label of each category's id."""
        names: list[str] = []
        number: dict[Any, int] = {}
        for place, entry in enumerate(entries):
            key, name = _id(entry, "id"), _field(entry, "name")
            if key is None or not isinstance(name, str) or not name:
                self._fault(
                    Kind.MALFORMED,
                    f"the category at place {place} has no 'id' or no 'name': add them",
                )
            elif key in number or name in names:
                twice = f"id {key!r}" if key in number else f"name {printable(name)!r}"
                self._fault(Kind.LISTED_TWICE, f"two categories have the {twice}: rename one")
            else:
                number[key] = len(names)
                names.append(name)
        return names, number

    def _images(self, entries: list[Any]) -> dict[Any, tuple[Path, tuple[int, int] | None]]:
        """The file of each image's id, and its size if it is given."""
        images: dict[Any, tuple[Path, tuple[int, int] | None]] = {}
        files: set[Path] = set()
        for place, entry in enumerate(entries):
            key, name = _id(entry, "id"), _field(entry, "file_name")
            if key is None or not isinstance(name, str) or not name or "\0" in name:
                self._fault(
                    Kind.MALFORMED,
                    f"the image at place {place} has no 'id' or no 'file_name': add them",
                )
                continue
            file = self._folder / name
            if key in images or file in files:
                twice = f"the id {key!r}" if key in images else f"the file {printable(name)}"
                self._fault(Kind.LISTED_TWICE, f"two images have {twice}: remove one")
                continue
            images[key] = (file, _size(entry))
            files.add(file)
        return images

    def _annotations(
        self,
        entries: list[Any],
        of_image: Mapping[Any, tuple[tuple[int, int], Objects]],
        number: Mapping[Any, int],
    ) -> None:
        """Add the objects to those of their images; objects with a fault are left out."""
        seen: set[Any] = set()
        for place, entry in enumerate(entries):
            own = _id(entry, "id")
            where = f"the annotation at place {place}" if own is None else f"annotation {own!r}"
            if own is not None and own in seen:
                self._fault(Kind.LISTED_TWICE, f"two annotations have the id {own!r}: remove one")
                continue
            seen.add(own)
            image, category = _id(entry, "image_id"), _id(entry, "category_id")
            bbox, crowd = _box(_field(entry, "bbox")), _field(entry, "iscrowd") or 0
            if image is None or category is None or bbox is None or crowd not in (0, 1):
                needs = (
                    "'image_id', 'category_id', 'bbox' [x, y, width, height] and 'iscrowd' 0 or 1"
                )
                self._fault(Kind.MALFORMED, f"{where} needs {needs}: mend or remove it")
                continue
            if image not in of_image:
                self._fault(
                    Kind.MALFORMED,
                    f"{where} is of image {image!r}, which is not listed: remove it",
                )
                continue
            size, objects = of_image[image]
            x, y, width, height = bbox
            corners = (x, y, x + width, y + height)
            shown = ", ".join(f"{value:g}" for value in bbox)
            files = (self._path,)
            whole = box_is_whole(
                corners, size, f"{self._path}: {where}, bbox [{shown}],", files, self._report
            )
            if category not in number:
                ids = listed([repr(each) for each in number])
                self._fault(
                    Kind.UNKNOWN_CLASS, f"{where} has category {category!r}, none of {ids}: mend it"
                )
            elif whole:
                objects.add(corners, number[category], difficult=bool(crowd))


def _field(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _id(entry: Any, key: str) -> int | str | None:
    value = _field(entry, key)
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height; None where a program wrote none, or 0."""
    sides: list[Any] = [entry.get("width"), entry.get("height")]
    if not all(map(_is_number, sides)) or min(sides) < 1:
        return None
    return round(sides[0]), round(sides[1])


def _box(value: Any) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        return None
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    """Whether it is a number of pixels; JSON as Python reads it may hold NaN and infinity."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < MOST_PIXELS
