"""The images with boxes that a config names."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from detection.config import DetectDataConfig
from peerlearn.compute.dist import Ranks
from peerlearn.data.coco import coco
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.data.detection_subsets import first_images, training_part
from peerlearn.data.leakage import leaks
from peerlearn.data.mini_voc import mini_voc
from peerlearn.data.voc import VOC_CLASSES, voc
from peerlearn.errors import UserError
from peerlearn.evaluation.training_run import whole_path

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """Images with boxes.

    Attributes:
        train: images to learn from.
        test: images to score on.
        validation: images by which the best detector is chosen; None without.
    """

    train: DetectionDataset
    test: DetectionDataset
    validation: DetectionDataset | None


def load_data(config: DetectDataConfig, ranks: Ranks) -> Data:
    """The splits as they are in the data. All ranks call it together.

    Raises:
        UserError: a split is missing, empty or faulty, or has other classes than the training split.
    """
    # The main rank is the first, as the miniature may have to be written.
    return ranks.main_first(lambda: read_data(config))


def read_data(config: DetectDataConfig) -> Data:
    """`load_data` in a single process.

    Raises:
        UserError: as `load_data` does.
    """
    train = _read(config, config.train, "trainval07+12", "train")
    test = read_test_images(config)
    chosen_by = config.validation
    validation = None if chosen_by is None else _read(config, chosen_by, chosen_by, chosen_by)
    if validation is not None:
        _check_objects(validation)
    for other in (test, validation):
        if other is not None and other.class_names != train.class_names:
            unlike = sorted(set(other.class_names) ^ set(train.class_names))
            raise UserError(
                f"{other.title} {other.split} has other classes than {train.split}, or in another order "
                f"({', '.join(unlike or other.class_names)[:80]}): give both the same categories"
            )
    return Data(train, test, validation)


def read_test_images(config: DetectDataConfig) -> DetectionDataset:
    """The images to score on, which are all that a trained detector needs.

    Raises:
        UserError: the split is missing, empty or faulty, or none of its objects counts.
    """
    test = _read(config, config.test, "test2007", "test")
    _check_objects(test)
    return test


def _check_objects(images: DetectionDataset) -> None:
    """Make sure that there is an average precision."""
    if all(bool(each.all()) for each in images.difficult):
        raise UserError(
            f"{images.title} {images.split}: none of its {len(images):,} images has an object that counts, so there "
            "is no average precision: give images with objects that are neither difficult nor crowds"
        )


def _read(
    config: DetectDataConfig, split: str | None, of_voc: str, of_mini_voc: str
) -> DetectionDataset:
    """One split, or the usual one of the format, and its first images where there is a limit."""
    if config.name == "mini_voc":
        dataset = mini_voc(split or of_mini_voc, config.root, seed=0)
    elif config.root is None:
        what = "VOCdevkit" if config.name == "voc" else "the folder of the images"
        raise UserError(f"data.root is missing: give {what}")
    elif config.name == "voc":
        names = config.classes or VOC_CLASSES
        dataset = voc(split or of_voc, Path(config.root), class_names=names)
    elif split is None:
        raise UserError(
            "data.train and data.test are missing: give the JSON files of data.name coco"
        )
    else:
        dataset = coco(Path(config.root), Path(split))
    return dataset if config.limit is None else first_images(dataset, config.limit)


def from_anywhere(config: DetectDataConfig) -> DetectDataConfig:
    """The config with whole paths."""
    data = dataclasses.replace(config, root=whole_path(config.root))
    if config.name != "coco":
        return data
    return dataclasses.replace(
        data,
        train=whole_path(config.train),
        test=whole_path(config.test),
        validation=whole_path(config.validation),
    )


def training_images(config: DetectDataConfig, train: DetectionDataset) -> DetectionDataset:
    """What is trained on: images with objects, and of them the share that the config asks for.

    Raises:
        UserError: no image has an object.
    """
    (percent,) = config.percents
    difficult = config.difficult or ("drop" if config.name == "coco" else "keep")
    return training_part(train, difficult=difficult, percent=percent, seed=config.subset_seed)


def leakage(config: DetectDataConfig, data: Data, ranks: Ranks) -> dict[str, Any]:
    """Look for training images among the test images, where the config asks for it: what a protocol tells of it.

    All ranks call it together.

    Raises:
        UserError: there are some, and they are to be refused.
    """
    answer = config.leakage or ("warn" if config.name == "coco" else "ignore")
    if answer == "ignore":
        return {}

    def look() -> dict[str, int]:
        found = leaks(data.train, data.test)
        if found.line() and answer == "refuse":
            raise UserError(found.line())
        if found.line():
            logger.warning("%s", found.line())
        return found.counts()

    return {"leakage": ranks.from_main(look)}
