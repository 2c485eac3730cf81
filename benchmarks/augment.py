"""Two views of decoded 32x32 images on one core: MoCo's PIL pipeline against the batched tensors.

    python benchmarks/augment.py [--rounds 9] [--batch 512] [--output FILE]

The two alternate within one run, in turns of about equal length. Times are CPU seconds of one
thread. Both end in normalised float32 views. PIL's views are collated into batches as by a DataLoader.
"""

import argparse
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from benchmarks.image_rates import keep, moco_chain, report, two_views
from benchmarks.timing import alternate
from peerlearn.data.augment import distort, draw_view_parameters, normalise, resized_crop
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_SIZE = 32
_TENSOR_BATCHES = 10


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


def _measure(recipe: Augmentation, images: Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a batch, round by round, after one round to warm up."""
    chain = moco_chain(recipe, _SIZE, _MEAN, _STD)
    pil_images = [to_pil_image(image) for image in images]
    epochs = count()

    def tensors() -> None:
        for _ in range(_TENSOR_BATCHES):
            _tensor_views(recipe, images, next(epochs))

    rivals = {"PIL, as MoCo": lambda: two_views(chain, pil_images), "batched tensors": tensors}
    alternate(rivals, 1)
    pil_seconds, tensor_seconds = alternate(rivals, rounds).values()
    each = [seconds / _TENSOR_BATCHES for seconds in tensor_seconds]
    return {"PIL, as MoCo": pil_seconds, "batched tensors": each}


def main() -> None:
    """Print rates and ratios by recipe, and write them to a file where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A process that trains has freed large tensors before, and from then on glibc keeps freed
    # memory. A bare one would hand every temporary back to the kernel and fault it in again.
    torch.ones(30 * 2**18)

    # Smooth noise: either way takes the same time for any content.
    coarse = torch.rand(options.batch, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(coarse, (_SIZE, _SIZE), mode="bilinear")
    images = (smooth * 255).to(torch.uint8)
    measured = [
        report(
            _measure(AUGMENTATIONS[name], images, options.rounds),
            options.batch,
            title=f"two views of 32 x 32, {name}",
        )
        for name in ("moco_v2", "moco_cifar")
    ]
    if options.output:
        keep(options.output, "augment", measured)


if __name__ == "__main__":
    main()
