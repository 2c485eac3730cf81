"""The images of each global batch of an epoch.

The order of an epoch is computed as a whole, as a function of (labels or their number, batch size, seed, epoch). So
training can resume at any step, and any number of ranks can share a batch.

Dimensions: N images, B global batch, C classes that have images, P groups per batch, m images per group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.counter_random import (
    CLASS_DECK,
    CLASS_ROUND,
    CLASS_WALK,
    PERMUTATION,
    permutation,
    random_bits,
)
from peerlearn.errors import UserError


class EpochOrder(NamedTuple):
    """The images of an epoch, one row for each step.

    Attributes:
        index: numbers of the images in the dataset, int64 (steps, B).
        draw: how often the epoch has drawn each image before, int64 (steps, B).
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    draw: Tensor


@dataclass(frozen=True)
class Sampler:
    """Which images the global batches of every epoch take.

    Attributes:
        batch_size: number of images in a global batch, B.
        steps: number of batches in an epoch.
        order: images of an epoch, by its number.
    """

    batch_size: int
    steps: int
    order: Callable[[int], EpochOrder]


class Coverage(NamedTuple):
    """How evenly an epoch draws the labelled images.

    Attributes:
        drawn_percent: share of the labelled images that are drawn at least once.
        most_draws: number of draws of the image that is drawn most often.
        fewest_of_class: number of draws from the class with the fewest draws.
        most_of_class: number of draws from the class with the most draws.
    """

    drawn_percent: float
    most_draws: int
    fewest_of_class: int
    most_of_class: int


def block_of(rank: int, world_size: int, *, batch_size: int) -> slice:
    """The part of every global batch that a rank takes.

    Raises:
        UserError: the ranks cannot share a batch evenly.
    """
    per_rank, left = divmod(batch_size, world_size)
    if left:
        raise UserError(
            f"batch_size {batch_size} cannot be shared by {world_size} ranks: "
            f"make it a multiple of {world_size}"
        )
    return slice(rank * per_rank, (rank + 1) * per_rank)


def shuffled(images: int, *, batch_size: int, seed: int, epoch: int) -> EpochOrder:
    """Images 0 .. images - 1 in a random order, each at most once. The last incomplete batch is dropped."""
    steps = images // batch_size
    order = permutation(images, PERMUTATION, seed, epoch)
    index = order[: steps * batch_size].view(steps, batch_size)
    return EpochOrder(index, torch.zeros_like(index))


def check_class_aware(labels: Tensor, *, batch_size: int, images_per_class: int) -> None:
    """Refuse labels and sizes that ``class_aware`` cannot draw from.

    Args:
        labels: as in ``class_aware``.
        batch_size: as in ``class_aware``.
        images_per_class: as in ``class_aware``.

    Raises:
        UserError: the batch does not hold whole groups, or no image has a label.
    """
    if images_per_class < 1 or batch_size < 1 or batch_size % images_per_class:
        raise UserError(
            f"batch_size {batch_size} does not hold whole groups of images_per_class {images_per_class}: "
            "make it a multiple"
        )
    if not bool((labels >= 0).any()):
        raise UserError(
            "images_per_class needs labels, and no image has one: choose labelled data, or leave it out"
        )


def class_aware(
    labels: Tensor, *, batch_size: int, images_per_class: int, seed: int, epoch: int
) -> EpochOrder:
    """Batches of P = B / m groups, each of m images of one class, side by side.

    This is the class-aware sampler of the MCL paper, section 3.3 (B / 2 classes, two images each), for any m. An epoch
    has N // B steps.

    Classes. If C >= P, the groups of a batch have P different classes. They come from a deck: random permutations of
    all classes, one after the other. If a permutation has fewer classes left than a batch needs, the next permutation
    follows; the classes already in the batch come last in it, so that no batch has a class twice. If C < P, every class
    has P // C groups in each batch, in random rounds of all classes, and the other P % C groups come from a deck.
    In both cases the classes' numbers of groups in an epoch differ by at most one, however many images they have.

    Images. Each class walks through its images in random order. A walk makes floor(n / m) groups of n images. So a
    group has no image twice, and no image comes again before the walk is over. The next walk has another order. A class
    with fewer than m images repeats them in turn within the group. An image that is drawn again has a higher draw
    number and so gets other views.

    Args:
        labels: class of each image, (N,) integers; an image with a negative label has no class and is never drawn.
        batch_size: number of images in a global batch, B.
        images_per_class: number of images in a group, m.
        seed: seed of the run.
        epoch: number of the epoch.

    Raises:
        UserError: as in ``check_class_aware``.
    """
    check_class_aware(labels, batch_size=batch_size, images_per_class=images_per_class)
    labelled = (labels >= 0).nonzero()[:, 0]
    _, of_class, sizes = labels[labelled].unique(return_inverse=True, return_counts=True)
    members = labelled[of_class.argsort(stable=True)]
    groups = _classes_of_groups(
        len(sizes),
        per_batch=batch_size // images_per_class,
        steps=len(labels) // batch_size,
        seed=seed,
        epoch=epoch,
    )
    index = _walked(
        groups.flatten(), members, sizes, images_per_class=images_per_class, seed=seed, epoch=epoch
    )
    return counted(index.view(-1, batch_size))


def counted(index: Tensor) -> EpochOrder:
    """The order of an epoch that takes these images, int64 (steps, B), some of them perhaps several times."""
    return EpochOrder(index, _times_before(index.flatten()).view_as(index))


def coverage(order: EpochOrder, labels: Tensor) -> Coverage:
    """Count the draws of an epoch of at least one step.

    Args:
        order: images of the epoch.
        labels: class of each image, (N,) integers; negative for images without a class.
    """
    labelled = labels >= 0
    draws = order.index.flatten().bincount(minlength=len(labels))
    _, of_class = labels[labelled].unique(return_inverse=True)
    of_classes = torch.zeros(int(of_class.max()) + 1, dtype=torch.int64)
    of_classes.index_add_(0, of_class, draws[labelled])
    return Coverage(
        drawn_percent=100 * int((draws[labelled] > 0).sum()) / int(labelled.sum()),
        most_draws=int(draws.max()),
        fewest_of_class=int(of_classes.min()),
        most_of_class=int(of_classes.max()),
    )


def _classes_of_groups(
    classes: int, *, per_batch: int, steps: int, seed: int, epoch: int
) -> Tensor:
    """The class of each group, numbered 0 .. C - 1: int64 (steps, P)."""
    rounds, others = divmod(per_batch, classes)
    step, number = torch.arange(steps)[:, None, None], torch.arange(rounds)[:, None]
    bits = random_bits(CLASS_ROUND, seed, epoch, step, number, torch.arange(classes))
    everyone = bits.argsort(dim=2, stable=True).flatten(1)
    dealt = _dealt(classes, per_batch=others, steps=steps, seed=seed, epoch=epoch)
    return torch.cat((everyone, dealt), dim=1)


def _dealt(classes: int, *, per_batch: int, steps: int, seed: int, epoch: int) -> Tensor:
    """Distinct classes for each batch from one deck: int64 (steps, per_batch), per_batch <= classes."""
    permutations = torch.arange(-(-steps * per_batch // classes))[:, None]
    bits = random_bits(CLASS_DECK, seed, epoch, permutations, torch.arange(classes))
    deck = bits.argsort(dim=1, stable=True)
    for number in range(1, len(deck)):
        in_hand = number * classes % per_batch
        if in_hand:
            held = torch.zeros(classes, dtype=torch.int8)
            held[deck[number - 1, classes - in_hand :]] = 1
            deck[number] = deck[number, held[deck[number]].argsort(stable=True)]
    return deck.flatten()[: steps * per_batch].view(steps, per_batch)


def _walked(
    groups: Tensor, members: Tensor, sizes: Tensor, *, images_per_class: int, seed: int, epoch: int
) -> Tensor:
    """The images of the groups, one group after the other: int64 (groups * m,).

    Args:
        groups: class of each group, (groups,).
        members: numbers of the labelled images, class by class.
        sizes: number of images of each class, (C,).
        images_per_class: number of images in a group, m.
        seed: seed of the run.
        epoch: number of the epoch.
    """
    per_walk = (sizes // images_per_class).clamp_min(1)
    walks = -(-groups.bincount(minlength=len(sizes)) // per_walk)
    # The walks of all classes one after the other. Each walk is first in the order of the members; `order` shuffles it.
    of_class = torch.arange(len(sizes)).repeat_interleave(walks * sizes)
    starts = (walks * sizes).cumsum(0) - walks * sizes
    within = torch.arange(len(of_class)) - starts[of_class]
    walk, position = within // sizes[of_class], within % sizes[of_class]
    image = members[(sizes.cumsum(0) - sizes)[of_class] + position]
    order = random_bits(CLASS_WALK, seed, epoch, walk, image).argsort(stable=True)
    order = order[((walks.cumsum(0) - walks)[of_class] + walk)[order].argsort(stable=True)]

    turn, size = _times_before(groups), sizes[groups]
    start = starts[groups] + turn // per_walk[groups] * size
    place = (turn % per_walk[groups] * images_per_class)[:, None] + torch.arange(images_per_class)
    # The remainder matters only for a class with fewer than m images, which repeats them.
    return image[order][start[:, None] + place % size[:, None]].flatten()


def _times_before(values: Tensor) -> Tensor:
    """How often each value, (n,) integers from 0 on, stands earlier in the list: int64 (n,)."""
    order, counts = values.argsort(stable=True), values.bincount()
    times = torch.empty_like(values)
    times[order] = torch.arange(len(values)) - (counts.cumsum(0) - counts)[values[order]]
    return times
