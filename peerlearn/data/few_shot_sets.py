"""Few-shot data sets, whose train, validation and test splits are of different classes, in the layouts that lie about.

Each reader takes a split and the folder that ``load_dataset`` calls root. It raises a UserError that names the file or
folder if something is missing, empty or in no list. Nothing is downloaded, and pickles are read by
`peerlearn data convert` alone.

Layouts were taken from the publishers' own readers: Ravi and Larochelle's lists (twitter/meta-learning-lstm),
mmfewshot's (open-mmlab/mmfewshot, MiniImageNetDataset), easyfsl's (sicara/easy-few-shot-learning, EasySet and
MiniImageNet), Bertinetto's CIFAR-FS (bertinetto/r2d2) and Snell's Omniglot (jakesnell/prototypical-networks).
"""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from peerlearn.data.file_search import IMAGE_SUFFIXES, find_images, search, subfolders
from peerlearn.data.files import Content, read_bytes, read_lines
from peerlearn.data.image_folders import decode_image
from peerlearn.errors import UserError
from peerlearn.runs.progress import phase
from peerlearn.runs.text import listed

# The names of a split's folder or list.
_SPLIT_NAMES = {
    "train": ("train", "meta-train", "base"),
    "validation": ("val", "valid", "validation", "meta-val", "meta-valid"),
    "test": ("test", "meta-test", "novel"),
}
_CONVERT = "`peerlearn data convert` makes such folders of pickles"


class _Layouts(NamedTuple):
    """Where a data set's files lie: in root, or in one of these folders of it."""

    title: str
    folders: tuple[str, ...]


_MINI = _Layouts(
    "miniImageNet",
    ("miniimagenet", "mini-imagenet", "mini_imagenet", "miniImageNet", "MiniImagenet"),
)
_TIERED = _Layouts(
    "tieredImageNet",
    ("tieredimagenet", "tiered-imagenet", "tiered_imagenet", "tieredImageNet"),
)
_CIFAR_FS = _Layouts(
    "CIFAR-FS", ("cifar_fs", "cifar-fs", "CIFAR-FS", "CIFAR_FS", "cifarfs", "cifar100")
)


def miniimagenet(split: str, root: Path) -> Content:
    """miniImageNet: lists of images or classes beside images/, or a folder of class folders for each split."""
    return _lists_or_folders(_MINI, split, root)


def tieredimagenet(split: str, root: Path) -> Content:
    """tieredImageNet, in the same layouts as ``miniimagenet``."""
    return _lists_or_folders(_TIERED, split, root)


def cifar_fs(split: str, root: Path) -> Content:
    """CIFAR-FS as published, data/CLASS/*.png and splits/bertinetto/*.txt, or as ``miniimagenet``."""
    for folder in _places(_CIFAR_FS, root):
        lists = folder / "splits" / "bertinetto"
        if lists.is_dir():
            names = read_lines(_list_of(split, lists, (".txt",)))
            return _classes(names, [folder / "data" / name for name in names], lists)
    return _lists_or_folders(_CIFAR_FS, split, root)


def _places(layouts: _Layouts, root: Path) -> list[Path]:
    return [
        folder for folder in (root, *(root / name for name in layouts.folders)) if folder.is_dir()
    ]


def _lists_or_folders(layouts: _Layouts, split: str, root: Path) -> Content:
    """The layout that is there; lists count before folders, which may hold the images that they name."""
    for folder in _places(layouts, root):
        for lists in (folder, folder / "split", folder / "splits"):
            if any(_lists_in(lists, each) for each in _SPLIT_NAMES):
                return _listed(_list_of(split, lists, _LISTS), folder)
        if all(_split_folder(folder, each) for each in _SPLIT_NAMES):
            return _split_of_folders(folder, split)
        if _split_folder(folder, "train"):
            missing = next(each for each in _SPLIT_NAMES if not _split_folder(folder, each))
            raise UserError(
                f"{folder} has a folder for the train split and none for the {missing} split: it needs "
                f"{_SPLIT_NAMES[missing][0]}/ with a folder for each class"
            )
    raise UserError(
        f"{root} holds no {layouts.title}: it needs train/, val/ and test/ with a folder for each class, or train.csv, "
        f"val.csv and test.csv beside images/, there or in {layouts.folders[0]}/; {_CONVERT}"
    )


# Lists


_LISTS = (".csv", ".json")


def _lists_in(folder: Path, split: str) -> list[Path]:
    return [
        path
        for name in _SPLIT_NAMES[split]
        for suffix in _LISTS
        if (path := folder / f"{name}{suffix}").is_file()
    ]


def _list_of(split: str, folder: Path, suffixes: Sequence[str]) -> Path:
    paths = [folder / f"{name}{suffix}" for name in _SPLIT_NAMES[split] for suffix in suffixes]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no {paths[0].name}, the list of the {split} split: add it")
    return found


def _listed(path: Path, base: Path) -> Content:
    """What a list names; ``base`` is the folder that the images are looked for in."""
    return _json_classes(path, base) if path.suffix == ".json" else _csv_images(path, base)


def _json_classes(path: Path, base: Path) -> Content:
    """easyfsl's list of classes: their names, and the folder of each.

    A folder is looked for as it is named, and by its last part in images/ and beside it: the published lists name
    folders of another machine.
    """
    try:
        content = json.loads(read_bytes(path))
        names, roots = content["class_names"], content["class_roots"]
        whole = isinstance(names, list) and isinstance(roots, list) and len(names) == len(roots)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole or not all(isinstance(word, str) and word.strip() for word in (*names, *roots)):
        raise UserError(
            f'{path} is no list of classes: it needs {{"class_names": [...], "class_roots": [...]}} of one length'
        )
    folders = []
    for root in roots:
        own = Path(root).name
        places = [base / root, base / "images" / own, base / own, base / "train" / own]
        folders.append(next((place for place in places if place.is_dir()), places[1]))
    return _classes(names, folders, path)


def _classes(names: Sequence[str], folders: Sequence[Path], source: Path) -> Content:
    """The images of some class folders; ``source`` lists them, for messages."""
    _check_names(names, source)
    images: list[Path] = []
    labels: list[int] = []
    for label, (name, folder) in enumerate(zip(names, folders, strict=True)):
        if not folder.is_dir():
            raise UserError(
                f"{source} lists the class {name!r}, whose folder {folder} is missing: add it"
            )
        found = search(folder).images
        if not found:
            raise UserError(
                f"{source} lists the class {name!r}, whose folder {folder} holds no images"
            )
        images += found
        labels += [label] * len(found)
    return Content(tuple(images), torch.tensor(labels), tuple(names))


def _check_names(names: Sequence[str], source: Path) -> None:
    if not names:
        raise UserError(f"{source} lists no classes")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source} lists the class {twice!r} twice: leave one of them")


# The columns of the lists of images: the image's, then the class's.
_COLUMNS = (("filename", "label"), ("image_name", "class_name"))


def _csv_images(path: Path, base: Path) -> Content:
    """A list of images. Classes are numbered in the order of their names."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text), strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is no list of images ({error}): restore it") from error
    header = [word.strip() for word in rows[0][1]] if rows else []
    columns = next((names for names in _COLUMNS if set(names) <= set(header)), None)
    if columns is None:
        raise UserError(
            f"{path} begins with {','.join(header) or 'nothing'!r}: a list of images begins with filename,label or "
            "class_name,image_name"
        )
    if len(rows) == 1:
        raise UserError(f"{path} lists no images")
    file_at, class_at = map(header.index, columns)
    finder = _ImageFinder(path, base)
    entries: dict[Path, str] = {}
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(
                f"{path} line {line} has {len(row)} columns, and its header {len(header)}"
            )
        name, label = row[file_at].strip(), row[class_at].strip()
        if not name or not label:
            raise UserError(f"{path} line {line} names no {'image' if label else 'class'}")
        image = finder.find(name, label, line)
        if image in entries:
            raise UserError(f"{path} line {line} names {image} a second time: remove the line")
        entries[image] = label
    class_names = tuple(sorted(set(entries.values())))
    number = {name: index for index, name in enumerate(class_names)}
    labels = torch.tensor([number[label] for label in entries.values()])
    return Content(tuple(entries), labels, class_names)


class _ImageFinder:
    """The files of a list's images: in images/, or beside it, in folders of classes or in none.

    Ravi's list numbers the images of each class (n0153282900000005.jpg is the fifth of n01532829). Where the class
    folder holds ILSVRC's own files, that is the fifth of them by the number in their names, as in mmfewshot.
    """

    def __init__(self, source: Path, base: Path) -> None:
        self._source, self._base = source, base
        self._files: dict[Path, frozenset[str]] = {}
        self._numbered: dict[str, list[Path]] = {}

    def find(self, name: str, label: str, line: int) -> Path:
        tops = [self._base / top for top in ("images", "", "train", "data")]
        places = [folder for top in tops for folder in (top, top / label)]
        for folder in places:
            file = folder / name
            if file.name in self._names(file.parent):
                return file
        numbered = self._by_number(name, label)
        if numbered is not None:
            return numbered
        raise UserError(
            f"{self._source} line {line} names {name}, which is neither in {places[0]} nor in {places[1]}: add it, or "
            "remove the line"
        )

    def _by_number(self, name: str, label: str) -> Path | None:
        match = re.fullmatch(re.escape(label) + r"(\d{8})\.\w+", name)
        if match is None:
            return None
        if label not in self._numbered:
            folder = self._base / "images" / label
            files = [file for file in self._names(folder) if re.search(r"_\d+\.\w+$", file)]
            self._numbered[label] = [folder / file for file in sorted(files, key=_number_in)]
        numbered, place = self._numbered[label], int(match[1])
        return numbered[place - 1] if 1 <= place <= len(numbered) else None

    def _names(self, folder: Path) -> frozenset[str]:
        if folder not in self._files:
            try:
                names = frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
            except (OSError, ValueError):
                # There is no such folder, and where a list is damaged, there can be none of that name.
                names = frozenset()
            self._files[folder] = names
        return self._files[folder]


def _number_in(file: str) -> int:
    return int(file.rpartition("_")[2].partition(".")[0])


# Folders


def _split_folder(folder: Path, split: str) -> Path | None:
    return next((path for name in _SPLIT_NAMES[split] if (path := folder / name).is_dir()), None)


def _split_of_folders(folder: Path, split: str) -> Content:
    own = _split_folder(folder, split)
    assert own is not None
    names = subfolders(own)
    beside = (path for path in sorted(own.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES)
    stray = next((path for path in beside if path.is_file()), None)
    if stray is not None:
        raise UserError(f"{stray} lies beside the class folders of {own}: move or remove it")
    if not names:
        raise UserError(
            f"{own} ({split} split) holds no class folders: it needs one for each class"
        )
    return _classes(names, [own / name for name in names], own)


# Omniglot


_SIDE = 28
_TURNS = (0, 90, 180, 270)
# Of the alphabets to train on, one in six, the last by name: 5 of the published 30.
_ALPHABETS_PER_VALIDATION = 6


def omniglot(split: str, root: Path) -> Content:
    """Omniglot (Lake et al. 2015): characters of many alphabets, each turned by 0, 90, 180 and 270 degrees as a class.

    The images lie in images_background/ALPHABET/characterNN and images_evaluation/ALPHABET/characterNN, in root or in
    omniglot-py. Where Vinyals's lists are there, in splits/vinyals/{train,val,test}.txt with lines such as
    Greek/character01/rot090, they are the splits. Otherwise images_evaluation is the test split, the last sixth of the
    alphabets of images_background is the validation split, and the others are the train split.

    Images are inverted (strokes are white) and resized to 28 x 28 by averaging, uint8 (N, 1, 28, 28).
    """
    base = _omniglot_folder(root)
    lists = base / "splits" / "vinyals"
    if lists.is_dir():
        path = _list_of(split, lists, (".txt",))
        return _read_characters([_vinyals(line, base, path) for line in read_lines(path)], path)
    folder = base / ("images_evaluation" if split == "test" else "images_background")
    alphabets = subfolders(_nested(folder)) if folder.is_dir() else ()
    if not alphabets:
        raise UserError(f"{folder} holds no alphabets: unpack {folder.name}.zip in {base}")
    if split != "test":
        kept = len(alphabets) - max(1, len(alphabets) // _ALPHABETS_PER_VALIDATION)
        if not kept:
            raise UserError(
                f"{folder} holds one alphabet, {alphabets[0]}: the train and the validation split need one each"
            )
        alphabets = alphabets[:kept] if split == "train" else alphabets[kept:]
    classes = []
    for alphabet in alphabets:
        characters = subfolders(_nested(folder) / alphabet)
        if not characters:
            raise UserError(f"{_nested(folder) / alphabet} holds no folders of characters")
        for character in characters:
            own = _nested(folder) / alphabet / character
            classes += [_Character(f"{alphabet}/{character}", own, turn) for turn in _TURNS]
    return _read_characters(classes, folder)


class _Character(NamedTuple):
    """One class: a character, and by how many degrees it is turned."""

    name: str
    folder: Path
    turn: int

    @property
    def class_name(self) -> str:
        return f"{self.name}/rot{self.turn:03d}"


def _omniglot_folder(root: Path) -> Path:
    for folder in (root, root / "omniglot-py", root / "omniglot"):
        if (folder / "images_background").is_dir() or (folder / "splits" / "vinyals").is_dir():
            return folder
    raise UserError(
        f"{root} holds no Omniglot: it needs images_background/ and images_evaluation/ with a folder for each "
        "alphabet, there or in omniglot-py/"
    )


def _nested(folder: Path) -> Path:
    """The folder, or one of its own name within, as unpackers make it."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder


def _vinyals(line: str, base: Path, source: Path) -> _Character:
    parts = line.split("/")
    turns = {f"rot{turn:03d}": turn for turn in _TURNS}
    if len(parts) != 3 or parts[2] not in turns or ".." in parts:
        raise UserError(
            f"{source} holds the line {line!r}: its lines are ALPHABET/characterNN/rotNNN, of {listed(list(turns))}"
        )
    name = f"{parts[0]}/{parts[1]}"
    tops = [
        base / "data",
        *(_nested(base / each) for each in ("images_background", "images_evaluation")),
    ]
    folder = next((top / name for top in tops if (top / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{source} lists {name}, which is in no folder of {base}: add its images")
    return _Character(name, folder, turns[parts[2]])


def _read_characters(classes: Sequence[_Character], source: Path) -> Content:
    names = tuple(each.class_name for each in classes)
    _check_names(names, source)
    files = {each.folder: find_images(each.folder).images for each in classes}
    drawings: dict[tuple[Path, int], Tensor] = {}
    with phase("reading", sum(map(len, files.values()))) as advance:
        for folder, paths in files.items():
            whole = [255 - decode_image(path)[0] for path in paths]
            for turn in _TURNS:
                drawings[folder, turn] = torch.stack([_drawing(image, turn) for image in whole])
            advance(len(paths))
    images = [drawings[each.folder, each.turn] for each in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(list(map(len, images))))
    return Content(torch.cat(images), labels, names)


def _drawing(whole: Tensor, turn: int) -> Tensor:
    """A grey image (height, width), turned anticlockwise as the published lists count, and resized: (1, 28, 28)."""
    turned = np.rot90(whole.numpy(), turn // 90)
    small = Image.fromarray(turned).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).unsqueeze(0)
