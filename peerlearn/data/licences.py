"""The licences of the data sets that are known by name, as far as their publishers state one."""

from typing import NamedTuple


class Licence(NamedTuple):
    """What is publicly known of the licence of a data set.

    Attributes:
        words: the licence, or the terms that stand in its place, in Markdown.
        hub_id: name of the data set on the Hugging Face Hub; None = its publishers have not put it there.
    """

    words: str
    hub_id: str | None = None


_CIFAR = (
    "none stated by its authors, who ask to be cited (Krizhevsky 2009). Its images come from 80 Million Tiny Images, "
    "which was collected from the web and withdrawn in 2020"
)
_IMAGENET = "ImageNet's terms of access: non-commercial research and education alone. The images belong to their owners"

# All of `peerlearn.data.published` but folders, whose licence only their owner knows.
LICENCES = {
    "digits": Licence(
        "CC BY 4.0, as the UCI repository states it for Optical Recognition of Handwritten Digits, of which "
        "scikit-learn has a part"
    ),
    **dict.fromkeys(
        ("fashion_mnist", "fashion_mnist_classes"),
        Licence("MIT, copyright 2017 Zalando SE", "zalando-datasets/fashion_mnist"),
    ),
    "cifar10": Licence(_CIFAR, "uoft-cs/cifar10"),
    "cifar100": Licence(_CIFAR, "uoft-cs/cifar100"),
    "cifar_fs": Licence(f"that of CIFAR-100, of which it is a division by classes: {_CIFAR}"),
    "stl10": Licence(
        "none stated by its authors, who ask to be cited (Coates et al. 2011). Its images come from ImageNet, whose "
        "terms of access are for non-commercial research and education"
    ),
    "tinyimagenet": Licence(f"none of its own; it is a part of ImageNet. {_IMAGENET}"),
    "imagenet": Licence(_IMAGENET, "ILSVRC/imagenet-1k"),
    "miniimagenet": Licence(f"none of its own; it is a part of ImageNet. {_IMAGENET}"),
    "tieredimagenet": Licence(f"none of its own; it is a part of ImageNet. {_IMAGENET}"),
    "omniglot": Licence("MIT, copyright 2015 Brenden Lake"),
    "characters": Licence(
        "that of the fonts that the characters were drawn from, which each font tells itself"
    ),
}
UNKNOWN = Licence("unknown: ask who gave you the images")


def licence_of(dataset: str) -> Licence:
    """The licence of a data set by its name in configs; `UNKNOWN` for folders of images and all other names."""
    return LICENCES.get(dataset, UNKNOWN)
