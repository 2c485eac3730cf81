"""Stratified subsets of labelled images, drawn by counters: the same on every machine and at every number of ranks.

The images of a class are put in a random order of (seed, image), and a subset takes the first of them. So a smaller
subset is part of every larger one of the same seed.

Dimensions: N images.
"""

import torch
from torch import Tensor

from peerlearn.counter_random import HELD_OUT, SUBSET, random_bits
from peerlearn.errors import UserError


def few_shots(labels: Tensor, shots: int, *, seed: int) -> Tensor:
    """``shots`` images of every class.

    Args:
        labels: class of each image, (N,) integers.
        shots: number of images per class.
        seed: seed of the subset.

    Returns:
        int64 indices into ``labels``, rising.

    Raises:
        UserError: a class has fewer images.
    """
    rank, count = _places(labels, SUBSET, seed)
    if int(count.min()) < shots:
        poorest = int(labels[count.argmin()])
        raise UserError(
            f"data.shots {shots}: class {poorest} has only {int(count.min())} images to draw them from"
        )
    return (rank < shots).nonzero()[:, 0]


def stratified_share(labels: Tensor, percent: float, *, seed: int) -> Tensor:
    """``percent`` of the images of every class, rounded, but at least one image.

    Args:
        labels: class of each image, (N,) integers.
        percent: share of the images, within (0, 100].
        seed: seed of the subset.

    Returns:
        int64 indices into ``labels``, rising.
    """
    rank, count = _places(labels, SUBSET, seed)
    return (rank < _share(count, percent).clamp_min(1)).nonzero()[:, 0]


def hold_out(labels: Tensor, percent: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split the images into a part for training and a held-out part, which has ``percent`` of every class.

    At least one image of each class is held out, unless the class has only one.

    Args:
        labels: class of each image, (N,) integers.
        percent: share of the images that is held out, within (0, 100).
        seed: seed of the split.

    Returns:
        int64 indices into ``labels``, rising: first the images for training, then the held-out ones.
    """
    rank, count = _places(labels, HELD_OUT, seed)
    chosen = rank < _share(count, percent).clamp_min(1).minimum(count - 1)
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def hold_out_images(labels: Tensor, images: int, *, seed: int) -> Tensor:
    """Choose images to hold out, of every class in proportion to its size.

    A class of n images gives n t, rounded, with one t for all classes (Sainte-Laguë's apportionment); between classes
    of equal claim, the random order decides. Fewer images of the same seed are part of more.

    Args:
        labels: class of each image, (N,) integers.
        images: number of images that are held out, at most N.
        seed: seed of the choice.

    Returns:
        int64 indices into ``labels``, rising.
    """
    rank, count = _places(labels, HELD_OUT, seed)
    order = random_bits(HELD_OUT, seed, torch.arange(len(labels))).argsort(stable=True)
    claim = (rank.double() + 0.5) / count
    return order[claim[order].argsort(stable=True)][:images].sort().values


def _share(count: Tensor, percent: float) -> Tensor:
    return (count.double() * percent / 100).round().long()


def _places(labels: Tensor, purpose: int, seed: int) -> tuple[Tensor, Tensor]:
    """The place of each image in the random order of its class, from 0, and the size of its class: both (N,)."""
    bits = random_bits(purpose, seed, torch.arange(len(labels)))
    order = bits.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    _, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first[which[order]]
    return rank, sizes[which]
