"""Image files: decoding them, and the data sets that are published as folders of them.

Each reader takes a split and the folder that ``load_dataset`` calls root. It raises a UserError that
names the file or folder if something is missing or belongs to no class.
Images are uint8 (3, height, width).
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from peerlearn.data.downloads import find_or_download
from peerlearn.data.files import Content, read_lines, unreadable
from peerlearn.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
# Pillow looks at the content, not at the name, and would run another program for some formats (EPS).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")


class DecodeError(UserError):
    """An image file that cannot be decoded.

    Attributes:
        reason: why, in a few words on one line.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot decode {path} ({reason}): replace or remove the file")
        self.reason = reason


def decode_image(path: Path) -> Tensor:
    """The image file as uint8 RGB (3, height, width).

    As in torchvision: palette, CMYK and grey images are converted to RGB, an alpha channel is
    dropped, the EXIF orientation is ignored, and of several frames the first is taken.
    16-bit grey images keep their high byte (Pillow alone would saturate them).
    Nothing is printed, whatever the file holds.

    Raises:
        DecodeError: the file is damaged, its pixels have 32 bits or are floats, or the image is
            beyond Pillow's limit against decompression bombs (89 million pixels; Pillow alone would
            only warn, up to twice as many).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image, _silenced(image):
                return torch.from_numpy(_rgb(image)).permute(2, 0, 1).contiguous()
    except Exception as error:  # Damaged bytes can make Pillow's decoders raise anything.
        raise DecodeError(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """The reason on one line, without the path, which Pillow repeats in some of its messages."""
    if isinstance(error, UnidentifiedImageError):
        return "no image in any known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _silenced(image: Image.Image) -> Iterator[None]:
    """Keep libtiff's messages about damaged TIFF files from stderr. It writes them without Python."""
    if image.format != "TIFF":
        yield
        return
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as uint8 (height, width, 3), writable."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 or 16 are supported")
    # The transparency of a palette is dropped in any case. Left in, it would cause a warning for every image.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))


def tinyimagenet(split: str, root: Path) -> Content:
    """TinyImageNet from root or root/tiny-imagenet-200; if it is in neither, it is downloaded to the latter."""
    folder = find_or_download(
        "tinyimagenet",
        root,
        marker="words.txt",
        published="tiny-imagenet-200",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        advice="unpack tiny-imagenet-200.zip in data.root",
    )
    wnids = _subfolders(folder / "train")
    words = dict(line.split("\t", 1) for line in read_lines(folder / "words.txt") if "\t" in line)
    class_names = tuple(words.get(wnid, wnid) for wnid in wnids)
    if split == "train":
        images = _image_files(folder / "train")
        return Content(images, _folder_labels(images, folder / "train", wnids), class_names)
    annotations = folder / "val" / "val_annotations.txt"
    wnid_of = dict(line.split("\t")[:2] for line in read_lines(annotations) if "\t" in line)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    images = _image_files(folder / "val" / "images")
    labels = [number.get(wnid_of.get(path.name, ""), -1) for path in images]
    if -1 in labels:
        raise UserError(
            f"{annotations} names no class of train/ for {images[labels.index(-1)].name}: "
            "unpack the archive again"
        )
    return Content(images, torch.tensor(labels), class_names)


def imagenet(split: str, root: Path, *, own_classes: bool = False) -> Content:
    """ImageNet from root/train/WNID and root/val/WNID. The test split is val.

    ``own_classes``: number the classes of this split alone, not as in train/.
    """
    folder = root / ("train" if split == "train" else "val")
    return _class_folders(_image_files(folder), folder, folder if own_classes else root / "train")


def any_folder(split: str, root: Path, *, own_classes: bool = False) -> Content:
    """Any folder of images.

    If root holds a folder train, test or val, the train split is root/train, and the test split is
    root/test or else root/val. Otherwise root is the train split, and there is no test split.
    A split is labelled if it has at least two subfolders and each of its images lies directly in
    one of them. The subfolders are the classes. Any other arrangement (images beside the folders,
    one folder alone, deeper nesting) is unlabelled. The test split numbers classes as train/ does,
    unless it has ``own_classes``.
    """
    parts = [root / part for part in ("train", "test", "val")]
    if split == "train":
        folder = root / "train" if any(map(Path.is_dir, parts)) else root
    else:
        held_out = next(filter(Path.is_dir, parts[1:]), None)
        if held_out is None:
            raise UserError(f"{root} holds no test split: it needs a folder named test or val")
        folder = held_out
    images = _image_files(folder)
    labelled = len(_subfolders(folder)) > 1 and all(path.parent.parent == folder for path in images)
    if not labelled:
        return Content(images, None, ())
    return _class_folders(images, folder, folder if own_classes else root / "train")


def _class_folders(images: tuple[Path, ...], folder: Path, numbering: Path) -> Content:
    """Images with the first folder below ``folder`` as their class, numbered as in ``numbering`` if that exists."""
    class_names = _subfolders(numbering if numbering.is_dir() else folder)
    return Content(images, _folder_labels(images, folder, class_names), class_names)


def _folder_labels(images: Sequence[Path], folder: Path, class_names: Sequence[str]) -> Tensor:
    number = {name: label for label, name in enumerate(class_names)}
    depth = len(folder.parts)
    labels = [number.get(path.parts[depth], -1) for path in images]
    if -1 in labels:
        raise UserError(
            f"{images[labels.index(-1)]} belongs to none of the {len(class_names)} classes of the "
            "train split: move or remove it"
        )
    return torch.tensor(labels)


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(entry.name for entry in _entries(folder) if entry.is_dir())


def _image_files(folder: Path) -> tuple[Path, ...]:
    images = tuple(_walk(folder, ancestors=frozenset()))
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"no images ({suffixes}) below {folder}: mend data.root")
    return images


def _walk(folder: Path, ancestors: frozenset[str]) -> Iterator[Path]:
    # Links are followed, so that a folder of links can select classes. A link to a folder above
    # itself must not be walked for ever.
    resolved = os.path.realpath(folder)
    if resolved in ancestors:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(folder / entry.name, ancestors | {resolved})
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield folder / entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries directly in the folder, sorted by name. Hidden entries are left out."""
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error) from error
    return sorted(entries, key=lambda entry: entry.name)
