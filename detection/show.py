"""`peerlearn detect show`: a detector's detections in one's own images, as lines and as sheets of pictures."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.compute.device_names import require_device
from peerlearn.config import ArgumentParser
from peerlearn.data.file_search import search
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.evaluation.plots import check_picture
from peerlearn.runs.export_folders import LAST_DETECTOR, detector_in
from peerlearn.runs.files import write_text
from peerlearn.runs.text import listed, printable

if TYPE_CHECKING:
    from torch import Tensor

    from detection.inference import Detections
    from detection.saved import Description
    from peerlearn.compute.dist import Ranks
    from peerlearn.data.detection_sets import DetectionDataset


def main(argv: Sequence[str]) -> int:
    """`peerlearn detect show IMAGE|FOLDER ... --checkpoint DETECTOR`.

    Returns:
        The exit code.

    Raises:
        UserError: a wrong word, an image or a detector that cannot be read, or a file that cannot be written.
    """
    arguments = _parse(argv)
    images = _images(arguments.images)
    # Imported here: a wrong word should not wait for torch.
    from peerlearn.compute.dist import joined_ranks

    with joined_ranks(arguments.device) as ranks:
        _show(arguments, images, ranks)
    return DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn detect show",
        description="Print and draw what a detector finds in your own images, which need no annotations: a line for "
        "each image, and sheets of 16 images each (FILE.png, FILE-2.png, ...). "
        "Example: peerlearn detect show photos --checkpoint runs/a/results/detect-00000600-0-0123456789ab",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE|FOLDER",
        help="image files, and folders whose images are taken, those of folders in them too",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DETECTOR",
        help="a detector's folder, or the folder of the training that holds it as detector/",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("detections.png"),
        metavar="FILE",
        help="picture to write, .png, .svg or .pdf (default: detections.png)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the detections of each image to FILE: class, score, and corners in pixels from 0",
    )
    parser.add_argument(
        "--score",
        type=float,
        default=0.5,
        help="lowest score of a detection that is shown (default: 0.5)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="device to compute on: auto (a GPU where there is one), cpu, cuda, ... (default: auto)",
    )
    if "--dry_run" in argv:
        # `submit` adds it to what it is given.
        raise UsageError("detect show is done here and now: leave out --dry_run, and submit")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.score <= 1:
        raise UsageError(f"--score must be within 0..1, got {arguments.score:g}")
    check_picture(arguments.output)
    try:
        require_device(arguments.device)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    return arguments


def _images(words: Sequence[Path]) -> list[Path]:
    """The image files that are named, and those below the folders that are named."""
    found: list[Path] = []
    for word in words:
        if os.path.isdir(word):
            below = search(word).images
            if not below:
                raise UserError(f"{word} holds no images: give image files, or folders of them")
            found += below
        elif os.path.isfile(word):
            found.append(word)
        else:
            raise UserError(f"{word} is not there: give image files, or folders of them")
    return list(dict.fromkeys(found))


def _show(arguments: argparse.Namespace, images: Sequence[Path], ranks: "Ranks") -> None:
    from detection.inference import detect
    from detection.pictures import MOST_IMAGES
    from detection.saved import load_detector
    from peerlearn.compute.precision import Precision
    from peerlearn.data.detection_sets import dataset_of, no_objects, refuse, size_of

    sheets = _sheets(arguments.output, images, MOST_IMAGES)
    _check_free([*sheets, *([arguments.json] if arguments.json else [])], images)
    detector, about = load_detector(_detector_folder(arguments.checkpoint))
    objects = [(path, size_of(path, refuse), no_objects()) for path in images]
    dataset = dataset_of("own", "images", about.class_names, objects, "own images")
    found = detect(
        detector.to(ranks.device),
        dataset,
        about.model,
        channels=about.image_channels,
        precision=Precision("fp32", ranks.device),
        workers=0,
        ranks=ranks,
    )
    if not ranks.main:
        return
    found = [
        {key: values[each["scores"] >= arguments.score] for key, values in each.items()}
        for each in found
    ]
    for path, each in zip(images, found, strict=True):
        print(f"{printable(str(path))}: {_told(each, about.class_names)}")
    try:
        _write(arguments, sheets, dataset, found, about)
    except OSError as error:
        raise UserError(
            f"{error.filename or arguments.output} cannot be written ({error.strerror}): choose another file by "
            "--output or --json"
        ) from error


def _sheets(output: Path, images: Sequence[Path], of_each: int) -> dict[Path, range]:
    """The files of the sheets, and the numbers of the images in each."""
    starts = range(0, len(images), of_each)
    return {
        output if not sheet else output.with_name(f"{output.stem}-{sheet + 1}{output.suffix}"): (
            range(start, min(start + of_each, len(images)))
        )
        for sheet, start in enumerate(starts)
    }


def _check_free(files: Sequence[Path], images: Sequence[Path]) -> None:
    """Make sure that nothing is written in the place of an image or of a folder."""
    taken = {os.path.realpath(image) for image in images}
    for file in files:
        if os.path.realpath(file) in taken:
            raise UserError(
                f"{file} is one of the images: choose another file by --output or --json"
            )
        if os.path.isdir(file):
            raise UserError(f"{file} is a folder: name a file by --output or --json")


def _detector_folder(checkpoint: Path) -> Path:
    folder = detector_in(checkpoint)
    if folder is None:
        raise UserError(
            f"{checkpoint} holds no detector: give the folder {LAST_DETECTOR} that a training by `peerlearn detect` "
            "has left"
        )
    return folder


def _told(detection: "Mapping[str, Tensor]", class_names: Sequence[str]) -> str:
    """``2 detections: dog 0.98, person 0.71``."""
    each = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(
            detection["labels"].tolist(), detection["scores"].tolist(), strict=True
        )
    ]
    if not each:
        return "no detections"
    return f"{len(each)} detection{'s' if len(each) > 1 else ''}: {listed(each)}"


def _write(
    arguments: argparse.Namespace,
    sheets: Mapping[Path, range],
    dataset: "DetectionDataset",
    found: "Detections",
    about: "Description",
) -> None:
    """Write the sheets, each as a whole, and the list of detections.

    Raises:
        OSError: a file cannot be written.
    """
    from detection.pictures import draw_sheet

    title = f"{about.model.detector} on {about.architecture}, trained on {about.dataset}"
    for file, numbers in sheets.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(
            file,
            [dataset.read(number) for number in numbers],
            [found[number] for number in numbers],
            about.class_names,
            title=title,
            names=[dataset.images[number].name for number in numbers],
            least_score=arguments.score,
        )
        print(f"drawn: {printable(str(file))}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(_listed(dataset, found), indent=1) + "\n")


def _listed(dataset: "DetectionDataset", found: "Detections") -> dict[str, Any]:
    """The detections by image file."""
    return {
        str(path): [
            {"class": dataset.class_names[label], "score": score, "box": box}
            for label, score, box in zip(
                *(each[key].tolist() for key in ("labels", "scores", "boxes")), strict=True
            )
        ]
        for path, each in zip(dataset.images, found, strict=True)
    }
