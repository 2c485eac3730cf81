"""The labelled images that evaluators score networks on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from peerlearn.config import added, changeable, require
from peerlearn.data.published import DatasetName, is_split_by_class
from peerlearn.data.titles import VALIDATION_ENDING
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
        validation_images: number of training images, drawn in proportion from all classes, that are held out and scored
            in place of the test images; null = the test images are scored.
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
    validation_images: int | None = added(None)
    shots: int | None = None
    train_percent: float | None = None
    subset_seed: int = 0
    workers: int = changeable(2)

    def __post_init__(self) -> None:
        for name in ("limit", "train_limit", "test_limit", "validation_images", "shots"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} must be at least 1, got {value}")
        require(
            self.validation_images is None or self.test_limit is None,
            "data.validation_images takes the place of the test images, which data.test_limit counts: set one to null",
        )
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


class Splits(NamedTuple):
    """Labelled images of the same classes.

    train: images to learn from.
    test: images to score on: of the test split, or held out of the train split, and then their split is "validation".
    seen: of held-out images, whether the networks were pretrained on them, see `HeldOut`; None of test images.
    """

    train: "ImageDataset"
    test: "ImageDataset"
    seen: str | None = None

    @property
    def title(self) -> str:
        """What scores are of, for people: the data set's name, and "validation images" where they are those."""
        return self.test.title + (VALIDATION_ENDING if self.seen else "")

    def protocol(self) -> dict[str, Any]:
        """What a protocol tells of the images: how many, and the hash of all that they are."""
        scored, split = ("validation", {"split": "validation"}) if self.seen else ("test", {})
        return {
            **split,
            "train_images": len(self.train),
            f"{scored}_images": len(self.test),
            **({"validation_seen_in_pretraining": self.seen} if self.seen else {}),
            "train_fingerprint": self.train.fingerprint(),
            f"{scored}_fingerprint": self.test.fingerprint(),
        }


def load_splits(data: EvaluationDataConfig, selection: Selection, ranks: "Ranks") -> Splits:
    """The train split, or the subset of it asked for, and images to score on, which have the same classes.

    All ranks call it together; the main one comes first, lest several download the same, and warns of missing classes.

    Raises:
        UserError: as `find_dataset` and `load_labelled` do.
    """
    from peerlearn.evaluation.validation_images import WITH_LABELS

    def load() -> Splits:
        splits = load_labelled(data, find_dataset(data, selection), selection.run)
        return splits._replace(train=_subset(splits.train, data))

    splits = ranks.main_first(load)
    if ranks.main:
        for remark in dict.fromkeys((*splits.train.remarks, *splits.test.remarks)):
            logger.warning("%s", remark)
        warn_of_missing_classes(splits.train, splits.test)
        if splits.seen == WITH_LABELS:
            logger.warning(
                "the networks were trained on the validation images, with their labels: the scores are too good; a "
                "run with a smaller data.limit leaves images that it has not seen"
            )
    return splits


def load_labelled(data: EvaluationDataConfig, place: DatasetPlace, run: Path | None) -> Splits:
    """The train split and the images to score on, with their limits.

    Args:
        data: keys of the config.
        place: the dataset.
        run: the run whose networks are scored, by which validation images are drawn; None = unknown.

    Raises:
        UserError: as `load_split` and `hold_out_validation` do; or the splits are of different classes.
    """
    from peerlearn.data.datasets import first_images
    from peerlearn.evaluation.validation_images import hold_out_validation

    if is_split_by_class(place.name):
        raise UserError(
            f"{place.name} is split by class: train and test have different classes; use peerlearn fewshot, or choose "
            "another by --data.name"
        )
    limit = data.train_limit or data.limit
    if data.validation_images is not None:
        whole = load_split(place, "train", None)
        train, validation, seen = hold_out_validation(
            whole, data.validation_images, place.root, run
        )
        return Splits(first_images(train, limit) if limit else train, validation, seen)
    train = load_split(place, "train", limit)
    test = load_split(place, "test", data.test_limit or data.limit)
    check_same_classes(train, test)
    return Splits(train, test)


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
