"""Pascal VOC devkits as published: images, and an XML file for each.

Corners in the files count pixels from 1 and include the last one. As Detectron2 reads them, 1 is taken from xmin and
ymin alone, so that a box's width is the number of its pixels.
"""

import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

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
from peerlearn.data.files import read_lines
from peerlearn.errors import UserError
from peerlearn.runs.progress import phase
from peerlearn.runs.text import listed, printable

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_YEARS = ("2007", "2012")
_PARTS = ("trainval", "train", "val", "test")
# The lists that a split joins, as (year, list). The test lists of 2012 were never annotated in public.
VOC_SPLITS = {
    **{f"{part}07+12": tuple((year, part) for year in _YEARS) for part in _PARTS[:3]},
    **{f"{part}{year}": ((year, part),) for year in _YEARS for part in _PARTS},
}
# Lists that share images by design.
_SHARED = ({"trainval", "train"}, {"trainval", "val"})
# Published are .jpg alone.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def voc(
    split: str,
    root: Path,
    *,
    class_names: Sequence[str] = VOC_CLASSES,
    report: Report = refuse,
) -> DetectionDataset:
    """One split of a devkit, images without objects included.

    Args:
        split: a key of `VOC_SPLITS`, such as trainval07+12.
        root: the folder VOCdevkit, the folder above it, or that of one year.
        class_names: names of the classes, in the order of their labels.
        report: what is done with a fault.

    Raises:
        UserError: the split or its folder is not there, or `report` refuses a fault.
    """
    if split not in VOC_SPLITS:
        raise UserError(
            f"unknown split {split!r} of Pascal VOC: choose one of {', '.join(VOC_SPLITS)}"
        )
    folders = [(_year_folder(root, year), part) for year, part in VOC_SPLITS[split]]
    return _read(split, folders, class_names, report, {})


def all_of_devkit(
    root: Path, *, class_names: Sequence[str], report: Report
) -> list[DetectionDataset]:
    """Every list of every year that a devkit has. An image in two that should share none is a fault.

    Args:
        root: as for `voc`.
        class_names: names of the classes, in the order of their labels.
        report: what is done with a fault.
    """
    read: dict[Path, Objects] = {}
    datasets = []
    for year, folder in year_folders(root).items():
        parts = [part for part in _PARTS if os.path.isfile(_list(folder, part))]
        if not parts:
            report(_no_list(folder, "trainval"))
        for one, other in combinations(parts, 2):
            if {one, other} not in _SHARED:
                _check_apart(folder, one, other, report)
        datasets += [
            _read(f"{part}{year}", [(folder, part)], class_names, report, read) for part in parts
        ]
    return datasets


def year_folders(root: Path) -> dict[str, Path]:
    """The folders of a devkit by year; "" is the year of a folder that is called otherwise."""
    own = os.path.basename(os.path.abspath(root))
    found = {
        year: folder
        for year in _YEARS
        for folder in (root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}")
        if os.path.isdir(folder)
    }
    if not found and any(os.path.isdir(root / part) for part in ("Annotations", "ImageSets")):
        year = own.removeprefix("VOC")
        found[year if year in _YEARS else ""] = root
    return found


def _year_folder(root: Path, year: str) -> Path:
    found = year_folders(root)
    folder = found.get(year, found.get(""))
    if folder is None:
        there = f", only {listed([path.name for path in found.values()])}" if found else ""
        raise UserError(
            f"{root} holds no VOC{year}{there}: give VOCdevkit as data.root, with VOC{year}/JPEGImages, "
            f"VOC{year}/Annotations and VOC{year}/ImageSets/Main"
        )
    return folder


def _list(folder: Path, part: str) -> Path:
    return folder / "ImageSets" / "Main" / f"{part}.txt"


def _no_list(folder: Path, part: str) -> Fault:
    path = _list(folder, part)
    return Fault(
        Kind.EMPTY_SPLIT, (path,), f"{path} is missing: unpack the devkit again or write the list"
    )


def _check_apart(folder: Path, one: str, other: str, report: Report) -> None:
    of_one, of_other = _list(folder, one), _list(folder, other)
    for name in sorted(set(read_lines(of_one)) & set(read_lines(of_other))):
        line = f"{name} is in {of_one} and in {of_other}: remove it from one of them"
        report(Fault(Kind.TWO_SPLITS, (of_one, of_other), line))


def _read(
    split: str,
    folders: Sequence[tuple[Path, str]],
    class_names: Sequence[str],
    report: Report,
    read: dict[Path, Objects],
) -> DetectionDataset:
    """The images of some lists. ``read`` holds the objects of the files that were read before, and takes the rest."""
    names = [
        (folder, name) for folder, part in folders for name in _names(_list(folder, part), report)
    ]
    number = {name: label for label, name in enumerate(class_names)}
    annotated = []
    with phase(f"reading {split}", len(names)) as advance:
        for folder, name in names:
            advance(1)
            image, path = _image(folder, name), folder / "Annotations" / f"{name}.xml"
            if path not in read:
                read[path] = _objects(path, image, number, report)
            if not os.path.isfile(image):
                line = f"{image} is missing: restore it, or remove {name} from the lists"
                report(Fault(Kind.MISSING_IMAGE, (image,), line))
                continue
            objects = read[path]
            annotated.append((image, objects.size or size_of(image, report), objects))
    return dataset_of("voc", split, class_names, annotated, "Pascal VOC")


def _names(path: Path, report: Report) -> list[str]:
    """The names in a list, each once."""
    if not os.path.isfile(path):
        report(_no_list(path.parent.parent.parent, path.stem))
        return []
    lines = read_lines(path)
    if not lines:
        report(
            Fault(Kind.EMPTY_SPLIT, (path,), f"{path} lists no images: add their names to the list")
        )
    seen: set[str] = set()
    for name in lines:
        if name in seen:
            line = f"{path} lists {name} twice: remove one of the lines"
            report(Fault(Kind.LISTED_TWICE, (path,), line))
        seen.add(name)
    return list(dict.fromkeys(lines))


def _image(folder: Path, name: str) -> Path:
    paths = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in _SUFFIXES]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


class _MalformedError(Exception):
    """An annotation that cannot be read; the message is the reason."""


class _NoDoctype(ET.TreeBuilder):
    """A document type can define entities that grow without end or read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _MalformedError("it has a DOCTYPE, which is not read")


def _objects(path: Path, image: Path, number: Mapping[str, int], report: Report) -> Objects:
    """The objects of an annotation; those with a fault are left out."""
    if not os.path.isfile(path):
        line = f"{path} is missing: restore it, or remove {path.stem} from the lists"
        report(Fault(Kind.MISSING_ANNOTATION, (path,), line))
        return no_objects()
    malformed = f"{path} cannot be read ({{}}): mend or restore it"
    try:
        root = _xml(path)
        size = _size(root) or (size_of(image, report) if os.path.isfile(image) else (0, 0))
    except _MalformedError as error:
        report(Fault(Kind.MALFORMED, (path,), malformed.format(error)))
        return no_objects()
    except OSError as error:
        report(Fault(Kind.MALFORMED, (path,), malformed.format(error.strerror)))
        return no_objects()
    objects = no_objects(size)
    for place, element in enumerate(root.findall("object"), 1):
        try:
            _add(objects, element, path, place, number, report)
        except _MalformedError as error:
            report(Fault(Kind.MALFORMED, (path,), malformed.format(f"object {place}: {error}")))
    return objects


def _xml(path: Path) -> ET.Element:
    try:
        root = ET.fromstring(path.read_bytes(), ET.XMLParser(target=_NoDoctype()))
    except (ET.ParseError, ValueError, LookupError) as error:
        raise _MalformedError(" ".join(str(error).split())) from error
    if root.tag != "annotation":
        raise _MalformedError(f"it begins with <{printable(root.tag, 40)}>, not <annotation>")
    return root


def _size(root: ET.Element) -> tuple[int, int] | None:
    """Width and height; None where a program wrote none, or 0."""
    if root.find("size") is None:
        return None
    width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
    if min(width, height) < 1:
        return None
    return round(width), round(height)


def _add(
    objects: Objects,
    element: ET.Element,
    path: Path,
    place: int,
    number: Mapping[str, int],
    report: Report,
) -> None:
    """Add an object of the file ``path``, the ``place``-th there."""
    # Of the direct children alone: the parts of a person have names and boxes too.
    name = _text(element, "name")
    xmin, ymin, xmax, ymax = (
        _number(element, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")
    )
    flags = {flag: _flag(element, flag) for flag in ("difficult", "truncated")}
    box = (xmin - 1, ymin - 1, xmax, ymax)
    where = f"{path}: object {place}, {name!r}, xmin {xmin:g} ymin {ymin:g} xmax {xmax:g} ymax {ymax:g},"
    whole = box_is_whole(box, objects.size or (0, 0), where, (path,), report)
    if name not in number:
        classes = f"none of the {len(number)} classes{nearest(name, number)}"
        line = f"{path}: object {place}: {name!r} is {classes}: rename it or remove the object"
        report(Fault(Kind.UNKNOWN_CLASS, (path,), line))
    elif whole:
        objects.add(box, number[name], **flags)


def _text(element: ET.Element, tag: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise _MalformedError(f"<{element.tag}> has no <{tag.replace('/', '><')}>")
    return text


def _number(element: ET.Element, tag: str) -> float:
    text = _text(element, tag)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < MOST_PIXELS:
        raise _MalformedError(
            f"{printable(text, 40)!r} in <{tag.replace('/', '><')}> is no number of pixels"
        )
    return number


def _flag(element: ET.Element, tag: str) -> bool:
    """A flag of an object; one that is not there is 0."""
    text = (element.findtext(tag) or "").strip()
    if text not in ("", "0", "1"):
        raise _MalformedError(f"{printable(text, 40)!r} in <{tag}> is neither 0 nor 1")
    return text == "1"
