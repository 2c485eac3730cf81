"""Which images a run trains on, which it is watched on, and how their views are made."""

import logging
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.data.beton_dataset import check_packed_from, is_packed, packed_dataset
from peerlearn.data.beton_facts import read_facts
from peerlearn.data.class_splits import check_disjoint
from peerlearn.data.datasets import (
    DATASET_NAMES,
    ImageDataset,
    first_images,
    has_split,
    load_dataset,
    select_images,
)
from peerlearn.data.downloads import NotHereError, without_downloads
from peerlearn.data.ffcv_package import HOW_TO_INSTALL, why_no_ffcv
from peerlearn.data.image_folders import image_extent
from peerlearn.data.published import is_split_by_class
from peerlearn.data.recipes import Augmentation
from peerlearn.data.subsets import few_shots, hold_out
from peerlearn.data.views_config import given
from peerlearn.errors import UserError
from pretrain.config import Backend, DataConfig, PretrainConfig

# What a method needs labels for: nothing; to train classifiers of the classes that the test split has too; or to train
# on some classes, choose an epoch by others, and be tested on others again.
LabelUse = Literal["unused", "classified", "split_by_class"]

# The largest side of the views of image files, unless the config says otherwise.
IMAGE_FILE_SIZE = 224
# So many files, spread over the dataset, tell how large its images are.
_PROBED_FILES = 256
# Decoded images beyond this stay in their files, unless the config says otherwise.
_LARGEST_HELD_BYTES = 2**31

logger = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """What was read for a run.

    train: the images to train on.
    root: where the data lies; None = the usual places.
    backend: where their crops are cut: the config's choice, or what suits the images.
    image_size: side of their views in pixels, likewise.
    validation: those held out of training, or those of the validation classes; None if there are none.
    test: the labelled test split; None where accuracy is not measured.
    """

    train: ImageDataset
    root: str | None
    backend: Backend
    image_size: int
    validation: ImageDataset | None = None
    test: ImageDataset | None = None


def load_training_data(config: PretrainConfig, ranks: Ranks, use: LabelUse) -> TrainingData:
    """The dataset of the config, or its fallback with a line that says so, without what is held out.

    Raises:
        UserError: neither can be had; or labels, a test split or images to hold out are asked for and missing; or
            splits that must be of different classes are not, or the other way round.
    """
    settings = config.data
    train, root = _load(settings, ranks, own_classes=use == "split_by_class")
    for key, asked in (
        (f"method {config.method}", use != "unused"),
        ("data.validation_percent", settings.validation_percent > 0),
        ("data.shots", settings.shots is not None),
    ):
        if asked and not is_labelled(train):
            raise UserError(
                f"{key} needs a label for every image, which {train.title} {train.split} has not{because(train)}: "
                "choose another data.name or data.split"
            )
    test = validation = None
    # Read before anything is trained: the end of the run needs it.
    if use == "classified":
        test = _test_split(config, train, root)
    elif use == "split_by_class":
        validation = _validation_classes(train, root, ranks)
    if settings.validation_percent and train.labels is not None:
        kept, held_out = hold_out(train.labels, settings.validation_percent, seed=config.seed)
        if not len(held_out):
            raise UserError(
                f"data.validation_percent {settings.validation_percent:g} holds nothing out of {train.title}: each of "
                "its classes has a single image"
            )
        train, validation = select_images(train, kept), select_images(train, held_out)
    if settings.shots is not None and train.labels is not None:
        train = select_images(train, few_shots(train.labels, settings.shots, seed=config.seed))
    backend, image_size = chosen_backend(settings, train), settings.image_size or native_size(train)
    data = TrainingData(train, root, backend, image_size, validation, test)
    if ranks.main:
        _tell(data, settings)
    return data


def _tell(data: TrainingData, settings: DataConfig) -> None:
    """Say what was passed over, and what was chosen for image files where the config leaves it open."""
    splits = [split for split in (data.train, data.validation, data.test) if split]
    for remark in dict.fromkeys(remark for split in splits for remark in split.remarks):
        logger.warning("%s", remark)
    if data.train.has_files and None in (settings.backend, settings.image_size):
        place = {
            "memory": "images decoded once into memory",
            "folder": "files that workers decode",
            "ffcv": "a packed file",
        }[data.backend]
        print(
            f"{data.train.title}: views of {data.image_size} pixels, cut from {place} (data.image_size and "
            "data.backend set others)"
        )


def _test_split(config: PretrainConfig, train: ImageDataset, root: str | None) -> ImageDataset:
    """The test images of the classes that are trained."""
    if is_split_by_class(train.name):
        raise UserError(
            f"method {config.method} needs test images of the classes that it trains, and the splits of {train.title} "
            "are of different classes: choose another data.name, or method prototypical"
        )
    test = load_dataset(train.name, "test", root=root)
    if not is_labelled(test):
        raise UserError(f"{test.title} test has no labels to measure accuracy by{because(test)}")
    return test


def _validation_classes(train: ImageDataset, root: str | None, ranks: Ranks) -> ImageDataset:
    """The validation split, after a look at all three: no class and no image may stand in two of them."""
    if not has_split(train.name, "validation"):
        fitting = [name for name in DATASET_NAMES if has_split(name, "validation")]
        raise UserError(
            f"method prototypical needs train, validation and test images of different classes, and {train.title} is "
            f"not split so: choose data.name from {', '.join(fitting)}"
        )
    load = partial(load_dataset, train.name, root=root, own_classes=True)
    validation = load("validation")
    if not is_labelled(validation):
        raise UserError(
            f"{validation.title} validation has no labels to choose an epoch by{because(validation)}"
        )
    if ranks.main:
        check_disjoint([train, validation, load("test")])
    return validation


def because(dataset: ImageDataset) -> str:
    """Why a dataset has no labels, in brackets; "" where that is not known."""
    return f" ({dataset.why_unlabelled})" if dataset.why_unlabelled else ""


def is_labelled(dataset: ImageDataset) -> bool:
    """Whether every image has a label."""
    return dataset.labels is not None and int(dataset.labels.min()) >= 0


def _load(data: DataConfig, ranks: Ranks, *, own_classes: bool) -> tuple[ImageDataset, str | None]:
    if data.packed is not None:
        return _load_packed(
            data, Path(os.path.expanduser(data.packed)), ranks, own_classes=own_classes
        ), data.root
    load = partial(load_dataset, limit=data.limit, own_classes=own_classes)
    try:
        return load(data.name, data.split, root=data.root), data.root
    except UserError as error:
        # A root is where the user says that the images are: others would not be what was asked for.
        if data.fallback is None or data.root is not None or isinstance(error, NotHereError):
            raise
        if ranks.main:
            print(f"{data.name} cannot be had ({error}): training on {data.fallback} instead")
        return load(data.fallback, data.split), None


def _load_packed(data: DataConfig, file: Path, ranks: Ranks, *, own_classes: bool) -> ImageDataset:
    """The dataset in a packed file, compared with the images that it was packed from where these are at hand.

    Without ffcv those are taken themselves, and a line says so.

    Raises:
        UserError: the file is damaged or holds another dataset; or neither it nor the images can be read.
    """
    originals, why_none = None, ""
    try:
        with without_downloads():
            originals = load_dataset(data.name, data.split, root=data.root, own_classes=own_classes)
    except UserError as error:
        # A root is where the user says that the images are.
        if data.root is not None:
            raise
        why_none = str(error)
    no_ffcv = why_no_ffcv()
    if not no_ffcv:
        dataset = packed_dataset(file, data.name, data.split, quiet=not ranks.main)
        if originals is not None:
            check_packed_from(read_facts(file), file, originals)
    elif originals is not None:
        if ranks.main:
            print(
                f"{no_ffcv} ({HOW_TO_INSTALL}): training on the images of {originals.title} themselves, not on those "
                f"in {file}"
            )
        dataset = originals
    else:
        raise UserError(
            f"data.packed {file} cannot be read ({no_ffcv}: {HOW_TO_INSTALL}), nor can the images that it was packed "
            f"from ({why_none})"
        )
    return dataset if data.limit is None else first_images(dataset, data.limit)


def view_recipes(config: PretrainConfig, views: int) -> tuple[Augmentation, ...]:
    """The recipe of each of a method's views.

    Raises:
        UserError: the config changes a second view, and the method draws but one.
    """
    own = given(config.data.views.second)
    if views == 1 and own:
        raise UserError(
            f"data.views.second.{next(iter(own))} must be null with method {config.method}, which draws one view of "
            "each image"
        )
    first, second = config.data.recipes()
    return (first, *[second] * (views - 1))


def native_size(dataset: ImageDataset) -> int:
    """The side of the images themselves; of image files the median of their shorter sides, but at most 224.

    That depends on the files alone, so that a run goes on with the size that it began with.
    """
    if isinstance(dataset.images, Tensor):
        return dataset.images.shape[-1]
    sides = [min(extent) for extent in _extents(_spread(dataset.images))]
    return min(int(statistics.median_low(sides or [IMAGE_FILE_SIZE])), IMAGE_FILE_SIZE)


def chosen_backend(data: DataConfig, dataset: ImageDataset) -> Backend:
    """The config's backend, or memory where it can hold the images: all of one size, and of at most 2 GiB."""
    if is_packed(dataset):
        return "ffcv"
    if data.backend in ("memory", "folder"):
        return data.backend
    if isinstance(dataset.images, Tensor):
        return "memory"
    sizes = _extents(_spread(dataset.images))
    if len(set(sizes)) > 1:
        return "folder"
    width, height = sizes[0] if sizes else (IMAGE_FILE_SIZE, IMAGE_FILE_SIZE)
    if dataset.channels * width * height * len(dataset) > _LARGEST_HELD_BYTES:
        return "folder"
    return "memory" if len(set(_extents(dataset.images))) <= 1 else "folder"


def _spread(files: Sequence[Path]) -> Sequence[Path]:
    return files[:: max(1, len(files) // _PROBED_FILES)]


def _extents(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height of the files that tell them."""
    return [extent for file in files if (extent := image_extent(file)) is not None]
