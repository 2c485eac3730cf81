"""The data sets that are known by name, and what their publishers say of them. Nothing here waits for torch."""

from typing import TYPE_CHECKING, Literal, NamedTuple


class Published(NamedTuple):
    """A data set as it is published.

    Attributes:
        images: number of images of each split that can be trained on.
        classes: number of classes.
        channels: number of channels of an image.
        size: height and width of an image in pixels; None for photographs of many sizes.
        split_by_class: whether train, validation and test are of different classes, as few-shot learning has it;
            `classes` are those of train.
    """

    images: dict[str, int]
    classes: int
    channels: int
    size: int | None
    split_by_class: bool = False


# None where the user's own files decide.
PUBLISHED: dict[str, Published | None] = {
    "digits": Published({"train": 1437}, 10, 1, 8),
    "fashion_mnist": Published({"train": 60_000}, 10, 1, 28),
    "fashion_mnist_classes": Published(
        {"train": 28_000, "validation": 21_000, "test": 21_000}, 4, 1, 28, split_by_class=True
    ),
    "cifar10": Published({"train": 50_000}, 10, 3, 32),
    "cifar100": Published({"train": 50_000}, 100, 3, 32),
    "stl10": Published(
        {"train": 5_000, "unlabeled": 100_000, "train+unlabeled": 105_000}, 10, 3, 96
    ),
    "tinyimagenet": Published({"train": 100_000}, 200, 3, 64),
    "imagenet": Published({"train": 1_281_167}, 1000, 3, None),
    "miniimagenet": Published(
        {"train": 38_400, "validation": 9_600, "test": 12_000}, 64, 3, 84, split_by_class=True
    ),
    "tieredimagenet": Published(
        {"train": 448_695, "validation": 124_261, "test": 206_209}, 351, 3, 84, split_by_class=True
    ),
    "cifar_fs": Published(
        {"train": 38_400, "validation": 9_600, "test": 12_000}, 64, 3, 32, split_by_class=True
    ),
    # Every character in four turns; without Vinyals's lists.
    "omniglot": Published(
        {"train": 65_040, "validation": 12_080, "test": 52_720}, 3252, 1, 28, split_by_class=True
    ),
    # In Debian 12's fonts-dejavu, fonts-freefont-ttf and fonts-aenigma: the fonts decide how many images there are.
    "characters": Published(
        {"train": 39_699, "validation": 17_024, "test": 17_112}, 112, 1, 32, split_by_class=True
    ),
    "folder": None,
}
DATASET_NAMES = tuple(PUBLISHED)


def is_split_by_class(name: str) -> bool:
    """Whether the splits of a data set always are of different classes."""
    published = PUBLISHED[name]
    return published is not None and published.split_by_class


# The type of a config's key that names one of them.
if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[DATASET_NAMES]
