"""The images of each global batch in detection training.

Steps are counted over the whole training, without epochs. The images of a step are a function of (sizes of the images,
batch size, seed, step) and of nothing else.

Dimensions: N images, B global batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.counter_random import DETECTION_ORDER, random_bits


class DetectionOrder(NamedTuple):
    """The images of some steps, one row for each.

    Attributes:
        index: numbers of the images in the dataset, int64 (steps, B).
        draw: how often each image was drawn before, int64 (steps, B).
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    draw: Tensor


def grouped_by_aspect(
    sizes: Tensor, *, batch_size: int, seed: int, start_step: int, stop_step: int
) -> DetectionOrder:
    """The batches of steps start_step .. stop_step - 1, each of images of one orientation.

    Random permutations of all images follow each other without end. As in Detectron2's AspectRatioGroupedDataset, an
    image waits in one of two groups, that of wider images (width > height) or that of the rest, and a group is a batch
    as soon as it is full. No image is lost: what waits comes later.

    NOTE: Detectron2 groups the images of each rank, so that a step may join batches of both orientations. Here the
    global batch has one, and the number of ranks does not matter.

    Args:
        sizes: width and height of each image, (N, 2), N > 0.
        batch_size: number of images in a global batch, B.
        seed: seed of the run.
        start_step: number of the first step, from 0.
        stop_step: number after the last step.
    """
    if not 0 <= start_step <= stop_step:
        raise ValueError(f"steps {start_step}..{stop_step} are no range from 0 on")
    images = len(sizes)
    # Whatever the orientations are, these fill all batches: B - 1 images may be left waiting in each group.
    draws = stop_step * batch_size + 2 * (batch_size - 1)
    permutations = torch.arange(-(-draws // images))
    bits = random_bits(DETECTION_ORDER, seed, permutations[:, None], torch.arange(images))
    index = bits.argsort(dim=1, stable=True).flatten()
    wide = (sizes[:, 0] > sizes[:, 1])[index]
    batches = torch.cat([_filled(wide, batch_size), _filled(~wide, batch_size)])
    # A batch is full with its last image.
    batches = batches[batches[:, -1].argsort()][start_step:stop_step]
    return DetectionOrder(index[batches], batches // images)


def _filled(members: Tensor, batch_size: int) -> Tensor:
    """The places of a group's members in the stream of images, one row for each whole batch."""
    places = members.nonzero()[:, 0]
    batches = len(places) // batch_size
    return places[: batches * batch_size].view(batches, batch_size)
