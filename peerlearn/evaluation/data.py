"""The labelled images that evaluators score networks on."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from peerlearn.config import changeable, require
from peerlearn.data.published import DatasetName, is_split_by_class
from peerlearn.errors import UserError
from peerlearn.evaluation.selection import Selection, run_setting
from peerlearn.runs.text import listed

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks
    from peerlearn.data.datasets import ImageDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationDataConfig:
    """The dataset to evaluate on.

    Attributes:
        name: name of the dataset; null = the one the run was trained on.
        root: folder of the dataset; null = the usual places.
        limit: number of images of each split, the first ones; null = all.
        train_limit: number of images of the train split, instead of limit.
        test_limit: number of images of the test split, instead of limit.
        shots: number of training images of each class, drawn at random; null = all.
        train_percent: percentage of each class's training images, drawn at random; null = all.
        subset_seed: seed by which shots and train_percent draw.
        workers: number of processes that read image files.
    """

    name: DatasetName | None = None
    root: str | None = changeable(None)
    limit: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    shots: int | None = None
    train_percent: float | None = None
    subset_seed: int = 0
    workers: int = changeable(2)

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


class DatasetPlace(NamedTuple):
    """A dataset's name, and the folder that it lies in; None = the usual places."""

    name: str
    root: str | None


class DatasetKeys(Protocol):
    """A config's keys that name a dataset; None = as the networks' run had it."""

    @property
    def name(self) -> str | None: ...
    @property
    def root(self) -> str | None: ...


def find_dataset(data: DatasetKeys, selection: Selection) -> DatasetPlace:
    """The dataset asked for, else the one that the networks' run was trained on.

    Raises:
        UserError: neither is known.
    """
    name = data.name or run_setting(selection.run, "dataset", None)
    if name is None:
        raise UserError(f"{selection.exports} does not tell its dataset: give one by --data.name")
    root = data.root or (None if data.name else run_setting(selection.run, "data_root", None))
    return DatasetPlace(name, root)


def load_split(
    place: DatasetPlace, split: str, limit: int | None, *, own_classes: bool = False
) -> "ImageDataset":
    """One labelled split.

    Args:
        place: a dataset.
        split: train, test, or another that the dataset has.
        limit: number of images to keep, the first ones; None = all.
        own_classes: whether the split has classes of its own, as few-shot splits do, and is not numbered as the train
            split is.

    Raises:
        UserError: the split cannot be had, has no labels, or a single class.
    """
    from peerlearn.data.datasets import load_dataset

    dataset = load_dataset(place.name, split, root=place.root, limit=limit, own_classes=own_classes)
    if dataset.labels is None:
        why = (
            f", and in its {split} split {dataset.why_unlabelled}: mend that"
            if dataset.why_unlabelled
            else ""
        )
        raise UserError(
            f"{place.name} has no labels: evaluation needs them{why}; or choose another by --data.name"
        )
    if dataset.num_classes < 2:
        raise UserError(f"{place.name} has one class only: there is nothing to tell apart")
    return dataset


def load_splits(
    data: EvaluationDataConfig, selection: Selection, ranks: "Ranks"
) -> tuple["ImageDataset", "ImageDataset"]:
    """The train split, or the subset of it asked for, and the test split, which has the same classes.

    All ranks call it together; the main one comes first, lest several download the same, and warns of missing classes.

    Raises:
        UserError: as `find_dataset` and `load_labelled` do.
    """

    def load() -> tuple["ImageDataset", "ImageDataset"]:
        train, test = load_labelled(data, find_dataset(data, selection))
        return _subset(train, data), test

    train, test = ranks.main_first(load)
    if ranks.main:
        for remark in dict.fromkeys((*train.remarks, *test.remarks)):
            logger.warning("%s", remark)
        warn_of_missing_classes(train, test)
    return train, test


def load_labelled(
    data: EvaluationDataConfig, place: DatasetPlace
) -> tuple["ImageDataset", "ImageDataset"]:
    """The train and the test split, with their limits.

    Raises:
        UserError: as `load_split` does; or the splits are of different classes.
    """
    if is_split_by_class(place.name):
        raise UserError(
            f"{place.name} is split by class: train and test have different classes; use peerlearn fewshot, or choose "
            "another by --data.name"
        )
    train = load_split(place, "train", data.train_limit or data.limit)
    test = load_split(place, "test", data.test_limit or data.limit)
    check_same_classes(train, test)
    return train, test


def check_same_classes(train: "ImageDataset", test: "ImageDataset") -> None:
    """Refuse splits of different numbers of classes.

    Raises:
        UserError: they are.
    """
    if train.num_classes != test.num_classes:
        raise UserError(
            f"{train.title}: the train split has {train.num_classes} classes and the test split {test.num_classes}: "
            "they must be the same"
        )


def warn_of_missing_classes(train: "ImageDataset", test: "ImageDataset") -> None:
    """Say where a split, or what limits have left of it, has no image of some class."""
    for split, means in (
        (train, "the others are never predicted"),
        (test, "accuracy is that of these"),
    ):
        assert split.labels is not None
        present = set(split.labels.tolist())
        missing = [name for c, name in enumerate(split.class_names) if c not in present]
        if missing:
            logger.warning(
                "%s: the %s split has images of only %d of its %d classes: %s; it lacks %s",
                split.title,
                split.split,
                len(present),
                split.num_classes,
                means,
                listed(missing),
            )


def splits_protocol(train: "ImageDataset", test: "ImageDataset") -> dict[str, Any]:
    """What a protocol tells of the images: how many, and the hash of all that they are."""
    return {
        "train_images": len(train),
        "test_images": len(test),
        "train_fingerprint": train.fingerprint(),
        "test_fingerprint": test.fingerprint(),
    }


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
