"""Two views of decoded 32x32 images on one core: MoCo's PIL pipeline against the batched tensors.

    python benchmarks/augment.py [--rounds 9] [--batch 512]

The two alternate within one run, in turns of about equal length. Times are CPU seconds of one
thread. Both end in normalised float32 views. PIL's views are collated into batches as by a DataLoader.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from peerlearn.data.augment import (
    distort,
    draw_view_parameters,
    normalise,
    resized_crop,
)
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_SIZE = 32
_TENSOR_BATCHES = 10


class _PilBlur:
    """The blur of MoCo v2 (moco/loader.py)."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def _pil_pipeline(recipe: Augmentation) -> transforms.Compose:
    """The torchvision v1 chain of main_moco.py and of the CIFAR-10 notebook, for these recipes."""
    jitter = transforms.ColorJitter(*recipe.jitter)
    steps = [
        transforms.RandomResizedCrop(_SIZE, scale=recipe.crop_scale),
        transforms.RandomApply([jitter], p=recipe.jitter_probability),
        transforms.RandomGrayscale(p=recipe.grayscale_probability),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(_MEAN, _STD),
    ]
    if recipe.blur_probability:
        blur = transforms.RandomApply([_PilBlur(recipe.blur_sigma)], p=recipe.blur_probability)
        steps.insert(3, blur)
    return transforms.Compose(steps)


def _pil_views(pipeline: transforms.Compose, images: list[Image.Image]) -> list[Tensor]:
    views = [[pipeline(image), pipeline(image)] for image in images]
    return [torch.stack(view) for view in zip(*views, strict=True)]


def _tensor_views(recipe: Augmentation, images: Tensor, epoch: int) -> list[Tensor]:
    index, draw = torch.arange(len(images)), torch.zeros(len(images), dtype=torch.int64)
    views = []
    for view in range(2):
        parameters = draw_view_parameters(
            recipe,
            seed=0,
            epoch=epoch,
            index=index,
            draw=draw,
            view=view,
            height=_SIZE,
            width=_SIZE,
        )
        crops = resized_crop(images, parameters.box, _SIZE)
        views.append(normalise(distort(crops, parameters, recipe), _MEAN, _STD))
    return views


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _measure(
    recipe: Augmentation, images: Tensor, *, rounds: int, batches: int
) -> tuple[list[float], list[float]]:
    """CPU seconds per batch of PIL and of the tensors, round by round, after one round to warm up."""
    pipeline = _pil_pipeline(recipe)
    pil_images = [transforms.functional.to_pil_image(image) for image in images]

    def pil() -> None:
        _pil_views(pipeline, pil_images)

    def tensors() -> None:
        for epoch in range(batches):
            _tensor_views(recipe, images, epoch)

    seconds = [(_cpu_seconds(pil), _cpu_seconds(tensors) / batches) for _ in range(rounds + 1)]
    pil_seconds, tensor_seconds = zip(*seconds[1:], strict=True)
    return list(pil_seconds), list(tensor_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A process that trains has freed large tensors before, and from then on glibc keeps freed
    # memory. A bare one would hand every temporary back to the kernel and fault it in again.
    torch.ones(30 * 2**18)

    # Smooth noise: either way takes the same time for any content.
    coarse = torch.rand(options.batch, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(coarse, (_SIZE, _SIZE), mode="bilinear")
    images = (smooth * 255).to(torch.uint8)
    for name in ("moco_cifar", "moco_v2"):
        pil, tensors = _measure(
            AUGMENTATIONS[name], images, rounds=options.rounds, batches=_TENSOR_BATCHES
        )
        ratio = statistics.median(pil) / statistics.median(tensors)
        paired = statistics.median(p / t for p, t in zip(pil, tensors, strict=True))
        print(
            f"{name}: PIL {options.batch / statistics.median(pil):.0f} images/s, "
            f"tensors {options.batch / statistics.median(tensors):.0f} images/s; ratio of medians "
            f"{ratio:.1f}, of the fastest {min(pil) / min(tensors):.1f}, median of ratios "
            f"{paired:.1f} (batch {options.batch}, {options.rounds} rounds)"
        )


if __name__ == "__main__":
    main()
