"""Data sets published as a few files of many images each.

CIFAR's python version is made of pickles. ``peerlearn.data.cifar_pickles`` reads them without running
anything.

Each reader takes a split and the folder that ``load_dataset`` calls root. It raises a UserError that
names the file if that is missing, cannot be downloaded or is damaged.
Images are uint8 (channels, height, width).
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peerlearn.data import cifar_pickles
from peerlearn.data.downloads import download, find_or_download
from peerlearn.data.files import Content, folder_with, read_bytes, read_lines, unreadable
from peerlearn.errors import UserError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def digits(split: str, root: Path) -> Content:
    """The digits of scikit-learn; the root does not matter."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = slice(1437) if split == "train" else slice(1437, None)
    images = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
    return Content(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(bunch.target[part]).to(torch.int64),
        tuple(map(str, bunch.target_names)),
    )


FASHION_MNIST_CLASSES = (
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


def fashion_mnist(split: str, root: Path) -> Content:
    """Fashion-MNIST from root, root/FashionMNIST/raw, Debian's package or the published mirror, in this order."""
    prefix = "train" if split == "train" else "t10k"
    images_name, labels_name = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
    folder = _fashion_mnist_folder(images_name, root)
    images = _read_idx(folder / images_name, dimensions=3)
    labels = _read_idx(folder / labels_name, dimensions=1)
    _check_count(folder / labels_name, len(labels), len(images))
    return Content(
        images.unsqueeze(1),
        _checked_labels(folder / labels_name, labels, len(FASHION_MNIST_CLASSES)),
        FASHION_MNIST_CLASSES,
    )


# Tops and trousers to train on; then a coat, a sandal and a shirt; and what is left.
_FASHION_MNIST_CLASS_SPLITS = {"train": range(4), "validation": range(4, 7), "test": range(7, 10)}


def fashion_mnist_classes(split: str, root: Path) -> Content:
    """Fashion-MNIST split by class: all 7,000 images of classes 0-3, 4-6 (validation) or 7-9 (test)."""
    parts = [fashion_mnist(part, root) for part in ("train", "test")]
    images = torch.cat([part.images for part in parts])  # type: ignore[misc]
    labels = torch.cat([part.labels for part in parts])  # type: ignore[misc]
    classes = _FASHION_MNIST_CLASS_SPLITS[split]
    chosen = (labels >= classes.start) & (labels < classes.stop)
    names = FASHION_MNIST_CLASSES[classes.start : classes.stop]
    return Content(images[chosen], labels[chosen] - classes.start, names)


def _fashion_mnist_folder(marker: str, root: Path) -> Path:
    published = "FashionMNIST/raw"
    folder = folder_with(marker, root, root / published, DEBIAN_FASHION_MNIST)
    advice = (
        "install Debian's package dataset-fashion-mnist, or point data.root to a folder with the "
        "four published .gz files"
    )
    return folder or download("fashion_mnist", root, published, _fetch_fashion_mnist, advice)


def _fetch_fashion_mnist(target: str) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    for file, md5 in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + file, target, md5=md5)


@dataclass(frozen=True, kw_only=True)
class _CifarLayout:
    """The published files of a CIFAR set: a binary version, and a python version made of pickles."""

    name: str
    binary_folder: str
    binary_archive: str
    binary_md5: str
    binary_names: str
    binary_label_bytes: int
    python_folder: str
    python_archive: str
    python_names: str
    python_names_key: str
    python_labels_key: str


_CIFAR10 = _CifarLayout(
    name="cifar10",
    binary_folder="cifar-10-batches-bin",
    binary_archive="cifar-10-binary.tar.gz",
    binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
    binary_names="batches.meta.txt",
    binary_label_bytes=1,
    python_folder="cifar-10-batches-py",
    python_archive="cifar-10-python.tar.gz",
    python_names="batches.meta",
    python_names_key="label_names",
    python_labels_key="labels",
)
_CIFAR100 = _CifarLayout(
    name="cifar100",
    binary_folder="cifar-100-binary",
    binary_archive="cifar-100-binary.tar.gz",
    binary_md5="03b5dce01913d631647c71ecec9e9cb8",
    binary_names="fine_label_names.txt",
    binary_label_bytes=2,  # The coarse label comes first.
    python_folder="cifar-100-python",
    python_archive="cifar-100-python.tar.gz",
    python_names="meta",
    python_names_key="fine_label_names",
    python_labels_key="fine_labels",
)


def cifar10(split: str, root: Path) -> Content:
    """CIFAR-10 from the binary version, or else the python version, or else a download of the binary version."""
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar(_CIFAR10, batches, root)


def cifar100(split: str, root: Path) -> Content:
    """CIFAR-100 with the fine labels, from the same places as ``cifar10``."""
    return _cifar(_CIFAR100, [split], root)


def _cifar(layout: _CifarLayout, batches: Sequence[str], root: Path) -> Content:
    binary_marker = f"{batches[0]}.bin"
    folder = folder_with(binary_marker, root, root / layout.binary_folder)
    pickles = folder_with(batches[0], root, root / layout.python_folder)
    if folder is None and pickles is not None:
        return _read_pickled_cifar(layout, batches, pickles)
    folder = find_or_download(
        layout.name,
        root,
        marker=binary_marker,
        published=layout.binary_folder,
        url=f"https://www.cs.toronto.edu/~kriz/{layout.binary_archive}",
        md5=layout.binary_md5,
        advice=f"unpack {layout.binary_archive} or {layout.python_archive} in data.root",
    )
    return _read_binary_cifar(layout, batches, folder)


def _read_binary_cifar(layout: _CifarLayout, batches: Sequence[str], folder: Path) -> Content:
    class_names = read_lines(folder / layout.binary_names)
    label_bytes = layout.binary_label_bytes
    images, labels = [], []
    for path in (folder / f"{batch}.bin" for batch in batches):
        records = _read_records(path, label_bytes + 3 * 32 * 32)
        labels.append(_checked_labels(path, records[:, label_bytes - 1], len(class_names)))
        images.append(records[:, label_bytes:])
    return Content(torch.cat(images).view(-1, 3, 32, 32), torch.cat(labels), class_names)


def _read_pickled_cifar(layout: _CifarLayout, batches: Sequence[str], folder: Path) -> Content:
    names_path = folder / layout.python_names
    class_names = cifar_pickles.read_class_names(names_path, key=layout.python_names_key)
    images, labels = [], []
    for path in (folder / batch for batch in batches):
        pixels, numbers = cifar_pickles.read_batch(path, labels_key=layout.python_labels_key)
        _check_count(path, len(numbers), len(pixels))
        labels.append(_checked_labels(path, numbers, len(class_names)))
        images.append(pixels)
    return Content(torch.cat(images).view(-1, 3, 32, 32), torch.cat(labels), class_names)


def stl10(split: str, root: Path) -> Content:
    """STL-10 from root or root/stl10_binary; if it is in neither, it is downloaded to the latter."""
    from torchvision.datasets import STL10

    parts = split.split("+")
    folder = find_or_download(
        "stl10",
        root,
        marker=f"{parts[0]}_X.bin",
        published=STL10.base_folder,
        url=STL10.url,
        md5=STL10.tgz_md5,
        advice=f"unpack {STL10.filename} in data.root",
    )
    class_names = read_lines(folder / "class_names.txt")
    images = [_read_stl10_images(folder / f"{part}_X.bin") for part in parts]
    if split == "unlabeled":
        return Content(images[0], None, class_names)
    path = folder / f"{parts[0]}_y.bin"
    labels = _read_records(path, 1).flatten()
    _check_count(path, len(labels), len(images[0]))
    # The file counts classes from 1.
    labels = _checked_labels(path, labels, len(class_names) + 1, lowest=1) - 1
    unlabelled = torch.full((sum(map(len, images[1:])),), -1)
    return Content(
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
        raise unreadable(path, error) from error
    if not length or length % size:
        raise UserError(
            f"{path} has {length} bytes, not a positive multiple of {size}: it is damaged or "
            "truncated, fetch it again"
        )
    return torch.from_file(str(path), size=length, dtype=torch.uint8).view(-1, size)


def _read_idx(path: Path, *, dimensions: int) -> Tensor:
    """A gzipped idx file of bytes: uint8 with that many dimensions."""
    try:
        content = gzip.decompress(read_bytes(path))
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


def _checked_labels(path: Path, labels: Tensor, end: int, *, lowest: int = 0) -> Tensor:
    if labels.min() < lowest or labels.max() >= end:
        raise UserError(
            f"{path} holds labels outside {lowest}..{end - 1}: it is damaged, fetch it again"
        )
    return labels.to(torch.int64)


def _check_count(path: Path, labels: int, images: int) -> None:
    if labels != images or not images:
        raise UserError(f"{path} holds {labels} labels for {images} images: fetch both files again")
