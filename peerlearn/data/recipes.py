"""Recipes of random views: what is done to an image, by which chances and how strongly. Nothing here needs torch."""

from dataclasses import dataclass, fields, replace
from typing import Any

_PROBABILITIES = [
    f"{name}_probability" for name in ("flip", "jitter", "grayscale", "blur", "solarize")
]
# Fields that count where the probability is above 0.
SWITCHED_BY = {
    "jitter": "jitter_probability",
    "grayscale_first": "grayscale_probability",
    "blur_sigma": "blur_probability",
    "solarize_threshold": "solarize_probability",
}


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A recipe of random views.

    Attributes:
        crop_scale: range of the crop's share of the image area.
        crop_ratio: range of the crop's width divided by its height.
        crop_padding: largest shift of the crop in pixels of the image. Where it is positive, the crop is as large as
            the image, ``crop_scale`` and ``crop_ratio`` do not count, and what lies outside the image is black.
        centred: whether the crop is the largest centred square, and the other keys of the crop do not count.
        flip_probability: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation and hue, with the meaning of torchvision's ColorJitter.
        jitter_probability: probability of the jitter.
        grayscale_probability: probability of greying.
        grayscale_first: whether greying comes before the jitter instead of after it.
        blur_probability: probability of the blur.
        blur_sigma: range of the blur's sigma in pixels of the finished crop.
        solarize_probability: probability of the solarisation, which comes last: bright values are inverted.
        solarize_threshold: least value that is inverted; 1 is white.

    Raises:
        ValueError: a value lies outside its range; probabilities lie in [0, 1].
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    centred: bool = False
    flip_probability: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.0
    grayscale_probability: float = 0.0
    grayscale_first: bool = False
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in (*_PROBABILITIES, "solarize_threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must rise within (0, 1], got {list(self.crop_scale)}")
        # Within these ranges all that is computed of them is exact enough, and finite.
        for name, least, most in (("crop_ratio", 0.1, 10), ("blur_sigma", 0.01, 1000)):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name} must rise within [{least}, {most}], got {[low, high]}")
        if not 0 <= self.crop_padding <= 1000:
            raise ValueError(f"crop_padding must lie in [0, 1000], got {self.crop_padding}")
        if min(self.jitter) < 0 or max(self.jitter) > 100 or self.jitter[-1] > 0.5:
            raise ValueError(
                f"jitter must lie in [0, 100], hue in [0, 0.5], got {list(self.jitter)}"
            )

    def counts(self, name: str) -> bool:
        """Whether a field has an effect with the values of the others."""
        if name in ("crop_scale", "crop_ratio"):
            return not (self.centred or self.crop_padding)
        if name == "crop_padding":
            return not self.centred
        if name == "jitter_probability":
            return any(self.jitter)
        return name not in SWITCHED_BY or getattr(self, SWITCHED_BY[name]) > 0

    def in_words(self) -> str:
        """What the recipe does: its fields and their values, without those that do nothing."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(
            f"{name} {_in_words(value)}"
            for name, value in values.items()
            if self.counts(name) and (value or name == "solarize_threshold")
        )


def _in_words(value: Any) -> str:
    if value is True:
        return "true"
    return " ".join(f"{each:.4g}" for each in (value if isinstance(value, tuple) else [value]))


_BYOL = Augmentation(
    crop_scale=(0.08, 1.0),
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=1.0,
)

AUGMENTATIONS: dict[str, Augmentation] = {
    # He et al., "Momentum Contrast", arXiv 1911.05722; facebookresearch/moco main_moco.py.
    "moco_v1": Augmentation(
        jitter=(0.4, 0.4, 0.4, 0.4),
        jitter_probability=1.0,
        grayscale_probability=0.2,
        grayscale_first=True,
    ),
    # Chen et al., arXiv 2003.04297; facebookresearch/moco main_moco.py --aug-plus.
    "moco_v2": Augmentation(
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
    ),
    # facebookresearch/moco colab/moco_cifar10_demo.ipynb; the crop is torchvision's default.
    "moco_cifar": Augmentation(
        crop_scale=(0.08, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_probability=0.8,
        grayscale_probability=0.2,
    ),
    # Grill et al., arXiv 2006.07733, appendix B: the first of two views that are drawn unlike each other.
    "byol": _BYOL,
    # The crop and flip of MoCo v1 alone, for grey images.
    "crop_flip": Augmentation(),
    # Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993, section 4.1, as is
    # usual for CIFAR; the padding is black, that of torchvision's RandomCrop(32, padding=4).
    "supervised_cifar": Augmentation(crop_padding=4),
    # pytorch/examples imagenet/main.py: RandomResizedCrop(224), RandomHorizontalFlip.
    "supervised_imagenet": Augmentation(crop_scale=(0.08, 1.0)),
    # yinboc/prototypical-network-pytorch mini_imagenet.py: Resize(84), CenterCrop(84).
    "none": Augmentation(centred=True, flip_probability=0.0),
}

# The second view of those recipes whose two views differ.
SECOND_VIEWS: dict[str, Augmentation] = {
    "byol": replace(_BYOL, blur_probability=0.1, solarize_probability=0.2),
}
