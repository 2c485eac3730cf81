"""The labelled images that evaluators score networks on."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peerlearn.config import require
from peerlearn.errors import UserError
from peerlearn.evaluation.selection import Selection, run_setting

if TYPE_CHECKING:
    from peerlearn.data.datasets import ImageDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationDataConfig:
    """The dataset to evaluate on.

    Attributes:
        name: a dataset; null = the one the run was trained on.
        root: where it lies; null = the usual places.
        limit: only the first n images of each split.
        train_limit: of the train split, instead of limit.
        test_limit: of the test split, instead of limit.
        shots: only so many training images of each class, drawn at random.
        train_percent: only so many percent of each class's training images, drawn at random.
        subset_seed: of shots and train_percent.
        workers: processes that read image files.
    """

    name: str | None = None
    root: str | None = None
    limit: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    shots: int | None = None
    train_percent: float | None = None
    subset_seed: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("limit", "train_limit", "test_limit", "shots"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} must be at least 1, got {value}")
        percent = self.train_percent
        require(
            percent is None or 0 < percent <= 100,
            f"data.train_percent must be within 0..100, got {percent}",
        )
        require(
            self.shots is None or percent is None,
            "data.shots and data.train_percent exclude each other: set one to null",
        )
        require(
            -(2**63) <= self.subset_seed < 2**63,
            f"data.subset_seed must fit 64 bits, got {self.subset_seed}",
        )
        require(self.workers >= 0, f"data.workers must be at least 0, got {self.workers}")


def load_splits(
    data: EvaluationDataConfig, selection: Selection
) -> tuple["ImageDataset", "ImageDataset"]:
    """The train split, or the subset of it asked for, and the test split.

    Of the dataset asked for, else of the one the run was trained on.

    Raises:
        UserError: no dataset is named, it cannot be had, has no labels, or a single class.
    """
    from peerlearn.data.datasets import load_dataset

    name = data.name or run_setting(selection.run, "dataset", None)
    if name is None:
        raise UserError(f"{selection.exports} does not tell its dataset: give one by --data.name")
    root = data.root or (None if data.name else run_setting(selection.run, "data_root", None))
    train = load_dataset(name, "train", root=root, limit=data.train_limit or data.limit)
    test = load_dataset(name, "test", root=root, limit=data.test_limit or data.limit)
    _check_classes(train, test)
    return _subset(train, data), test


def _check_classes(train: "ImageDataset", test: "ImageDataset") -> None:
    if train.labels is None or test.labels is None:
        raise UserError(
            f"{train.name} has no labels: evaluation needs them; choose another by --data.name"
        )
    if train.num_classes != test.num_classes:
        raise UserError(
            f"{train.name}: the train split has {train.num_classes} classes and the test split {test.num_classes}: "
            "they must be the same"
        )
    if train.num_classes < 2:
        raise UserError(f"{train.name} has one class only: there is nothing to tell apart")


def warn_of_missing_classes(train: "ImageDataset", test: "ImageDataset") -> None:
    """Say where a split, or what limits have left of it, has no image of some class."""
    for split, means in (
        (train, "the others are never predicted"),
        (test, "accuracy is that of these"),
    ):
        assert split.labels is not None
        present = len(split.labels.unique())
        if present < split.num_classes:
            logger.warning(
                "%s: the %s split has images of only %d of its %d classes: %s",
                split.name,
                split.split,
                present,
                split.num_classes,
                means,
            )


def _subset(train: "ImageDataset", data: EvaluationDataConfig) -> "ImageDataset":
    from peerlearn.data.datasets import select_images
    from peerlearn.data.subsets import few_shots, stratified_share

    assert train.labels is not None
    if data.shots is not None:
        chosen = few_shots(train.labels, data.shots, seed=data.subset_seed)
    elif data.train_percent is not None:
        chosen = stratified_share(train.labels, data.train_percent, seed=data.subset_seed)
    else:
        return train
    return select_images(train, chosen)
