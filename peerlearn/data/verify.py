"""What is wrong with detection data or a folder of images: its annotations, its files, and duplicates of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peerlearn.data.coco import coco, listed_images
from peerlearn.data.detection_sets import DetectionDataset, Fault, Kind, Report
from peerlearn.data.duplicates import Look, duplicates, look_at_all
from peerlearn.data.file_search import search
from peerlearn.data.image_folders import SPLIT_FOLDERS
from peerlearn.data.voc import VOC_CLASSES, all_of_devkit, year_folders
from peerlearn.errors import UsageError, UserError

# So many names of a JSON file are looked for in each of the usual folders.
_TRIED = 20


class Split(NamedTuple):
    """Image files, and what is annotated on them; None where nothing is."""

    name: str
    images: tuple[Path, ...]
    annotated: DetectionDataset | None = None


class Findings(NamedTuple):
    """What was found.

    Attributes:
        splits: splits of the data.
        faults: faults by their kinds, in the order of these; a kind without faults is left out.
        remarks: lines on what was passed over.
    """

    splits: list[Split]
    faults: dict[Kind, list[Fault]]
    remarks: list[str]


def verify(
    source: Path,
    *,
    images: Path | None = None,
    classes: Sequence[str] | None = None,
    against: Sequence[Path] = (),
) -> Findings:
    """Look at all of the data, and go on where something is wrong. Nothing is changed.

    Args:
        source: VOC devkit, JSON file in COCO's format, or folder of images.
        images: folder that the names in a JSON file start from; None = looked for beside the file.
        classes: class names of a devkit; None = the 20 of Pascal VOC.
        against: other data that should share no image with it.

    Raises:
        UserError: there is no such data.
        UsageError: `images` or `classes` do not go with the source.
    """
    found: dict[str, Fault] = {}

    def report(fault: Fault) -> None:
        # Lists share images, and so their faults.
        found.setdefault(fault.line, fault)

    splits, remarks = _read(source, images, classes, report)
    looks = _look(splits, report)
    remarks += _check_duplicates(splits, looks, against, report)
    by_kind = {kind: [fault for fault in found.values() if fault.kind is kind] for kind in Kind}
    return Findings(splits, {kind: faults for kind, faults in by_kind.items() if faults}, remarks)


def _read(
    source: Path, images: Path | None, classes: Sequence[str] | None, report: Report
) -> tuple[list[Split], list[str]]:
    """The splits of the data, and remarks on what was passed over."""
    is_file = os.path.isfile(source)
    devkit = not is_file and year_folders(source)
    if not is_file and not os.path.isdir(source):
        raise UserError(f"{source} is not there: give a folder or a JSON file")
    if images and not is_file:
        raise UsageError(f"--images belongs to a JSON file, and {source} is a folder")
    if classes and not devkit:
        raise UsageError(f"--classes belongs to a devkit of Pascal VOC, and {source} is none")
    if is_file:
        try:
            annotated = [coco(images or _images_of(source), source, report=report)]
        except UserError as error:
            report(Fault(Kind.MALFORMED, (source,), str(error)))
            annotated = []
    elif devkit:
        annotated = all_of_devkit(source, class_names=classes or VOC_CLASSES, report=report)
    else:
        return _folders(source)
    return [Split(each.split, each.images, each) for each in annotated], []


def _images_of(annotations: Path) -> Path:
    """The folder of a JSON file's images: the first usual place where one of them lies."""

    base = annotations.parent
    # instances_train2017.json belongs to the folder train2017.
    split = annotations.stem.rsplit("_", 1)[-1]
    above = base.parent
    usual = [base, base / "images", base / split, above, above / "images", above / split]
    usual += [base / "images" / split, above / "images" / split]
    names = listed_images(annotations)
    return next(
        (folder for folder in usual for name in names[:_TRIED] if os.path.isfile(folder / name)),
        base,
    )


def _folders(root: Path) -> tuple[list[Split], list[str]]:
    """The images below a folder, split by its folders train, val and test if it has them."""

    found = search(root)
    if not found.images:
        raise UserError(f"{root} holds no images: give a folder of images or a JSON file")
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    splits: dict[str, list[Path]] = {}
    for path in found.images:
        first = path.relative_to(root).parts[0]
        splits.setdefault(first if first.lower() in known else "images", []).append(path)
    remarks = [*found.remarks(), f"{root} holds no annotations that are read, only images"]
    return [Split(name, tuple(images)) for name, images in splits.items()], remarks


def _look(splits: Sequence[Split], report: Report) -> dict[Path, Look]:
    """Decode every image once, and compare its size with the annotated one."""

    paths = list(dict.fromkeys(path for split in splits for path in split.images))
    looks: dict[Path, Look] = {}
    for path, found in zip(paths, look_at_all(paths, "decoding"), strict=True):
        if isinstance(found, Look):
            looks[path] = found
        else:
            report(Fault(Kind.UNDECODABLE, (path,), found))
    for split in splits:
        if split.annotated is None:
            continue
        for path, (width, height) in zip(split.images, split.annotated.sizes.tolist(), strict=True):
            own = looks.get(path)
            if own is None or (own.width, own.height) == (width, height):
                continue
            turned = " (turned by its EXIF orientation?)" if own.width == height else ""
            line = (
                f"{path} is {own.width}x{own.height} pixels, and its annotation says {width}x{height}{turned}: "
                "mend the size and check the boxes"
            )
            report(Fault(Kind.SIZE, (path,), line))
    return looks


def _check_duplicates(
    splits: Sequence[Split],
    looks: dict[Path, Look],
    against: Sequence[Path],
    report: Report,
) -> list[str]:
    """Report duplicates within the splits, across them and with other data; return remarks on the latter."""

    known: list[tuple[Look, str]] = []
    remarks = []
    for source in against:
        found = look_at_all(_images_in(source), f"decoding {source.name}")
        decoded = [each for each in found if isinstance(each, Look)]
        known += [(each, str(source)) for each in decoded]
        if len(decoded) < len(found):
            missing = len(found) - len(decoded)
            remarks.append(f"{source}: {missing:,} images cannot be decoded and are not compared")
    # An image of several lists counts for the smallest: that of train, not of trainval.
    split_of: dict[Path, str] = {}
    for split in sorted(splits, key=lambda split: -len(split.images)):
        split_of.update(dict.fromkeys(split.images, split.name))
    images = [*known, *((each, split_of[path]) for path, each in looks.items())]
    pairs = duplicates(
        [each for each, _ in images], [split for _, split in images], known=len(known)
    )
    for first, second, exact in pairs:
        (one, of_one), (other, of_other) = images[first], images[second]
        relation = "has the same bytes as" if exact else "looks like"
        within = of_one == of_other
        if within:
            kind = Kind.SAME if exact else Kind.NEAR
            line = f"{other.path} {relation} {one.path}: remove one of them"
        else:
            kind = Kind.SAME_ACROSS if exact else Kind.NEAR_ACROSS
            line = f"{other.path} ({of_other}) {relation} {one.path} ({of_one}): remove one of them"
        report(Fault(kind, (other.path, one.path), line))
    return remarks


def _images_in(source: Path) -> list[Path]:
    """The images of other data that are there."""

    if not os.path.exists(source):
        raise UserError(f"--against {source} is not there: give a folder or a JSON file")
    if os.path.isdir(source):
        found = list(search(source).images)
        if not found:
            raise UserError(f"--against {source} holds no images: give another folder")
        return found
    folder = _images_of(source)
    paths = [folder / name for name in listed_images(source)]
    found = [path for path in dict.fromkeys(paths) if os.path.isfile(path)]
    if not found:
        raise UserError(
            f"--against {source}: none of its images lies in {folder}: give the folder of its images"
        )
    return found
