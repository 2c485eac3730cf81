"""What the benchmarks of views share: the chain of the MoCo repository, and how rates are printed and kept."""

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from benchmarks.timing import write_results
from peerlearn.data.recipes import Augmentation


class _PilBlur:
    """The blur of MoCo v2 (moco/loader.py)."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def moco_chain(
    recipe: Augmentation, size: int, mean: Sequence[float], std: Sequence[float]
) -> transforms.Compose:
    """The torchvision v1 chain of main_moco.py and of the CIFAR-10 notebook, for these recipes."""
    jitter = transforms.ColorJitter(*recipe.jitter)
    steps = [
        transforms.RandomResizedCrop(size, scale=recipe.crop_scale),
        transforms.RandomApply([jitter], p=recipe.jitter_probability),
        transforms.RandomGrayscale(p=recipe.grayscale_probability),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    if recipe.blur_probability:
        blur = transforms.RandomApply([_PilBlur(recipe.blur_sigma)], p=recipe.blur_probability)
        steps.insert(3, blur)
    return transforms.Compose(steps)


def two_views(chain: transforms.Compose, images: Sequence[Image.Image]) -> list[Tensor]:
    """Two views of each image, collated as by a DataLoader."""
    views = [[chain(image), chain(image)] for image in images]
    return [torch.stack(view) for view in zip(*views, strict=True)]


def report(seconds: Mapping[str, Sequence[float]], images: int, *, title: str) -> dict[str, Any]:
    """Print rates and their ratios to the first rival's, and return them for a result file.

    Args:
        seconds: CPU seconds of each rival in each round, for so many images.
        images: number of images in a call.
        title: what was measured.
    """
    first = next(iter(seconds))
    print(f"{title} ({len(seconds[first])} rounds, batch {images}, one thread)")
    rivals: dict[str, Any] = {}
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(seconds[first], each, strict=True)]
        rivals[name] = {
            "images_per_second": round(images / statistics.median(each), 1),
            "ratio_median_of_rounds": round(statistics.median(ratios), 2),
            "ratio_least": round(min(ratios), 2),
            "ratio_most": round(max(ratios), 2),
            "ratio_of_fastest": round(min(seconds[first]) / min(each), 2),
            "seconds": [round(s, 5) for s in each],
        }
        found = rivals[name]
        print(
            f"  {name:44} {found['images_per_second']:8.0f} images/s   x {found['ratio_median_of_rounds']:5.2f} "
            f"({found['ratio_least']:.2f} .. {found['ratio_most']:.2f}; fastest {found['ratio_of_fastest']:.2f})"
        )
    return {"title": title, "images": images, "rounds": len(seconds[first]), "rivals": rivals}


def keep(file: Path, benchmark: str, measured: Sequence[Mapping[str, Any]]) -> None:
    """Write a result file."""
    versions = {"torchvision": torchvision.__version__, "pillow": PIL.__version__}
    write_results(file, benchmark, measured, **versions)
