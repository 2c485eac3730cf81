"""`peerlearn data verify`: all that is wrong with detection data or a folder of images, and a summary."""

import argparse
import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peerlearn.errors import DONE, FAILURE, UsageError, UserError
from peerlearn.runs.progress import progress
from peerlearn.runs.text import printable

if TYPE_CHECKING:
    from peerlearn.data.detection_sets import DetectionDataset, Fault, Report
    from peerlearn.data.duplicates import Look

_SHOWN = 20


def add_verify(actions: "argparse._SubParsersAction[Any]") -> None:
    """Add the action to those of `peerlearn data`."""
    about = "report all that is wrong with detection data or a folder of images"
    verify = actions.add_parser(
        "verify",
        help=about,
        usage="peerlearn data verify FOLDER|JSON [--images DIR] [--classes NAME ...] [--against FOLDER|JSON ...] "
        "[--verbose] [--json]",
        description=f"{about[0].upper()}{about[1:]}:\nmissing images and annotations, images that cannot be decoded, "
        "malformed annotations,\nsizes unlike the file's, empty boxes and boxes outside the image, unknown classes, "
        "images\nlisted twice, and duplicates within and across splits, exact and near. Nothing is changed.",
        epilog="examples:\n"
        "  peerlearn data verify data/VOCdevkit\n"
        "  peerlearn data verify train.json --images photos --against test.json\n"
        "  peerlearn data verify my_photos --against data/VOCdevkit/VOC2007\n\n"
        "exit code: 0 if nothing is wrong, else 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument(
        "source",
        type=Path,
        metavar="FOLDER|JSON",
        help="VOC devkit, JSON file in COCO's format, or folder of images",
    )
    verify.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the names in a JSON file start from (default: looked for beside the file)",
    )
    verify.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="class names of a devkit (default: the 20 of Pascal VOC)",
    )
    verify.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER|JSON",
        help="other data that should share no image with it, such as test images",
    )
    verify.add_argument(
        "--verbose",
        action="store_true",
        help=f"print all lines of each kind, not the first {_SHOWN} alone",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify)


class _Split(NamedTuple):
    """Image files, and what is annotated on them; None where nothing is."""

    name: str
    images: tuple[Path, ...]
    annotated: "DetectionDataset | None" = None


def _verify(arguments: argparse.Namespace) -> int:
    faults: dict[str, Fault] = {}

    def report(fault: "Fault") -> None:
        # Lists share images, and so their faults.
        faults.setdefault(fault.line, fault)

    with _said(not arguments.json):
        splits, remarks = _read(arguments, report)
        looks = _look(splits, report)
        remarks += _check_duplicates(splits, looks, arguments.against, report)
    ordered = _by_kind(faults.values())
    if arguments.json:
        print(json.dumps(_as_json(splits, ordered, remarks), indent=2))
    else:
        _print(splits, ordered, remarks, None if arguments.verbose else _SHOWN)
    return FAILURE if faults else DONE


@contextlib.contextmanager
def _said(told: bool) -> Iterator[None]:
    """Tell how far it is, or print nothing."""
    if told:
        yield
        return
    with progress(0, "images", name="verifying", quiet=True):
        yield


# Reading


def _read(arguments: argparse.Namespace, report: "Report") -> tuple[list[_Split], list[str]]:
    """The splits of the data, and remarks on what was passed over."""
    # Imported here: --help should not wait for torch.
    from peerlearn.data.coco import coco
    from peerlearn.data.detection_sets import Fault, Kind
    from peerlearn.data.voc import VOC_CLASSES, all_of_devkit, year_folders

    source: Path = arguments.source
    is_file = os.path.isfile(source)
    devkit = not is_file and year_folders(source)
    if not is_file and not os.path.isdir(source):
        raise UserError(f"{source} is not there: give a folder or a JSON file")
    if arguments.images and not is_file:
        raise UsageError(f"--images belongs to a JSON file, and {source} is a folder")
    if arguments.classes and not devkit:
        raise UsageError(f"--classes belongs to a devkit of Pascal VOC, and {source} is none")
    if is_file:
        try:
            annotated = [coco(arguments.images or _images_of(source), source, report=report)]
        except UserError as error:
            report(Fault(Kind.MALFORMED, (source,), str(error)))
            annotated = []
    elif devkit:
        classes = arguments.classes or VOC_CLASSES
        annotated = all_of_devkit(source, class_names=classes, report=report)
    else:
        return _folders(source)
    return [_Split(each.split, each.images, each) for each in annotated], []


def _images_of(annotations: Path) -> Path:
    """The folder of a JSON file's images: the first usual place where one of them lies."""
    from peerlearn.data.coco import listed_images

    base = annotations.parent
    # instances_train2017.json belongs to the folder train2017.
    split = annotations.stem.rsplit("_", 1)[-1]
    above = base.parent
    usual = [base, base / "images", base / split, above, above / "images", above / split]
    usual += [base / "images" / split, above / "images" / split]
    names = listed_images(annotations)
    return next(
        (folder for folder in usual for name in names[:_SHOWN] if os.path.isfile(folder / name)),
        base,
    )


def _folders(root: Path) -> tuple[list[_Split], list[str]]:
    """The images below a folder, split by its folders train, val and test if it has them."""
    from peerlearn.data.file_search import search
    from peerlearn.data.image_folders import SPLIT_FOLDERS

    found = search(root)
    if not found.images:
        raise UserError(f"{root} holds no images: give a folder of images or a JSON file")
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    splits: dict[str, list[Path]] = {}
    for path in found.images:
        first = path.relative_to(root).parts[0]
        splits.setdefault(first if first.lower() in known else "images", []).append(path)
    remarks = [*found.remarks(), f"{root} holds no annotations that are read, only images"]
    return [_Split(name, tuple(images)) for name, images in splits.items()], remarks


# Checks


def _look(splits: Sequence[_Split], report: "Report") -> "dict[Path, Look]":
    """Decode every image once, and compare its size with the annotated one."""
    from peerlearn.data.detection_sets import Fault, Kind
    from peerlearn.data.duplicates import Look, look_at_all

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
    splits: Sequence[_Split],
    looks: "dict[Path, Look]",
    against: Sequence[Path],
    report: "Report",
) -> list[str]:
    """Report duplicates within the splits, across them and with other data; return remarks on the latter."""
    from peerlearn.data.detection_sets import Fault, Kind
    from peerlearn.data.duplicates import Look, duplicates, look_at_all

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
    from peerlearn.data.coco import listed_images
    from peerlearn.data.file_search import search

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


# Printing


def _by_kind(faults: "Sequence[Fault] | Any") -> "dict[str, list[Fault]]":
    from peerlearn.data.detection_sets import Kind

    found: dict[str, list[Fault]] = {kind.value: [] for kind in Kind}
    for fault in faults:
        found[fault.kind.value].append(fault)
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def _counts(split: _Split) -> dict[str, Any]:
    """What is in a split."""
    data = split.annotated
    if data is None:
        return {"images": len(split.images)}
    labels = Counter(label for of_image in data.labels for label in of_image.tolist())
    return {
        "images": len(data),
        "objects": labels.total(),
        "difficult": sum(int(each.sum()) for each in data.difficult),
        "truncated": sum(int(each.sum()) for each in data.truncated),
        "without objects": sum(not len(each) for each in data.labels),
        "classes": {name: labels[label] for label, name in enumerate(data.class_names)},
    }


def _as_json(
    splits: Sequence[_Split], faults: "dict[str, list[Fault]]", remarks: Sequence[str]
) -> dict[str, Any]:
    return {
        "clean": not faults,
        "splits": {split.name: _counts(split) for split in splits},
        "faults": {
            kind: [
                {"files": [str(file) for file in each.files], "line": each.line} for each in of_kind
            ]
            for kind, of_kind in faults.items()
        },
        "remarks": list(remarks),
    }


def _print(
    splits: Sequence[_Split],
    faults: "dict[str, list[Fault]]",
    remarks: Sequence[str],
    shown: int | None,
) -> None:
    for kind, of_kind in faults.items():
        print(f"{kind}: {len(of_kind):,}")
        for fault in of_kind[:shown]:
            print(f"  {printable(fault.line)}")
        if shown is not None and len(of_kind) > shown:
            print(f"  and {len(of_kind) - shown:,} more (--verbose prints them)")
        print()
    counts = {printable(split.name): _counts(split) for split in splits}
    classes = {name: each.pop("classes") for name, each in counts.items() if "classes" in each}
    _print_table("", counts)
    names = list(dict.fromkeys(name for each in classes.values() for name in each))
    if names:
        print()
        by_class = {
            printable(name): {split: each[name] for split, each in classes.items()}
            for name in names[:shown]
        }
        _print_table("objects", by_class)
    if shown is not None and len(names) > shown:
        print(f"and {len(names) - shown:,} more classes (--verbose prints them)")
    for remark in remarks:
        print(printable(remark))
    total = sum(map(len, faults.values()))
    found = f"{total:,} fault{'s' if total > 1 else ''}" if total else "nothing wrong was found"
    print(f"\n{found}")


def _print_table(corner: str, rows: dict[str, dict[str, Any]]) -> None:
    """Rows of numbers by their names, with the names of the columns above."""
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    first = max(map(len, (corner, *rows)))
    widths = {name: max(len(name), 9) for name in columns}
    print(corner.ljust(first), *(name.rjust(widths[name]) for name in columns), sep="  ")
    for name, row in rows.items():
        cells = (f"{row.get(each, 0):,}".rjust(widths[each]) for each in columns)
        print(name.ljust(first), *cells, sep="  ")
