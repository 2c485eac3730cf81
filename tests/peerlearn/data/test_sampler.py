"""Class-aware batches, against their rules counted in plain integers."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from peerlearn.counter_random import PERMUTATION, permutation
from peerlearn.data.sampler import Coverage, EpochOrder, class_aware, coverage, shuffled
from peerlearn.errors import UserError

SEEDS = st.integers(-(2**63), 2**63 - 1)
EPOCHS = st.integers(0, 2**40)


@st.composite
def label_sets(draw: st.DrawFn, classes: int = 7, most: int = 12) -> torch.Tensor:
    """Labels in any order, with gaps, classes of one image, and images without a label."""
    numbers = draw(st.lists(st.integers(0, 30), min_size=1, max_size=classes, unique=True))
    sizes = st.one_of(st.just(1), st.integers(1, most))
    labels = [number for number in numbers for _ in range(draw(sizes))]
    labels += [-1] * draw(st.integers(0, 3))
    return torch.tensor(draw(st.permutations(labels)))


@st.composite
def epochs(draw: st.DrawFn) -> tuple[torch.Tensor, int, EpochOrder]:
    """Labels, m, and an epoch of them; from two groups for each class in a batch to a batch of one group."""
    labels, images_per_class = draw(label_sets()), draw(st.integers(1, 4))
    batch_size = images_per_class * draw(st.integers(1, 14))
    # Many steps of few images: the labels only have to be many in number.
    labels = torch.cat((labels, torch.full((batch_size * draw(st.integers(1, 12)),), -1)))
    order = class_aware(
        labels,
        batch_size=batch_size,
        images_per_class=images_per_class,
        seed=draw(SEEDS),
        epoch=draw(EPOCHS),
    )
    assert order.index.shape == order.draw.shape == (len(labels) // batch_size, batch_size)
    assert order.index.dtype == order.draw.dtype == torch.int64
    return labels, images_per_class, order


def classes_of_groups(
    labels: torch.Tensor, images_per_class: int, order: EpochOrder
) -> list[list[int]]:
    """The class of each group of each batch; a group has only one."""
    groups = labels[order.index].unflatten(1, (-1, images_per_class))
    assert (groups == groups[:, :, :1]).all()
    return groups[:, :, 0].tolist()


@given(epochs())
def test_a_batch_has_groups_of_distinct_classes_or_of_all_classes_equally(epoch):
    labels, m, order = epoch
    classes = set(labels.tolist()) - {-1}
    for batch in classes_of_groups(labels, m, order):
        counts = Counter(batch)
        assert set(counts) <= classes
        assert {counts[number] for number in classes} <= {
            len(batch) // len(classes),
            -(-len(batch) // len(classes)),
        }


@given(epochs())
def test_classes_come_equally_often(epoch):
    labels, m, order = epoch
    batches = classes_of_groups(labels, m, order)
    for steps in {len(batches), len(batches) // 2}:
        counts = Counter(number for batch in batches[:steps] for number in batch)
        numbers = [counts[number] for number in set(labels.tolist()) - {-1}]
        assert max(numbers) - min(numbers) <= 1


@given(epochs())
def test_the_deck_is_dealt_permutation_by_permutation_with_classes_in_hand_last(epoch):
    labels, m, order = epoch
    count = len(set(labels.tolist()) - {-1})
    batches = classes_of_groups(labels, m, order)
    others = len(batches[0]) % count
    deck = [number for batch in batches for number in batch[len(batch) - others :]]
    permutations = [deck[first : first + count] for first in range(0, len(deck), count)]
    assert all(len(set(part)) == len(part) for part in permutations)
    for number, (before, after) in enumerate(pairwise(permutations), 1):
        in_hand = number * count % others
        if len(after) == count:
            assert set(after[count - in_hand :]) == set(before[count - in_hand :])


@given(epochs())
def test_a_class_is_walked_through_before_an_image_comes_again(epoch):
    labels, m, order = epoch
    sizes = Counter(labels.tolist())
    groups: dict[int, list[list[int]]] = {}
    for group in order.index.view(-1, m).tolist():
        groups.setdefault(int(labels[group[0]]), []).append(group)
    for number, of_class in groups.items():
        size = sizes[number]
        if size < m:
            for group in of_class:
                assert group == [group[i % size] for i in range(m)]
                assert len(set(group)) == size
            continue
        per_walk = size // m
        for first in range(0, len(of_class), per_walk):
            walk = [image for group in of_class[first : first + per_walk] for image in group]
            assert len(set(walk)) == len(walk)


@given(epochs())
def test_draw_numbers_count_the_draws_before(epoch):
    _, _, order = epoch
    seen: Counter[int] = Counter()
    for image, draw in zip(
        order.index.flatten().tolist(), order.draw.flatten().tolist(), strict=True
    ):
        assert draw == seen[image]
        seen[image] += 1


@settings(max_examples=50)
@given(
    labels=label_sets(),
    m=st.integers(1, 4),
    groups=st.integers(1, 6),
    first=st.tuples(SEEDS, EPOCHS),
    second=st.tuples(SEEDS, EPOCHS),
)
def test_an_epoch_is_a_function_of_its_counters_and_no_other(labels, m, groups, first, second):
    labels = torch.cat((labels, torch.arange(40).repeat(4)))

    def drawn(counters: tuple[int, int]) -> EpochOrder:
        seed, epoch = counters
        return class_aware(
            labels, batch_size=m * groups, images_per_class=m, seed=seed, epoch=epoch
        )

    order = drawn(first)
    torch.manual_seed(0)
    assert all(map(torch.equal, order, drawn(first)))
    assert torch.equal(order.index, drawn(second).index) == (first == second)


@pytest.mark.parametrize("groups", [20, 40])
def test_every_seed_and_epoch_has_classes_and_images_in_an_order_of_their_own(groups):
    """From a deck and in rounds of 40 classes."""
    labels = torch.arange(400) % 40
    classes, images = set(), set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        order = class_aware(
            labels, batch_size=2 * groups, images_per_class=2, seed=seed, epoch=epoch
        )
        classes |= {tuple(batch) for batch in labels[order.index].tolist()}
        # The images of a class in the order in which they come.
        images |= {tuple(order.index[labels[order.index] == number].tolist()) for number in (0, 1)}
    assert len(classes) == 4 * len(order.index)
    assert len(images) == 8


def test_an_epoch_is_pinned_so_that_no_refactoring_changes_runs():
    labels = torch.tensor([0, 0, 0, 5, 5, 7, 7, 7, 7, -1, 8, 8, 5, 0, 7, -1])
    order = class_aware(labels, batch_size=6, images_per_class=2, seed=3, epoch=1)
    assert order.index.tolist() == [[11, 10, 13, 2, 3, 4], [6, 14, 0, 1, 10, 11]]
    assert order.draw.tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    few = class_aware(labels.clamp_max(5), batch_size=8, images_per_class=2, seed=3, epoch=1)
    assert few.index.tolist() == [[6, 14, 13, 2, 3, 4, 0, 1], [1, 2, 7, 11, 12, 10, 13, 0]]


def test_groups_of_a_small_class_repeat_its_images_with_rising_draw_numbers():
    labels = torch.tensor([4, 4, -1, -1, -1, -1, -1, -1, -1, -1])
    order = class_aware(labels, batch_size=5, images_per_class=5, seed=0, epoch=0)
    first, second = order.index[0, :2].tolist()
    assert {first, second} == {0, 1}
    assert order.index[0].tolist() == [first, second, first, second, first]
    assert order.draw[0].tolist() == [0, 0, 1, 1, 2]


def test_classes_and_images_are_drawn_evenly_over_the_epochs():
    """First batches of 2 groups of 2 from 4 classes of 3 images: every combination is as likely."""
    labels = torch.arange(12) % 4
    rows = [
        class_aware(labels, batch_size=4, images_per_class=2, seed=1, epoch=epoch).index
        for epoch in range(1500)
    ]
    for step in range(3):
        batches = torch.stack([row[step] for row in rows])
        # Ordered pairs of distinct classes, and ordered pairs of distinct images of the first.
        classes = labels[batches[:, ::2]]
        pairs = Counter(map(tuple, classes.tolist()))
        assert len(pairs) == 12
        assert stats.chisquare(list(pairs.values())).pvalue > 1e-3
        images = Counter(map(tuple, (batches[:, :2] // 4).tolist()))
        assert len(images) == 6
        assert stats.chisquare(list(images.values())).pvalue > 1e-3


def test_walks_of_an_epoch_have_orders_of_their_own():
    labels = torch.cat((torch.zeros(20, dtype=torch.int64), torch.full((80,), -1)))
    order = class_aware(labels, batch_size=20, images_per_class=1, seed=0, epoch=0)
    assert len({tuple(walk) for walk in order.index.tolist()}) == 5
    assert order.draw.tolist() == [[walk] * 20 for walk in range(5)]


@given(labels=label_sets(), m=st.integers(1, 3), groups=st.integers(1, 5), seed=SEEDS)
def test_only_the_order_of_the_classes_numbers_counts(labels, m, groups, seed):
    arguments = {"batch_size": m * groups, "images_per_class": m, "seed": seed, "epoch": 0}
    spread = torch.where(labels >= 0, labels * 3 + 5, -7)
    assert torch.equal(
        class_aware(labels, **arguments).index, class_aware(spread, **arguments).index
    )


@given(images=st.integers(0, 60), batch_size=st.integers(1, 9), seed=SEEDS, epoch=EPOCHS)
def test_shuffled_is_the_permutation_cut_into_batches(images, batch_size, seed, epoch):
    order = shuffled(images, batch_size=batch_size, seed=seed, epoch=epoch)
    expected = permutation(images, PERMUTATION, seed, epoch).tolist()
    assert order.index.shape == (images // batch_size, batch_size)
    assert order.index.flatten().tolist() == expected[: images // batch_size * batch_size]
    assert order.draw.shape == order.index.shape
    assert not order.draw.any()


@pytest.mark.parametrize(
    ("batch_size", "m", "message"),
    [
        (5, 2, "batch_size 5 does not hold whole groups of images_per_class 2"),
        (2, 4, "batch_size 2 does not hold whole groups of images_per_class 4"),
        (4, 0, "images_per_class 0"),
        (0, 2, "batch_size 0"),
    ],
)
def test_batches_without_whole_groups_are_refused(batch_size, m, message):
    with pytest.raises(UserError, match=message):
        class_aware(
            torch.zeros(9).long(), batch_size=batch_size, images_per_class=m, seed=0, epoch=0
        )


def test_images_without_any_label_are_refused():
    with pytest.raises(UserError, match="no image has one"):
        class_aware(torch.full((9,), -1), batch_size=2, images_per_class=2, seed=0, epoch=0)


def test_coverage_counts_draws_of_images_and_classes():
    labels = torch.tensor([6, 6, 2, 2, 2, -1])
    order = EpochOrder(torch.tensor([[0, 1, 2], [0, 1, 4]]), torch.zeros(2, 3))
    assert coverage(order, labels) == Coverage(80.0, 2, 2, 4)
    only_one = EpochOrder(torch.tensor([[2, 2, 2, 4]]), torch.zeros(1, 4))
    assert coverage(only_one, labels) == Coverage(40.0, 3, 0, 4)


def test_an_epoch_of_cifar_100_draws_what_shuffling_would():
    """64 classes x 2: only the last incomplete batch is left out, and no image comes twice."""
    labels = torch.arange(50_000) % 100
    order = class_aware(labels, batch_size=128, images_per_class=2, seed=0, epoch=0)
    assert coverage(order, labels) == Coverage(99.84, 1, 498, 500)
