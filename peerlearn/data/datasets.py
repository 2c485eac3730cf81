"""Labelled and unlabelled image sets, read from the layouts in which they are published.

Images are uint8 (channels, height, width) throughout.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from peerlearn.config import nearest
from peerlearn.data import characters, few_shot_sets, image_folders, packed_datasets
from peerlearn.data.downloads import cache_folder
from peerlearn.data.files import Content
from peerlearn.data.image_folders import decode_image
from peerlearn.data.titles import FOLDER, dataset_title
from peerlearn.errors import UserError


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageDataset:
    """One split of an image set.

    Attributes:
        name: name of the data set in configs.
        split: name of the split.
        images: uint8 (N, channels, height, width), or N image files, each decoded when it is read.
        labels: classes of the images, int64 (N,), as indices into ``class_names``; -1 for an
            unlabelled image of a partly labelled split; None for a split without labels.
        class_names: names of the classes.
        mean: mean per channel of images in [0, 1], as published for the training set.
        std: standard deviation per channel, likewise.
        title: name of the data set for people, see ``peerlearn.data.titles``; "" = its name.
        why_unlabelled: why a split of a folder has no labels, with the first file that is in the way; "" if it has.
        remarks: lines for the user about the folder: what was skipped there, and which folders were passed over.
        sources: names and SHA-256 of the files that the images are drawn from; () if they are stored as images.
    """

    name: str
    split: str
    images: Tensor | tuple[Path, ...]
    labels: Tensor | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    title: str = ""
    why_unlabelled: str = ""
    remarks: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_files(self) -> bool:
        """Whether the images are files, which may turn out unreadable."""
        return not isinstance(self.images, Tensor)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def read(self, index: int) -> Tensor:
        """Image number ``index``: uint8 (channels, height, width).

        Raises:
            DecodeError: the image file cannot be decoded.
        """
        if isinstance(self.images, Tensor):
            return self.images[index]
        return decode_image(self.images[index])

    def fingerprint(self) -> str:
        """A SHA-256 in hex that is the same wherever the same data lies.

        It covers order, labels, class names and sources. Of images in memory it covers the pixels. Of image
        files it covers their sizes and their names below the common folder, and if all files
        together have at most 256 MiB, their bytes too.
        """
        digest = hashlib.sha256(repr((self.name, self.split, self.class_names)).encode())
        if isinstance(self.images, Tensor):
            digest.update(repr(tuple(self.images.shape)).encode())
            digest.update(self.images.contiguous().numpy().data)
        else:
            hash_files(digest, self.images)
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        if self.sources:
            digest.update(repr(self.sources).encode())
        return digest.hexdigest()


# Up to this many bytes of image files are read for the fingerprint. Larger sets count by names and sizes.
_HASHED_BYTES = 2**28


def hash_files(digest: "hashlib._Hash", files: Sequence[Path]) -> None:
    """Add image files to a hash: their names below the common folder, their sizes, and the bytes of a small set."""
    base = os.path.commonpath([path.parent for path in files])
    names = (path.relative_to(base).as_posix() for path in files)
    digest.update("\0".join(names).encode(errors="surrogateescape"))
    sizes = [_size(path) for path in files]
    digest.update(repr(sizes).encode())
    if sum(sizes) <= _HASHED_BYTES:
        for path in files:
            digest.update(_content(path))


def _size(path: Path) -> int:
    """The size in bytes; 0 for a missing file, which is reported when it is decoded."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def load_dataset(
    name: str,
    split: str = "train",
    *,
    root: str | None = None,
    limit: int | None = None,
    own_classes: bool = False,
) -> ImageDataset:
    """One split of a data set, from the layout in which it is published.

    ``own_classes`` numbers the classes of a split of imagenet or folder by its own folders, as few-shot splits need
    it, and not as those of the train split. Data sets that are split by class always are numbered so.

    digits         scikit-learn's 1797 digits, 8x8, one channel, grey levels 0..16 scaled to 0..255
                   and never resized here; train: the first 1437 of the file, test: the last 360
    fashion_mnist  the four published idx .gz files, in root or root/FashionMNIST/raw
    fashion_mnist_classes  the same images split by class: 0-3 train, 4-6 validation, 7-9 test
    cifar10        the binary version in root or root/cifar-10-batches-bin, or else the python
                   version in root or root/cifar-10-batches-py, of which nothing is ever run
    cifar100       the same with its fine labels, in root, root/cifar-100-binary or
                   root/cifar-100-python
    stl10          the binary version, in root or root/stl10_binary; also the splits unlabeled
                   (no labels) and train+unlabeled (label -1 for the unlabelled part, which is last)
    tinyimagenet   root or root/tiny-imagenet-200: train/WNID/images/*, words.txt; test is the
                   published val/images with val_annotations.txt (the test labels are not public)
    imagenet       train/WNID/*; test is val/WNID/*
    miniimagenet, tieredimagenet, cifar_fs, omniglot  split by class into train, validation and test: see
                   ``peerlearn.data.few_shot_sets``
    characters     characters in four styles, drawn in the fonts below root: see
                   ``peerlearn.data.characters``; split by class: 28 characters train, 12 validation, 12 test
    folder         any images: see ``peerlearn.data.image_folders.any_folder``; ImageNet's statistics

    imagenet and folder need a root, and characters takes /usr/share/fonts without one. The others are
    looked for in ``peerlearn.data.downloads.cache_folder()`` without one. Fashion-MNIST is next looked
    for in Debian's package. A data set that is still missing is downloaded into the root, except
    imagenet, folder, characters and the four few-shot sets above. Folders are read in sorted order,
    whatever the file system says.

    Args:
        name: name of the data set, from the list above.
        split: name of the split.
        root: folder that holds the data; None = the usual places.
        limit: number of images to keep, the first ones; None = all.

    Raises:
        UserError: the name or the split is unknown, the root or a file is missing or damaged, the
            download failed, a folder holds no images, or ``limit`` is below 1.
    """
    if name not in _SOURCES:
        raise UserError(
            f"unknown data.name {name!r}{nearest(name, DATASET_NAMES)}; known: {', '.join(DATASET_NAMES)}"
        )
    source = _SOURCES[name]
    if split not in source.splits:
        raise UserError(f"{name} has no split {split!r}: choose from {', '.join(source.splits)}")
    if limit is not None and limit < 1:
        raise UserError(f"data.limit is {limit}: give a positive number of images, or leave it out")
    if root is None and source.root_holds is not None:
        raise UserError(f"{name} needs data.root: the folder that holds {source.root_holds}")
    read = (own_classes and source.read_own_classes) or source.read
    content = read(split, source.usual_root() if root is None else _existing(root))
    dataset = ImageDataset(
        name=name,
        split=split,
        images=content.images,
        labels=content.labels,
        class_names=content.class_names,
        mean=source.mean,
        std=source.std,
        title=dataset_title(name, root),
        why_unlabelled=content.why_unlabelled,
        remarks=content.remarks,
        sources=content.sources,
    )
    return dataset if limit is None else first_images(dataset, limit)


def has_split(name: str, split: str) -> bool:
    """Whether a data set of this name may have the split."""
    return split in _SOURCES[name].splits


def first_images(dataset: ImageDataset, limit: int) -> ImageDataset:
    """The first ``limit`` images of the dataset, or all if it has fewer."""
    images, labels = dataset.images[:limit], dataset.labels
    return replace(
        dataset,
        # Cloned, so that the images left out do not stay in memory.
        images=images.clone() if isinstance(images, Tensor) else images,
        labels=None if labels is None else labels[:limit].clone(),
    )


def select_images(
    dataset: ImageDataset, index: Tensor, *, split: str | None = None
) -> ImageDataset:
    """The images with these numbers, int64 (n,), in this order, as a split of this name; None = the dataset's."""
    images, labels = dataset.images, dataset.labels
    return replace(
        dataset,
        split=split or dataset.split,
        images=images[index]
        if isinstance(images, Tensor)
        else tuple(images[i] for i in index.tolist()),
        labels=None if labels is None else labels[index],
    )


def _existing(root: str) -> Path:
    folder = Path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        raise UserError(f"data.root {folder} is not a folder: mend the path, or create it first")
    return folder


class _Source(NamedTuple):
    read: Callable[[str, Path], Content]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: tuple[str, ...] = ("train", "test")
    # Set where the user must say where the data lies.
    root_holds: str | None = None
    # Set where a split may have other classes than the train split.
    read_own_classes: Callable[[str, Path], Content] | None = None
    # Where the data is looked for if the user names no root.
    usual_root: Callable[[], Path] = cache_folder


# Of data sets whose splits are of different classes.
CLASS_SPLITS = ("train", "validation", "test")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

_SOURCES = {
    "digits": _Source(packed_datasets.digits, (0.3054,), (0.3753,)),
    "fashion_mnist": _Source(packed_datasets.fashion_mnist, (0.2860,), (0.3530,)),
    "fashion_mnist_classes": _Source(
        packed_datasets.fashion_mnist_classes, (0.2860,), (0.3530,), CLASS_SPLITS
    ),
    "cifar10": _Source(packed_datasets.cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Source(packed_datasets.cifar100, _CIFAR100_MEAN, _CIFAR100_STD),
    "stl10": _Source(
        packed_datasets.stl10,
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        ("train", "test", "unlabeled", "train+unlabeled"),
    ),
    "tinyimagenet": _Source(
        image_folders.tinyimagenet, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    ),
    "imagenet": _Source(
        image_folders.imagenet,
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        root_holds="train/WNID/*.JPEG and val/WNID/*.JPEG",
        read_own_classes=partial(image_folders.imagenet, own_classes=True),
    ),
    "miniimagenet": _Source(
        few_shot_sets.miniimagenet, _IMAGENET_MEAN, _IMAGENET_STD, CLASS_SPLITS
    ),
    "tieredimagenet": _Source(
        few_shot_sets.tieredimagenet, _IMAGENET_MEAN, _IMAGENET_STD, CLASS_SPLITS
    ),
    "cifar_fs": _Source(few_shot_sets.cifar_fs, _CIFAR100_MEAN, _CIFAR100_STD, CLASS_SPLITS),
    # Of the black and white drawings of 105 pixels. Resizing keeps the mean and lowers the deviation a little.
    "omniglot": _Source(few_shot_sets.omniglot, (0.0787,), (0.2693,), CLASS_SPLITS),
    "characters": _Source(
        characters.characters,
        (0.0874,),
        (0.2498,),
        CLASS_SPLITS,
        usual_root=lambda: characters.FONTS,
    ),
    FOLDER: _Source(
        image_folders.any_folder,
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        ("train", "test", "validation"),
        root_holds="images",
        read_own_classes=partial(image_folders.any_folder, own_classes=True),
    ),
}
DATASET_NAMES = tuple(_SOURCES)
