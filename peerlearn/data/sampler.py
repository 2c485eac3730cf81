"""Which images make up each global batch of an epoch.

An epoch's order is computed whole, as a function of (labels or their number, batch size, seed, epoch): it can be taken
up at any step and cut among any number of ranks.

Dimension letters: N images, B global batch, C classes that have images, P groups per batch, m images per group.
"""

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

    index: int64 (steps, B), numbers in the dataset.
    draw: int64 (steps, B), how often the epoch has drawn that image before.
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    draw: Tensor


class Coverage(NamedTuple):
    """How evenly an epoch draws the labelled images.

    drawn_percent: of the labelled images, those drawn at least once.
    most_draws: of one image.
    fewest_of_class, most_of_class: images drawn of one class, each counted as often as it is drawn.
    """

    drawn_percent: float
    most_draws: int
    fewest_of_class: int
    most_of_class: int


def shuffled(images: int, *, batch_size: int, seed: int, epoch: int) -> EpochOrder:
    """Images 0 .. images - 1 in a random order, each at most once; the last incomplete batch is dropped."""
    steps = images // batch_size
    order = permutation(images, PERMUTATION, seed, epoch)
    index = order[: steps * batch_size].view(steps, batch_size)
    return EpochOrder(index, torch.zeros_like(index))


def check_class_aware(labels: Tensor, *, batch_size: int, images_per_class: int) -> None:
    """Refuse what ``class_aware`` cannot draw from; arguments as there.

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

    The class-aware sampler of the MCL paper, section 3.3 (B / 2 classes, two images each), for any m. An epoch has
    N // B steps.

    Classes: where C >= P, the groups of a batch are of P classes, drawn from a deck of random permutations of all
    classes, one after the other. Where fewer are left of a permutation than a batch needs, the next one follows, in
    which the classes still in hand come last: no batch has a class twice. Where C < P, every class has P // C groups in
    each batch, in random rounds of all classes, and the P % C groups that remain are drawn from such a deck. Either way
    the classes' numbers of groups in an epoch differ by at most one, however many images they have.

    Images: those of a class are walked in random order. A walk takes floor(n / m) groups of the n images, so that a
    group has no image twice and no image comes again before the walk is over; the next walk has another order. A class
    of fewer than m images repeats them in turn within the group. An image drawn again has a higher draw number, so its
    view is another.

    Args:
        labels: (N,) integers, the class of each image; an image with a negative label has none and is never drawn.
        batch_size: B.
        images_per_class: m.

    Raises:
        UserError: as ``check_class_aware``.
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
    return EpochOrder(index.view(-1, batch_size), _times_before(index).view(-1, batch_size))


def coverage(order: EpochOrder, labels: Tensor) -> Coverage:
    """Count what an epoch of at least one step draws of the images with these labels, (N,), negative for none."""
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

    ``groups`` holds the class of each, ``members`` the images class by class, ``sizes`` (C,) their numbers.
    """
    per_walk = (sizes // images_per_class).clamp_min(1)
    walks = -(-groups.bincount(minlength=len(sizes)) // per_walk)
    # All walks of all classes, one after the other, each of them first in the order of the members.
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
    # Only a class of fewer than m images comes round again.
    return image[order][start[:, None] + place % size[:, None]].flatten()


def _times_before(values: Tensor) -> Tensor:
    """How often each of the values, (n,) integers from 0 on, came earlier: int64 (n,)."""
    order, counts = values.argsort(stable=True), values.bincount()
    times = torch.empty_like(values)
    times[order] = torch.arange(len(values)) - (counts.cumsum(0) - counts)[values[order]]
    return times
