"""Stratified subsets of labelled images, drawn by counters: the same on every machine and at every number of ranks.

Within a class, images are in a random order of (seed, image); a subset is the first of them. So a smaller subset is
part of every larger one of the same seed.
"""

import torch
from torch import Tensor

from peerlearn.counter_random import HELD_OUT, SUBSET, random_bits
from peerlearn.errors import UserError


def few_shots(labels: Tensor, shots: int, *, seed: int) -> Tensor:
    """``shots`` images of every class.

    Args:
        labels: (N,) integers, the class of each image.

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
    """``percent`` of the images of every class, rounded, but at least one.

    Args:
        labels: (N,) integers, the class of each image.
        percent: within (0, 100].

    Returns:
        int64 indices into ``labels``, rising.
    """
    rank, count = _places(labels, SUBSET, seed)
    return (rank < _share(count, percent).clamp_min(1)).nonzero()[:, 0]


def hold_out(labels: Tensor, percent: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split the images into a part to train on and a part to choose by, ``percent`` of every class.

    At least one image of a class is held out, unless it has only one.

    Args:
        labels: (N,) integers, the class of each image.
        percent: within (0, 100).

    Returns:
        int64 indices into ``labels``, rising: those to train on, those held out.
    """
    rank, count = _places(labels, HELD_OUT, seed)
    chosen = rank < _share(count, percent).clamp_min(1).minimum(count - 1)
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def _share(count: Tensor, percent: float) -> Tensor:
    return (count.double() * percent / 100).round().long()


def _places(labels: Tensor, purpose: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each image's place in the random order of its class, counted from 0, and the size of that class: both (N,)."""
    bits = random_bits(purpose, seed, torch.arange(len(labels)))
    order = bits.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    _, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first[which[order]]
    return rank, sizes[which]
