"""Image files: decoding them, and the data sets that are published as folders of them.

Each reader takes a split and the folder that ``load_dataset`` calls root. It raises a UserError that
names the file or folder if something is missing or belongs to no class.
Images are uint8 (3, height, width).
"""

import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from peerlearn.data.beton_file import open_packed, packed_place
from peerlearn.data.downloads import find_or_download
from peerlearn.data.file_search import FoundFiles, find_images, search, subfolders
from peerlearn.data.files import Content, read_lines
from peerlearn.errors import UserError
from peerlearn.runs.text import listed

# Pillow looks at the content, not at the name, and would run another program for some formats (EPS).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


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
    What a PNG file holds beside its pixels (texts, colour profiles) is left aside where it is damaged or large.
    Nothing is printed, whatever the file holds.
    The path may be that of an image of a packed file (``peerlearn.data.beton_file``), which may be grey: (1, height,
    width).

    Raises:
        DecodeError: the file is damaged, its pixels have 32 bits or are floats, or the image is
            beyond Pillow's limit against decompression bombs (89 million pixels; Pillow alone would
            only warn, up to twice as many).
    """
    place = packed_place(path)
    if place is not None:
        return _packed_image(path, *place)
    try:
        decoded = _decoded_jpeg(path)
        return _decoded(path) if decoded is None else decoded
    except Exception as error:  # Damaged bytes can make Pillow's decoders raise anything.
        try:
            pixels_alone = _essential_png(path)
            if pixels_alone is not None:
                return _decoded(io.BytesIO(pixels_alone))
        except Exception:
            # What is wrong with the whole file tells more.
            pass
        raise DecodeError(path, _reason(error)) from error


def _packed_image(path: Path, file: Path, number: int) -> Tensor:
    packed = open_packed(file)
    if packed.unreadable[number]:
        raise DecodeError(path, "it could not be decoded when it was packed")
    return packed.read(number).permute(2, 0, 1).contiguous()


def _decoded_jpeg(path: Path) -> Tensor | None:
    """The pixels of a sound JPEG file in grey or colour, as Pillow decodes them, in less time; None for other files.

    Pillow judges the file's head. simplejpeg refuses whatever its library only warns of. Such files are left to Pillow,
    which takes some of them.
    """
    with path.open("rb") as file:
        content = file.read(len(_JPEG_SIGNATURE))
        if content != _JPEG_SIGNATURE:
            return None
        content += file.read()
    with _opened(io.BytesIO(content)) as image:
        (width, height), mode = image.size, image.mode
    if mode not in ("RGB", "L"):
        return None
    try:
        pixels = decode_jpeg(content, "RGB")
    except ValueError:
        return None
    return _channels_first(pixels) if pixels.shape == (height, width, 3) else None


def _decoded(source: Path | io.BytesIO) -> Tensor:
    with _opened(source) as image, _silenced(image):
        return _channels_first(_rgb(image))


def _channels_first(pixels: np.ndarray) -> Tensor:
    # Several times as fast as torch's own copy.
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@contextmanager
def _opened(source: Path | io.BytesIO) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source, formats=_FORMATS) as image:
            yield image


def image_extent(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file, from its first bytes; None if they do not tell it."""
    place = packed_place(path)
    if place is not None:
        packed, number = open_packed(place[0]), place[1]
        return None if packed.unreadable[number] else packed.extent(number)
    try:
        with _opened(path) as image:
            return image.size
    except Exception:  # As above.
        return None


_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_ESSENTIALS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


def _essential_png(path: Path) -> bytes | None:
    """A PNG file without all that is not needed for its pixels; None for other files."""
    content = path.read_bytes()
    if not content.startswith(_PNG_SIGNATURE):
        return None
    parts, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        end = start + size + 12
        if kind in _PNG_ESSENTIALS:
            parts.append(content[start:end])
        start = end
    return b"".join(parts)


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
    if image.mode == "I" and image.format == "PPM":
        # Of 16 bits, whatever its largest value is.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
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
    wnids = subfolders(folder / "train")
    words = dict(line.split("\t", 1) for line in read_lines(folder / "words.txt") if "\t" in line)
    class_names = tuple(words.get(wnid, wnid) for wnid in wnids)
    if split == "train":
        images = find_images(folder / "train").images
        labels = _folder_labels(images, folder / "train", wnids, split)
        return Content(images, labels, class_names)
    annotations = folder / "val" / "val_annotations.txt"
    wnid_of = dict(line.split("\t")[:2] for line in read_lines(annotations) if "\t" in line)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    images = find_images(folder / "val" / "images").images
    numbers = [number.get(wnid_of.get(path.name, ""), -1) for path in images]
    if -1 in numbers:
        raise UserError(
            f"{annotations} names no class of train/ for {images[numbers.index(-1)].name}: "
            "unpack the archive again"
        )
    return Content(images, torch.tensor(numbers), class_names)


def imagenet(split: str, root: Path, *, own_classes: bool = False) -> Content:
    """ImageNet from root/train/WNID and root/val/WNID. The test split is val.

    ``own_classes``: number the classes of this split alone, not as in train/.
    """
    folder = root / ("train" if split == "train" else "val")
    return _class_folders(find_images(folder), split, folder if own_classes else root / "train")


# The names that a split's folder may have, in any case; the first one that is there counts.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing", "val", "valid", "validation"),
}


def any_folder(split: str, root: Path, *, own_classes: bool = False) -> Content:
    """Any folder of images.

    If root holds a folder train, the train split is in it, and the test split is in root/test, or else in root/val
    (`SPLIT_FOLDERS` has the other names that are known). A test folder whose images lie in no class folders is passed
    over if a later one has them. The validation split is in root/val, whether or not that is the test split too. If
    root holds none of these folders, it is the train split itself, and there is no other.

    A split is labelled if each of its images lies in a folder of its class; there must be two classes or more. In
    root/train and its like a class may have folders within, as for torchvision; in root itself such a tree may as well
    be one of years and months, and is unlabelled. The other splits number classes by their names as train/ does, unless
    they have ``own_classes``.
    """
    part = "test" if split == "train" else split
    trained, held_out = _split_folders(root, "train"), _split_folders(root, part)
    if split == "train":
        if held_out and not trained:
            raise UserError(
                f"{root} holds a folder {held_out[0].name} and none named train: rename the folder of the "
                "training images to train"
            )
        found = find_images(trained[0] if trained else root)
        why = _why_unlabelled(found, nested=bool(trained))
        return _unlabelled(found, why) if why else _class_folders(found, split, found.folder)
    if not held_out:
        names = "test or val" if split == "test" else "val"
        raise UserError(
            f"{root} holds no {split} split: it needs a folder named {names} beside train"
        )
    by_train = bool(trained) and not own_classes
    passed_over: list[str] = []
    first: FoundFiles | None = None
    for folder in held_out:
        found = search(folder)
        why = _why_unlabelled(found, nested=True, fewest=1 if by_train else 2)
        if not why:
            content = _class_folders(found, split, trained[0] if by_train else folder)
            remarks = (f"{each}: {folder} is the {split} split instead" for each in passed_over)
            return content._replace(remarks=(*remarks, *content.remarks))
        passed_over.append(f"{folder} has no labels ({why})")
        first = first or (found if found.images else None)
    first = first or find_images(held_out[0])
    return _unlabelled(first, _why_unlabelled(first, nested=True, fewest=1 if by_train else 2))


def _split_folders(root: Path, split: str) -> list[Path]:
    """The folders that may hold a split, the first choice first."""
    # In sorted order, so that of Train and train the latter counts.
    present = {name.lower(): root / name for name in subfolders(root)}
    return [present[name] for name in SPLIT_FOLDERS[split] if name in present]


def _why_unlabelled(found: FoundFiles, *, nested: bool, fewest: int = 2) -> str:
    """Why the images have no labels, naming the first that is in the way; empty if they have.

    Args:
        found: images of a split.
        nested: whether a class may have folders within.
        fewest: smallest number of class folders.
    """
    folder, depth = found.folder, len(found.folder.parts)
    if not found.images:
        return "it holds no images"
    names = sorted({path.parts[depth] for path in found.images if len(path.parts) > depth + 1})
    beside = next((path for path in found.images if len(path.parts) == depth + 1), None)
    if beside is not None and names:
        return f"{beside} lies beside the class folders {listed(names)}, and in none of them"
    if beside is not None:
        return f"{beside} and the others lie in no class folders"
    deeper = next((path for path in found.images if len(path.parts) > depth + 2), None)
    if deeper is not None and not nested:
        return f"{deeper} lies deeper than in a class folder of {folder}"
    if len(names) < fewest:
        return f"all images of {folder} lie in one class folder, {names[0]}"
    return ""


def _unlabelled(found: FoundFiles, why: str) -> Content:
    return Content(found.images, None, (), why_unlabelled=why, remarks=found.remarks())


def _class_folders(found: FoundFiles, split: str, numbering: Path) -> Content:
    """Images with the first folder below the split's folder as their class, numbered as in ``numbering``."""
    class_names = (numbering.is_dir() and subfolders(numbering)) or subfolders(found.folder)
    labels = _folder_labels(found.images, found.folder, class_names, split)
    return Content(found.images, labels, class_names, remarks=found.remarks())


def _folder_labels(
    images: Sequence[Path], folder: Path, class_names: Sequence[str], split: str
) -> Tensor:
    number = {name: label for label, name in enumerate(class_names)}
    depth = len(folder.parts)
    labels = [number.get(path.parts[depth], -1) for path in images]
    if -1 in labels:
        stray = images[labels.index(-1)]
        where = (
            f"the class {stray.parts[depth]!r}"
            if len(stray.parts) > depth + 1
            else "beside the class folders"
        )
        advice = "move, rename or remove it"
        if max(labels) < 0:
            advice = "give both the same classes; or, if they are to have different ones, use peerlearn fewshot"
        raise UserError(
            f"{stray} ({split} split, {where}) belongs to none of the {len(class_names)} classes of the train "
            f"split ({listed(class_names)}): {advice}"
        )
    return torch.tensor(labels)
