"""Few-shot data sets that are published as pickles: mini-imagenet-cache, MetaOptNet's files, and tieredImageNet's.

Pickles are read without running anything that they name (`peerlearn.data.pickles`). Layouts are those of the readers in
yaoyao-liu/mini-imagenet-tools, kjunelee/MetaOptNet and renmengye/few-shot-ssl-public. Colours are taken as red, green,
blue.

Dimensions: N images.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from peerlearn.data.pickles import array_in, read_pickle, read_pickled_dictionary, text_in
from peerlearn.errors import UserError

SPLITS = ("train", "val", "test")
_FETCH = "it is damaged, fetch it again"


class PickledSplit(NamedTuple):
    """One split of a data set.

    Attributes:
        source: the file of the images.
        images: uint8 (height, width, 3) each, or the bytes of a PNG file.
        labels: class of each image, (N,) whole numbers.
        names: names of the classes, by their numbers; as they are published, which may be no names of folders.
    """

    source: Path
    images: Iterator[np.ndarray | bytes]
    labels: tuple[int, ...]
    names: dict[int, str]


class _Layout(NamedTuple):
    """The files of a data set: those of the images of each split, the first choice first, and how they are read."""

    dataset: str
    files: dict[str, tuple[str, ...]]
    read: Callable[[Path, str], PickledSplit]


def find_pickles(folder: Path) -> tuple[str, dict[str, Callable[[], PickledSplit]]]:
    """The data set whose pickles lie in a folder.

    Returns:
        Its name in configs, and a reader of each split.

    Raises:
        UserError: there is no such data set, or a split of it is missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: give the one that holds the pickles of all splits"
        )
    for layout in _LAYOUTS:
        found = {
            split: next((path for name in names if (path := folder / name).is_file()), None)
            for split, names in layout.files.items()
        }
        present = {split: path for split, path in found.items() if path is not None}
        if not present:
            continue
        missing = next((split for split in SPLITS if split not in present), None)
        if missing is not None:
            first = next(iter(present.values())).name
            raise UserError(
                f"{folder} holds {first} and no {layout.files[missing][0]}: put the files of all splits there"
            )
        return layout.dataset, {
            split: _reader(layout.read, path, split) for split, path in present.items()
        }
    known = ", ".join(layout.files["train"][0] for layout in _LAYOUTS)
    raise UserError(
        f"{folder} holds none of the pickles that are known: {known}, and those of val and test"
    )


def _reader(
    read: Callable[[Path, str], PickledSplit], path: Path, split: str
) -> Callable[[], PickledSplit]:
    return lambda: read(path, split)


# The readers


def _cache(path: Path, split: str) -> PickledSplit:
    """{"image_data": uint8 (N, 84, 84, 3), "class_dict": {name: numbers of its images}}."""
    content = read_pickled_dictionary(path, advice=_FETCH)
    pixels = _pixels(content.get("image_data"), path, "image_data")
    classes = content.get("class_dict")
    if not isinstance(classes, dict) or not classes:
        raise UserError(f"{path} holds no dictionary of classes as class_dict: {_FETCH}")
    labels = [-1] * len(pixels)
    names = {}
    for label, (key, members) in enumerate(classes.items()):
        names[label] = _name(key, path)
        for index in _whole_numbers(members, path, f"class_dict {names[label]!r}"):
            if not 0 <= index < len(pixels) or labels[index] >= 0:
                what = "is in two classes" if 0 <= index < len(pixels) else "is not there"
                raise UserError(f"{path}: image {index} of class {names[label]!r} {what}: {_FETCH}")
            labels[index] = label
    if -1 in labels:
        raise UserError(f"{path}: image {labels.index(-1)} is in no class: {_FETCH}")
    return PickledSplit(path, iter(pixels), tuple(labels), names)


def _labelled(path: Path, split: str) -> PickledSplit:
    """{"data": uint8 (N, height, width, 3), "labels": (N,)}, and {"catname2label": {name: label}} if it is there."""
    content = read_pickled_dictionary(path, advice=_FETCH)
    pixels = _pixels(content.get("data"), path, "data")
    labels = _whole_numbers(content.get("labels"), path, "labels")
    _check_count(path, len(labels), len(pixels))
    by_name = content.get("catname2label")
    names = {}
    if isinstance(by_name, dict) and by_name:
        numbers = _whole_numbers(list(by_name.values()), path, "catname2label")
        names = {label: _name(key, path) for key, label in zip(by_name, numbers, strict=True)}
    # The numbers of what was split off the training classes are theirs.
    part = "" if "_train_phase_" in path.name else f"{split}-"
    return PickledSplit(path, iter(pixels), labels, _named(names, labels, part))


def _tiered_png(path: Path, split: str) -> PickledSplit:
    """A list of N PNG files, each as an array of bytes."""
    content = read_pickle(path, advice=_FETCH)
    rows = array_in(content)
    files = list(content if isinstance(content, list) else [] if rows is None else rows.flat)
    if not files:
        raise UserError(f"{path} holds no list of images: {_FETCH}")
    labels, names = _tiered_labels(path, split, len(files))
    return PickledSplit(path, _png_files(files, path), labels, names)


def _png_files(files: Sequence[Any], path: Path) -> Iterator[bytes]:
    for index, file in enumerate(files):
        values = array_in(file)
        content = values.tobytes() if values is not None and values.dtype == np.uint8 else file
        if not isinstance(content, bytes) or not content.startswith(b"\x89PNG"):
            raise UserError(f"{path}: image {index} is no PNG file: {_FETCH}")
        yield content


def _tiered_npz(path: Path, split: str) -> PickledSplit:
    """The array images, uint8 (N, 84, 84, 3), read image by image: that of the train split has 9 GB."""
    with _npz_images(path) as (shape, _):
        count = shape[0]
    labels, names = _tiered_labels(path, split, count)
    return PickledSplit(path, _stream(path), labels, names)


def _stream(path: Path) -> Iterator[np.ndarray]:
    with _npz_images(path) as (shape, file):
        size = shape[1] * shape[2] * shape[3]
        for index in range(shape[0]):
            try:
                content = file.read(size)
            except Exception as error:
                raise _damaged(path, error) from error
            if len(content) < size:
                raise UserError(f"{path} ends within image {index}: {_FETCH}")
            yield np.frombuffer(content, dtype=np.uint8).reshape(shape[1:])


@contextmanager
def _npz_images(path: Path) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """The shape of the array images, and the file that its bytes are read from next."""
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open("images.npy"))
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, by_columns, dtype = read_header(file)
        except Exception as error:
            raise _damaged(path, error) from error
        if by_columns or not _is_pictures(shape, dtype):
            raise UserError(f"{path} holds no {_PICTURES} as images: {_FETCH}")
        yield shape, file


def _damaged(path: Path, error: Exception) -> UserError:
    """What damaged bytes make the readers of archives raise, which may be anything, as one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot read {path} ({reason}): {_FETCH}")


def _tiered_labels(path: Path, split: str, images: int) -> tuple[tuple[int, ...], dict[int, str]]:
    """{"label_specific": (N,), "label_specific_str": names by number}, or {"labels": (N,)}, of a file of its own."""
    labels_path = path.with_name(f"{split}_labels.pkl")
    content = read_pickled_dictionary(labels_path, advice=_FETCH)
    key = "label_specific" if "label_specific" in content else "labels"
    labels = _whole_numbers(content.get(key), labels_path, key)
    _check_count(labels_path, len(labels), images)
    words = content.get("label_specific_str")
    values = array_in(words)
    listed = words if isinstance(words, list) else [] if values is None else values.tolist()
    names = {label: _name(word, labels_path) for label, word in enumerate(listed)}
    return labels, _named(names, labels, f"{split}-")


# What they have in common


_PICTURES = "pictures (images, height, width, 3) of bytes"


def _is_pictures(shape: Sequence[int], dtype: np.dtype) -> bool:
    return dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and min(shape) > 0


def _pixels(value: Any, path: Path, key: str) -> np.ndarray:
    pixels = array_in(value)
    if pixels is None or not _is_pictures(pixels.shape, pixels.dtype):
        raise UserError(f"{path} holds no {_PICTURES} as {key}: {_FETCH}")
    return pixels


def _whole_numbers(value: Any, path: Path, key: str) -> tuple[int, ...]:
    values = array_in(value)
    numbers = (
        value if isinstance(value, list | tuple) else [] if values is None else values.tolist()
    )
    if (
        not numbers
        or not isinstance(numbers, list | tuple)
        or not all(isinstance(each, int) for each in numbers)
    ):
        raise UserError(f"{path} holds no whole numbers as {key}: {_FETCH}")
    return tuple(numbers)


def _name(value: Any, path: Path) -> str:
    name = text_in(value)
    if not isinstance(name, str | int):
        raise UserError(f"{path} holds a class whose name is no word: {_FETCH}")
    return str(name)


def _named(names: dict[int, str], labels: Sequence[int], part: str) -> dict[int, str]:
    """The names, or where one of them is missing, numbers instead."""
    present = sorted(set(labels))
    if all(label in names for label in present):
        return {label: names[label] for label in present}
    return {label: f"{part}{label:03d}" for label in present}


def _check_count(path: Path, labels: int, images: int) -> None:
    if labels != images:
        raise UserError(f"{path} holds {labels} labels for {images} images: fetch the files again")


_MINI = "miniImageNet_category_split_"
_LAYOUTS = (
    _Layout(
        "miniimagenet", {split: (f"mini-imagenet-cache-{split}.pkl",) for split in SPLITS}, _cache
    ),
    _Layout(
        "miniimagenet",
        {
            "train": (f"{_MINI}train_phase_train.pickle",),
            # In MetaOptNet's own files, those of the train phase are further images of the training classes.
            "val": (f"{_MINI}val.pickle", f"{_MINI}train_phase_val.pickle"),
            "test": (f"{_MINI}test.pickle", f"{_MINI}train_phase_test.pickle"),
        },
        _labelled,
    ),
    _Layout("cifar_fs", {split: (f"CIFAR_FS_{split}.pickle",) for split in SPLITS}, _labelled),
    _Layout(
        "tieredimagenet", {split: (f"{split}_images_png.pkl",) for split in SPLITS}, _tiered_png
    ),
    _Layout("tieredimagenet", {split: (f"{split}_images.npz",) for split in SPLITS}, _tiered_npz),
)
