"""A small devkit of Pascal VOC, drawn on this machine: items of Fashion-MNIST on canvases (`peerlearn.data.canvases`).

    CACHE/mini_voc/<hash of the recipe>/VOC2007/{JPEGImages,Annotations,ImageSets/Main}   and SHA256SUMS beside it

Images are PNG files without compression: JPEG's bytes and zlib's depend on the versions of libraries, and the data
would have another fingerprint on another machine.
"""

import hashlib
import json
import logging
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from peerlearn.counter_random import MINI_VOC, permutation
from peerlearn.data.canvases import MOST_ITEMS, Canvas, Levels, draw_canvas
from peerlearn.data.datasets import load_dataset
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.data.downloads import cache_folder
from peerlearn.data.packed_datasets import FASHION_MNIST_CLASSES
from peerlearn.data.voc import voc
from peerlearn.errors import UserError
from peerlearn.runs.files import file_sha256
from peerlearn.runs.progress import phase

NAME = "mini_voc"
# Canvases and the devkit's list of each split.
CANVASES = {"train": 1500, "validation": 300, "test": 500}
_LISTS = {"train": "train", "validation": "val", "test": "test"}
# To be raised with every change of what is drawn: folders of another recipe are left alone.
_RECIPE = 1
# The last training items are those of the validation split.
_TRAINING_ITEMS = 50_000
# Of the pixels and the labels as published.
_ITEMS_SHA256 = {
    "train": "1f243a60b4b748a44c48b9a6f6907be2a08bee3e4e226f0e86fbde8e147b745a",
    "test": "9a494dc49efeb996f4076c469b31cd058152067b1594ba6ab85dd739fce3775e",
}
_SUMS = "SHA256SUMS"
# How long another process may take that writes the same devkit.
_LOCK_SECONDS = 600.0

_Labels = NDArray[np.int64]

logger = logging.getLogger(__name__)


def mini_voc(
    split: str, root: str | None, *, seed: int, images: Mapping[str, int] | None = None
) -> DetectionDataset:
    """One split of the small devkit, which is written when it is first asked for.

    Canvases of the train split hold the first 50,000 training items of Fashion-MNIST, those of the validation split
    the other 10,000, and those of the test split its test items. While there are enough, no item is on two canvases.

    Args:
        split: train, validation or test.
        root: folder that holds Fashion-MNIST; None = the usual places.
        seed: seed of the canvases.
        images: number of canvases by split, where it is another than in `CANVASES`; more of them begin with the same.

    Raises:
        UserError: there is no such split, Fashion-MNIST is not to be had or not the published one, or the cache folder
            cannot be written.
    """
    if split not in CANVASES:
        raise UserError(f"{NAME} has no split {split!r}: choose from {', '.join(CANVASES)}")
    counts = {**CANVASES, **(images or {})}
    devkit = _devkit(root, seed, counts)
    dataset = voc(f"{_LISTS[split]}2007", devkit, class_names=FASHION_MNIST_CLASSES)
    return replace(dataset, name=NAME, split=split, title=NAME)


def _devkit(root: str | None, seed: int, counts: Mapping[str, int]) -> Path:
    """The folder of the devkit, whole."""
    from filelock import FileLock

    recipe = json.dumps([_RECIPE, seed, counts], sort_keys=True)
    folder = cache_folder() / NAME / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if _is_whole(folder):
        return folder
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=_LOCK_SECONDS):
            if _is_whole(folder):
                return folder
            if folder.exists():
                logger.warning("%s is damaged or was changed: it is written again", folder)
            # What a process left that was killed; none other writes here, under the lock.
            shutil.rmtree(temporary, ignore_errors=True)
            # Not what a link in its place leads to.
            temporary.mkdir()
            try:
                _write(temporary, root, seed, counts)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(
            f"{folder} cannot be written ({reason}): make room there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether all files are there as they were written, and no others."""
    try:
        lines = (folder / _SUMS).read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {_SUMS}
        return present == expected.keys() and all(
            file_sha256(folder / name) == digest for name, digest in expected.items()
        )
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _write(folder: Path, root: str | None, seed: int, counts: Mapping[str, int]) -> None:
    """Write the devkit file by file; the checksums come last."""
    sums: list[str] = []

    def put(name: str, content: bytes) -> None:
        path = folder / "VOC2007" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {path.relative_to(folder).as_posix()}")

    lists: dict[str, list[str]] = {}
    items = _items(root)
    with phase(f"drawing {NAME}", sum(counts.values())) as advance:
        for part, split in enumerate(CANVASES):
            levels, labels = items[split]
            order = permutation(len(levels), MINI_VOC, seed, part).numpy()
            names = [f"{_LISTS[split]}_{number:06}" for number in range(counts[split])]
            for number, name in enumerate(names):
                dealt = order[(np.arange(MOST_ITEMS) + MOST_ITEMS * number) % len(order)]
                canvas = draw_canvas(levels[dealt], seed, part, number)
                put(f"JPEGImages/{name}.png", _png(canvas.pixels))
                put(f"Annotations/{name}.xml", _xml(name, canvas, labels[dealt]))
                advance(1)
            lists[_LISTS[split]] = names
    lists["trainval"] = lists["train"] + lists["val"]
    for name, names in lists.items():
        put(f"ImageSets/Main/{name}.txt", "".join(f"{each}\n" for each in names).encode())
    (folder / _SUMS).write_text("".join(f"{line}\n" for line in sums))


def _items(root: str | None) -> dict[str, tuple[Levels, _Labels]]:
    """Images, (N, 28, 28), and labels of the items of each split."""
    read: dict[str, tuple[Levels, _Labels]] = {}
    for part, expected in _ITEMS_SHA256.items():
        dataset = load_dataset("fashion_mnist", part, root=root)
        assert isinstance(dataset.images, Tensor)
        assert dataset.labels is not None
        levels, labels = dataset.images[:, 0].numpy(), dataset.labels.numpy().astype("<i8")
        digest = hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest()
        if digest != expected:
            raise UserError(
                f"{NAME} is drawn from Fashion-MNIST as published, and {root or 'the one on this machine'} differs: "
                "restore its files, or point data.root to others"
            )
        read[part] = levels, labels
    first, rest = slice(_TRAINING_ITEMS), slice(_TRAINING_ITEMS, None)
    levels, labels = read["train"]
    return {
        "train": (levels[first], labels[first]),
        "validation": (levels[rest], labels[rest]),
        "test": read["test"],
    }


def _png(pixels: Levels) -> bytes:
    """A grey PNG file, its pixels as they are."""
    height, width = pixels.shape
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    blocks = [rows[start : start + 65535] for start in range(0, len(rows), 65535)]
    stored = b"".join(
        struct.pack("<BHH", number == len(blocks) - 1, len(block), 65535 - len(block)) + block
        for number, block in enumerate(blocks)
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _xml(name: str, canvas: Canvas, labels: _Labels) -> bytes:
    """An annotation as published: corners count from 1, and the last one belongs to the box."""
    height, width = canvas.pixels.shape
    lines = [
        "<annotation>",
        "\t<folder>VOC2007</folder>",
        f"\t<filename>{name}.png</filename>",
        f"\t<source><database>{NAME}</database></source>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>1</depth></size>",
        "\t<segmented>0</segmented>",
    ]
    for item, (x1, y1, x2, y2), truncated, difficult in canvas.placed:
        lines += [
            "\t<object>",
            f"\t\t<name>{FASHION_MNIST_CLASSES[labels[item]]}</name>",
            "\t\t<pose>Unspecified</pose>",
            f"\t\t<truncated>{truncated:d}</truncated>",
            f"\t\t<difficult>{difficult:d}</difficult>",
            f"\t\t<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""]).encode()
