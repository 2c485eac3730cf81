"""Which images a run trains on, which it is watched on, and how their views are made."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from peerlearn.augment import AUGMENTATIONS, Augmentation
from peerlearn.datasets import ImageDataset, load_dataset, select_images
from peerlearn.dist import Ranks
from peerlearn.errors import UserError
from peerlearn.subsets import few_shots, hold_out
from pretrain.config import DataConfig, PretrainConfig

# The side of the views of image files, unless the config says otherwise.
IMAGE_FILE_SIZE = 224


class TrainingData(NamedTuple):
    """What was read for a run.

    train: the images to train on.
    validation: those held out of training; None if none are.
    root: where the data lies; None = the usual places.
    """

    train: ImageDataset
    validation: ImageDataset | None
    root: str | None


def load_training_data(config: PretrainConfig, ranks: Ranks) -> TrainingData:
    """The dataset of the config, or its fallback with a line that says so, without what is held out.

    Raises:
        UserError: neither can be had, or labels that are asked for are missing.
    """
    dataset, root = _load(config.data, ranks)
    labelled = dataset.labels is not None and int(dataset.labels.min()) >= 0
    if not labelled:
        for key, asked in (
            ("method supervised", config.method == "supervised"),
            ("data.validation_percent", config.data.validation_percent > 0),
            ("data.shots", config.data.shots is not None),
        ):
            if asked:
                raise UserError(
                    f"{key} needs a label for every image, which {dataset.name} {dataset.split} has not: choose "
                    "another data.name or data.split"
                )
        return TrainingData(dataset, None, root)
    validation = None
    if config.data.validation_percent:
        assert dataset.labels is not None
        kept, held_out = hold_out(dataset.labels, config.data.validation_percent, seed=config.seed)
        dataset, validation = select_images(dataset, kept), select_images(dataset, held_out)
    if config.data.shots is not None:
        assert dataset.labels is not None
        chosen = few_shots(dataset.labels, config.data.shots, seed=config.seed)
        dataset = select_images(dataset, chosen)
    return TrainingData(dataset, validation, root)


def _load(data: DataConfig, ranks: Ranks) -> tuple[ImageDataset, str | None]:
    try:
        return load_dataset(data.name, data.split, root=data.root, limit=data.limit), data.root
    except UserError as error:
        if data.fallback is None:
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
