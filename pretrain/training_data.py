"""Which images a run trains on, which it is watched on, and how their views are made."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.data.augment import AUGMENTATIONS, Augmentation
from peerlearn.data.datasets import ImageDataset, load_dataset, select_images
from peerlearn.data.downloads import NotHereError
from peerlearn.data.subsets import few_shots, hold_out
from peerlearn.errors import UserError
from pretrain.config import DataConfig, PretrainConfig

# The side of the views of image files, unless the config says otherwise.
IMAGE_FILE_SIZE = 224


class TrainingData(NamedTuple):
    """What was read for a run.

    train: the images to train on.
    root: where the data lies; None = the usual places.
    validation: those held out of training; None if none are.
    test: the labelled test split; None where accuracy is not measured.
    """

    train: ImageDataset
    root: str | None
    validation: ImageDataset | None = None
    test: ImageDataset | None = None


def load_training_data(config: PretrainConfig, ranks: Ranks, *, needs_labels: bool) -> TrainingData:
    """The dataset of the config, or its fallback with a line that says so, without what is held out.

    Raises:
        UserError: neither can be had; or labels, a test split or images to hold out are asked for and missing.
    """
    train, root = _load(config.data, ranks)
    settings = config.data
    for key, asked in (
        (f"method {config.method}", needs_labels),
        ("data.validation_percent", settings.validation_percent > 0),
        ("data.shots", settings.shots is not None),
    ):
        if asked and not _labelled(train):
            raise UserError(
                f"{key} needs a label for every image, which {train.name} {train.split} has not: choose another "
                "data.name or data.split"
            )
    # Read before anything is trained: the end of the run needs it.
    test = load_dataset(train.name, "test", root=root) if needs_labels else None
    if test is not None and not _labelled(test):
        raise UserError(f"{test.name} test has no labels to measure accuracy by")
    validation = None
    if settings.validation_percent and train.labels is not None:
        kept, held_out = hold_out(train.labels, settings.validation_percent, seed=config.seed)
        if not len(held_out):
            raise UserError(
                f"data.validation_percent {settings.validation_percent:g} holds nothing out of {train.name}: each of "
                "its classes has a single image"
            )
        train, validation = select_images(train, kept), select_images(train, held_out)
    if settings.shots is not None and train.labels is not None:
        train = select_images(train, few_shots(train.labels, settings.shots, seed=config.seed))
    return TrainingData(train, root, validation, test)


def _labelled(dataset: ImageDataset) -> bool:
    """Whether every image has a label."""
    return dataset.labels is not None and int(dataset.labels.min()) >= 0


def _load(data: DataConfig, ranks: Ranks) -> tuple[ImageDataset, str | None]:
    try:
        return load_dataset(data.name, data.split, root=data.root, limit=data.limit), data.root
    except UserError as error:
        # A root is where the user says that the images are: others would not be what was asked for.
        if data.fallback is None or data.root is not None or isinstance(error, NotHereError):
            raise
        if ranks.main:
            print(f"{data.name} cannot be had ({error}): training on {data.fallback} instead")
        return load_dataset(data.fallback, data.split, limit=data.limit), None


def augmentation_of(data: DataConfig) -> Augmentation:
    """The recipe of the config's views."""
    recipe = AUGMENTATIONS[data.augmentation]
    if data.crop_scale is None:
        return recipe
    smallest, largest = data.crop_scale
    return dataclasses.replace(recipe, crop_scale=(smallest, largest))


def native_size(dataset: ImageDataset) -> int:
    """The side of images held in memory, 224 for image files."""
    return dataset.images.shape[-1] if isinstance(dataset.images, Tensor) else IMAGE_FILE_SIZE
