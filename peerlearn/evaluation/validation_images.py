"""Training images that are scored in place of the test images, so that settings can be tuned without those."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from peerlearn.data.datasets import ImageDataset, select_images
from peerlearn.data.subsets import hold_out_images
from peerlearn.errors import UserError
from peerlearn.evaluation.selection import training_config
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.training_facts import TrainingFacts, training_verb

# One for all runs and evaluations: they are compared on the same images.
_SEED = 0
# Splits whose first images are those of the train split.
_TRAIN_SPLITS = ("train", "train+unlabeled")
_LABELLED_METHODS = ("supervised", "prototypical")
WITH_LABELS = "with labels"


class HeldOut(NamedTuple):
    """The train split in two parts.

    train: images to learn from.
    validation: images to score on.
    seen: whether the networks were pretrained on the images to score on: no, without labels, with labels, other data
        (they were pretrained on another data set), or unknown (for want of the run, or for what its networks started
        from).
    """

    train: ImageDataset
    validation: ImageDataset
    seen: str


def hold_out_validation(
    train: ImageDataset, images: int, root: str | None, run: Path | None
) -> HeldOut:
    """Hold out images of every class in proportion to its size, the same for every seed.

    They are drawn beyond the first images that the run was pretrained on (its data.limit), if there are enough, of
    every class; else from all.

    Args:
        train: the whole train split, labelled.
        images: number of images that are held out.
        root: folder of the data set; None = the usual places.
        run: the run whose networks are scored; None = unknown.

    Raises:
        UserError: no image would be left to learn from; or the facts of the run cannot be read.
    """
    labels = train.labels
    assert labels is not None
    if images >= len(train):
        raise UserError(
            f"data.validation_images {images} leaves nothing to learn from: {train.title} has {len(train)} training "
            "images; choose fewer"
        )
    first, seen = _pretrained_on(train, root, run)
    beyond = labels[first:]
    if first and len(beyond) >= images and len(beyond.unique()) == len(labels.unique()):
        seen = "no"
    else:
        first, beyond = 0, labels
    held = first + hold_out_images(beyond, images, seed=_SEED)
    is_left = torch.ones(len(train), dtype=torch.bool)
    is_left[held] = False
    return HeldOut(
        select_images(train, is_left.nonzero()[:, 0]),
        select_images(train, held, split="validation"),
        seen,
    )


def _pretrained_on(train: ImageDataset, root: str | None, run: Path | None) -> tuple[int, str]:
    """How many of the first training images the run may have been trained on, and what is said of these; see `HeldOut`.

    The number is 0 where what is said is of all images.
    """
    if run is None or training_verb(RunDirectory(run).env) != "pretrain":
        return 0, "unknown"
    facts = TrainingFacts.read(RunDirectory(run).env)
    if facts.initial_weights:
        return 0, "unknown"
    if facts.dataset != train.name:
        return 0, "other data"
    if _whole(facts.data_root) != _whole(root):
        return 0, "unknown"
    config = training_config(run)
    if config.get("data.split", "train") not in _TRAIN_SPLITS:
        return 0, "no"
    # A packed file may be of other images than the first ones.
    limit = None if config.get("data.packed") else config.get("data.limit")
    is_labelled = config.get("method") in _LABELLED_METHODS
    return limit or len(train), WITH_LABELS if is_labelled else "without labels"


def _whole(folder: str | None) -> str | None:
    return None if folder is None else os.path.realpath(os.path.expanduser(folder))
