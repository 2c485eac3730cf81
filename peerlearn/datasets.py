"""Labelled and unlabelled image sets, read from the layouts in which they are published.

Nothing is ever unpickled: CIFAR is read from its binary version. Files are looked for in
``root`` first; Fashion-MNIST then in Debian's package; what is still missing is downloaded into
``root`` where that folder is writable.

Images are uint8 (channels, height, width) throughout.
"""

import difflib
import gzip
import hashlib
import logging
import math
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from peerlearn.errors import UserError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageDataset:
    """One split of an image set.

    images: uint8 (N, channels, height, width), or N image files, each decoded when it is read.
    labels: int64 (N,), indices into ``class_names``, -1 for an unlabelled image of a partly
        labelled split; None for a split without labels.
    mean, std: per channel, of images in [0, 1], as published for the training set.
    """

    name: str
    split: str
    images: Tensor | tuple[Path, ...]
    labels: Tensor | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, index: int) -> Tensor:
        """Image ``index``: uint8 (channels, height, width). Raises as ``decode_image``."""
        if isinstance(self.images, Tensor):
            return self.images[index]
        return decode_image(self.images[index])

    def fingerprint(self) -> str:
        """A SHA-256 in hex that stays the same wherever the same data lies.

        It covers order, labels and class names, and the pixels of images held in memory; of image
        files only the names below their common folder, so a file rewritten in place goes unnoticed.
        """
        digest = hashlib.sha256(repr((self.name, self.split, self.class_names)).encode())
        if isinstance(self.images, Tensor):
            digest.update(repr(tuple(self.images.shape)).encode())
            digest.update(self.images.contiguous().numpy().data)
        else:
            base = os.path.commonpath([path.parent for path in self.images])
            names = (path.relative_to(base).as_posix() for path in self.images)
            digest.update("\0".join(names).encode(errors="surrogateescape"))
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_dataset(
    name: str, split: str = "train", *, root: str | None = None, limit: int | None = None
) -> ImageDataset:
    """The split of a data set; ``limit`` keeps its first n images.

    digits         scikit-learn's 1797 digits, 8x8, one channel, grey levels 0..16 scaled to 0..255
                   and never resized here; train: the first 1437 of the file, test: the last 360
    fashion_mnist  the four published idx .gz files, in root or root/FashionMNIST/raw
    cifar10        the binary version, in root or root/cifar-10-batches-bin
    cifar100       the binary version with its fine labels, in root or root/cifar-100-binary
    stl10          the binary version, in root or root/stl10_binary; also the splits unlabeled
                   (no labels) and train+unlabeled (label -1 for the unlabelled part, which is last)
    tinyimagenet   root or root/tiny-imagenet-200: train/WNID/images/*, words.txt; test is the
                   published val/images with val_annotations.txt (the test labels are not public)
    imagenet       train/WNID/*; test is val/WNID/*
    folder         any images: see ``_folder``. The statistics are ImageNet's

    Folders are read in sorted order, whatever the file system says.
    Raises UserError for an unknown name or split, a missing root or file, a damaged file,
    a folder without images and a ``limit`` below 1.
    """
    if name not in _SOURCES:
        near = difflib.get_close_matches(name, DATASET_NAMES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown data.name {name!r}, did you mean {near!r}? Known: {', '.join(DATASET_NAMES)}"
        )
    source = _SOURCES[name]
    if split not in source.splits:
        raise UserError(f"{name} has no split {split!r}: choose from {', '.join(source.splits)}")
    if limit is not None and limit < 1:
        raise UserError(f"data.limit is {limit}: give a positive number of images, or leave it out")
    content = source.read(split, None if root is None else _existing(Path(root).expanduser()))
    dataset = ImageDataset(
        name=name,
        split=split,
        images=content.images,
        labels=content.labels,
        class_names=content.class_names,
        mean=source.mean,
        std=source.std,
    )
    return dataset if limit is None else first_images(dataset, limit)


def decode_image(path: Path) -> Tensor:
    """The image file as uint8 RGB (3, height, width).

    As in torchvision: palette, CMYK and grey images are converted to RGB, an alpha channel is
    dropped, the EXIF orientation is ignored, and of several frames the first is taken.
    16-bit grey images keep their high byte (Pillow alone would saturate them).
    Raises UserError, naming the file, for whatever cannot be decoded: a damaged file, 32-bit or
    float pixels, an image beyond Pillow's limit against decompression bombs (179 million pixels).
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(_rgb(image)).permute(2, 0, 1).contiguous()
    except Exception as error:  # Pillow's decoders raise whatever the damaged bytes lead them to.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot decode {path} ({reason}): replace or remove the file") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3), writable."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; 8 or 16 are supported")
    # A palette's transparency would be dropped all the same, but with a warning for every image.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))


def first_images(dataset: ImageDataset, limit: int) -> ImageDataset:
    """The dataset's first ``limit`` images, or all of them where there are fewer."""
    images, labels = dataset.images[:limit], dataset.labels
    return replace(
        dataset,
        # Cloned, so that the images left out do not stay in memory.
        images=images.clone() if isinstance(images, Tensor) else images,
        labels=None if labels is None else labels[:limit].clone(),
    )


class _Content(NamedTuple):
    images: Tensor | tuple[Path, ...]
    labels: Tensor | None
    class_names: tuple[str, ...]


def _digits(split: str, root: Path | None) -> _Content:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = slice(1437) if split == "train" else slice(1437, None)
    images = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
    return _Content(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(bunch.target[part]).to(torch.int64),
        tuple(map(str, bunch.target_names)),
    )


_FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def _fashion_mnist(split: str, root: Path | None) -> _Content:
    prefix = "train" if split == "train" else "t10k"
    images_name, labels_name = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
    folder = _fashion_mnist_folder(images_name, root)
    images = _read_idx(folder / images_name, dimensions=3)
    labels = _read_idx(folder / labels_name, dimensions=1)
    _check_count(folder / labels_name, len(labels), len(images))
    return _Content(
        images.unsqueeze(1),
        _checked_labels(folder / labels_name, labels, len(_FASHION_MNIST_CLASSES)),
        _FASHION_MNIST_CLASSES,
    )


def _fashion_mnist_folder(marker: str, root: Path | None) -> Path:
    published = "FashionMNIST/raw"
    places = () if root is None else (root, root / published)
    folder = _holding(marker, *places, DEBIAN_FASHION_MNIST)
    if folder is not None:
        return folder
    advice = (
        "install Debian's package dataset-fashion-mnist, or point data.root to a folder with the "
        "four published .gz files"
    )
    if root is None:
        raise UserError(f"fashion_mnist is not on this machine: {advice}")
    _download("fashion_mnist", root, published, _fetch_fashion_mnist, advice)
    return root / published


def _fetch_fashion_mnist(target: str) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    for file, md5 in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + file, target, md5=md5)


def _cifar10(split: str, root: Path | None) -> _Content:
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    folder = _cifar_folder(
        "cifar10",
        root,
        published="cifar-10-batches-bin",
        pickled="cifar-10-batches-py",
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        marker=files[0],
    )
    return _read_cifar(folder, files, names="batches.meta.txt", label_bytes=1)


def _cifar100(split: str, root: Path | None) -> _Content:
    folder = _cifar_folder(
        "cifar100",
        root,
        published="cifar-100-binary",
        pickled="cifar-100-python",
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        marker=f"{split}.bin",
    )
    # The coarse label comes first.
    return _read_cifar(folder, [f"{split}.bin"], names="fine_label_names.txt", label_bytes=2)


def _cifar_folder(
    name: str,
    root: Path | None,
    *,
    published: str,
    pickled: str,
    archive: str,
    md5: str,
    marker: str,
) -> Path:
    root = _required(name, root, published)
    folder = _holding(marker, root, root / published)
    if folder is not None:
        return folder
    advice = f"unpack the binary version, {archive}, in data.root"
    if (root / pickled).is_dir():
        advice += f" ({pickled} holds pickles, which can run code and are not read)"
    url = f"https://www.cs.toronto.edu/~kriz/{archive}"
    _download_archive(name, root, published, url, md5, advice)
    return root / published


def _read_cifar(folder: Path, files: Sequence[str], *, names: str, label_bytes: int) -> _Content:
    class_names = _read_lines(folder / names)
    images, labels = [], []
    for path in (folder / file for file in files):
        records = _read_records(path, label_bytes + 3 * 32 * 32)
        labels.append(_checked_labels(path, records[:, label_bytes - 1], len(class_names)))
        images.append(records[:, label_bytes:])
    return _Content(torch.cat(images).view(-1, 3, 32, 32), torch.cat(labels), class_names)


def _stl10(split: str, root: Path | None) -> _Content:
    from torchvision.datasets import STL10

    published = STL10.base_folder
    root = _required("stl10", root, published)
    parts = split.split("+")
    folder = _holding(f"{parts[0]}_X.bin", root, root / published)
    if folder is None:
        folder = root / published
        advice = f"unpack {STL10.filename} in data.root"
        _download_archive("stl10", root, published, STL10.url, STL10.tgz_md5, advice)
    class_names = _read_lines(folder / "class_names.txt")
    images = [_read_stl10_images(folder / f"{part}_X.bin") for part in parts]
    if split == "unlabeled":
        return _Content(images[0], None, class_names)
    path = folder / f"{parts[0]}_y.bin"
    labels = _read_records(path, 1).flatten()
    _check_count(path, len(labels), len(images[0]))
    # The file counts classes from 1.
    labels = _checked_labels(path, labels, len(class_names) + 1, lowest=1) - 1
    unlabelled = torch.full((sum(map(len, images[1:])),), -1)
    return _Content(
        images[0] if len(images) == 1 else torch.cat(images),
        torch.cat([labels, unlabelled]),
        class_names,
    )


def _read_stl10_images(path: Path) -> Tensor:
    """Each plane is stored column by column."""
    return _read_records(path, 3 * 96 * 96).view(-1, 3, 96, 96).transpose(2, 3).contiguous()


def _read_records(path: Path, size: int) -> Tensor:
    """A file of records of ``size`` bytes: uint8 (records, size), mapped and not yet read."""
    try:
        length = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if not length or length % size:
        raise UserError(
            f"{path} has {length} bytes, not a positive multiple of {size}: it is damaged or "
            "truncated, fetch it again"
        )
    return torch.from_file(str(path), size=length, dtype=torch.uint8).view(-1, size)


def _read_idx(path: Path, *, dimensions: int) -> Tensor:
    """A gzipped idx file of bytes: uint8 with that many dimensions."""
    try:
        content = gzip.decompress(_read(path))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or truncated ({error}): fetch it again") from error
    header = struct.Struct(f">{1 + dimensions}I")
    magic, *shape = header.unpack_from(content.ljust(header.size, b"\0"))
    if magic != 0x800 + dimensions or len(content) != header.size + math.prod(shape):
        raise UserError(
            f"{path} is not an idx file of bytes in {dimensions} dimensions, or it is truncated: "
            "fetch it again"
        )
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header.size)
    return pixels.view(*shape)


def _read_lines(path: Path) -> tuple[str, ...]:
    """The lines that are not blank."""
    text = _read(path).decode("utf-8", errors="replace")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path} ({error.strerror}): restore it or mend data.root")


def _checked_labels(path: Path, labels: Tensor, end: int, *, lowest: int = 0) -> Tensor:
    if labels.min() < lowest or labels.max() >= end:
        raise UserError(
            f"{path} holds labels outside {lowest}..{end - 1}: it is damaged, fetch it again"
        )
    return labels.to(torch.int64)


def _check_count(path: Path, labels: int, images: int) -> None:
    if labels != images or not images:
        raise UserError(f"{path} holds {labels} labels for {images} images: fetch both files again")


def _tinyimagenet(split: str, root: Path | None) -> _Content:
    published = "tiny-imagenet-200"
    root = _required("tinyimagenet", root, published)
    folder = _holding("words.txt", root, root / published)
    if folder is None:
        folder = root / published
        url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        md5 = "90528d7ca1a48142e341f4ef8d21d0de"
        advice = "unpack tiny-imagenet-200.zip in data.root"
        _download_archive("tinyimagenet", root, published, url, md5, advice)
    wnids = _subfolders(folder / "train")
    words = dict(line.split("\t", 1) for line in _read_lines(folder / "words.txt") if "\t" in line)
    class_names = tuple(words.get(wnid, wnid) for wnid in wnids)
    if split == "train":
        images = _image_files(folder / "train")
        return _Content(images, _folder_labels(images, folder / "train", wnids), class_names)
    annotations = folder / "val" / "val_annotations.txt"
    wnid_of = dict(line.split("\t")[:2] for line in _read_lines(annotations) if "\t" in line)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    images = _image_files(folder / "val" / "images")
    labels = [number.get(wnid_of.get(path.name, ""), -1) for path in images]
    if -1 in labels:
        raise UserError(
            f"{annotations} names no class of train/ for {images[labels.index(-1)].name}: "
            "unpack the archive again"
        )
    return _Content(images, torch.tensor(labels), class_names)


def _imagenet(split: str, root: Path | None) -> _Content:
    root = _required("imagenet", root, "train/WNID/*.JPEG and val/WNID/*.JPEG")
    folder = root / ("train" if split == "train" else "val")
    return _class_folders(_image_files(folder), folder, root)


def _folder(split: str, root: Path | None) -> _Content:
    """Any folder of images.

    Where root holds a folder train, test or val, the train split is root/train and the test split
    root/test or else root/val; otherwise root is the train split and there is no test split.
    A split is labelled if it has at least two subfolders and each of its images lies directly in
    one of them: these are the classes. Any other arrangement (images beside the folders, one folder
    alone, deeper nesting) is unlabelled. The classes of the test split are numbered as in train/.
    """
    root = _required("folder", root, "images")
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
    return _class_folders(images, folder, root) if labelled else _Content(images, None, ())


def _class_folders(images: tuple[Path, ...], folder: Path, root: Path) -> _Content:
    """Classes from the first folder below ``folder``, numbered as in root/train if that exists."""
    train = root / "train"
    class_names = _subfolders(train if train.is_dir() else folder)
    return _Content(images, _folder_labels(images, folder, class_names), class_names)


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
    # Links are followed, so that a selection of classes can be linked together: a link to a folder
    # above itself must not be walked for ever.
    resolved = os.path.realpath(folder)
    if resolved in ancestors:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(folder / entry.name, ancestors | {resolved})
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield folder / entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies directly in the folder, sorted by name; hidden entries are left out."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(entries, key=lambda entry: entry.name)


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder: mend the path, or create it first")
    return root


def _required(name: str, root: Path | None, content: str) -> Path:
    if root is None:
        raise UserError(f"{name} needs data.root: the folder that holds {content}")
    return root


def _holding(marker: str, *folders: Path) -> Path | None:
    """The first of the folders that holds the file."""
    return next((folder for folder in folders if (folder / marker).is_file()), None)


def _download_archive(
    name: str, root: Path, published: str, url: str, md5: str, advice: str
) -> None:
    """``_download`` of an archive that holds the folder. Where it already lies in root, it is kept."""

    def fetch(target: str) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, root, extract_root=os.path.dirname(target), md5=md5)

    _download(name, root, published, fetch, advice)


def _download(
    name: str, root: Path, published: str, fetch: Callable[[str], None], advice: str
) -> None:
    """Make the folder root/published by ``fetch``, which is given a path to make it at.

    Raises UserError, closing with ``advice``, if root is not writable or the files cannot be had.
    """
    if not os.access(root, os.W_OK):
        raise UserError(f"{root} lacks the files of {name} and is not writable: {advice}")
    from filelock import FileLock

    try:
        # The ranks of a run get here together: one fetches, and the folder appears complete.
        with FileLock(root / ".download.lock"), tempfile.TemporaryDirectory(dir=root) as scratch:
            if (root / published).exists():
                return
            logger.info("downloading %s to %s", name, root)
            fetch(os.path.join(scratch, published))
            (root / published).parent.mkdir(exist_ok=True)
            os.rename(os.path.join(scratch, published), root / published)
    except (
        OSError,
        RuntimeError,
        EOFError,
        HTTPException,
        tarfile.TarError,
        zipfile.BadZipFile,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{root} lacks the files of {name}, and the download failed ({reason}): {advice}"
        ) from error


class _Source(NamedTuple):
    read: Callable[[str, Path | None], _Content]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: tuple[str, ...] = ("train", "test")


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SOURCES = {
    "digits": _Source(_digits, (0.3054,), (0.3753,)),
    "fashion_mnist": _Source(_fashion_mnist, (0.2860,), (0.3530,)),
    "cifar10": _Source(_cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Source(_cifar100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": _Source(
        _stl10,
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        ("train", "test", "unlabeled", "train+unlabeled"),
    ),
    "tinyimagenet": _Source(_tinyimagenet, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": _Source(_imagenet, _IMAGENET_MEAN, _IMAGENET_STD),
    "folder": _Source(_folder, _IMAGENET_MEAN, _IMAGENET_STD),
}
DATASET_NAMES = tuple(_SOURCES)
