"""Stratified subsets: how many of each class, which, and that nobody else's images change them."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerlearn.data.subsets import few_shots, hold_out, hold_out_images, stratified_share
from peerlearn.errors import UserError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=120).map(torch.tensor)
SEEDS = st.integers(0, 3)


def counts(labels: torch.Tensor) -> dict[int, int]:
    return {int(label): int((labels == label).sum()) for label in labels.unique()}


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_shots_are_so_many_of_every_class(labels, seed, data):
    most = min(counts(labels).values())
    shots = data.draw(st.integers(1, most))
    index = few_shots(labels, shots, seed=seed)
    assert counts(labels[index]) == dict.fromkeys(counts(labels), shots)
    assert index.tolist() == sorted(set(index.tolist()))
    with pytest.raises(UserError, match=rf"data.shots {most + 1}: class \d has only {most} images"):
        few_shots(labels, most + 1, seed=seed)


@given(labels=LABELS, seed=SEEDS, percent=st.floats(0.1, 100))
def test_a_share_is_that_of_every_class_rounded_but_never_none(labels, seed, percent):
    found = counts(labels[stratified_share(labels, percent, seed=seed)])
    expected = {c: max(1, round(n * percent / 100)) for c, n in counts(labels).items()}
    assert found == expected


@given(labels=LABELS, seed=SEEDS, smaller=st.floats(0.1, 100), larger=st.floats(0.1, 100))
def test_a_smaller_share_is_part_of_a_larger_one(labels, seed, smaller, larger):
    smaller, larger = sorted((smaller, larger))
    few, many = (set(stratified_share(labels, p, seed=seed).tolist()) for p in (smaller, larger))
    assert few <= many


@given(labels=LABELS, seed=SEEDS, percent=st.floats(0.1, 99.9))
def test_what_is_held_out_and_what_is_left_are_all_images_once(labels, seed, percent):
    rest, held = hold_out(labels, percent, seed=seed)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(len(labels)))
    found = counts(labels[held])
    for label, size in counts(labels).items():
        expected = min(max(1, round(size * percent / 100)), size - 1)
        assert found.get(label, 0) == expected


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_held_out_images_are_of_every_class_in_proportion_to_its_size(labels, seed, data):
    """By Sainte-Laguë's rule: no class has a better claim, (2 s - 1) / 2 n, to an image than one that has it."""
    sizes = counts(labels)
    more = data.draw(st.integers(1, len(labels)))
    fewer = data.draw(st.integers(1, more))
    held = hold_out_images(labels, more, seed=seed).tolist()
    assert len(held) == more
    assert held == sorted(set(held))
    found = {c: counts(labels[held]).get(c, 0) for c in sizes}
    last = [Fraction(2 * found[c] - 1, 2 * sizes[c]) for c in sizes if found[c]]
    following = [Fraction(2 * found[c] + 1, 2 * sizes[c]) for c in sizes if found[c] < sizes[c]]
    assert not following or max(last) <= min(following)
    assert set(hold_out_images(labels, fewer, seed=seed).tolist()) <= set(held)


def test_classes_of_equal_size_share_the_rest_at_random():
    """In closed form: 7 of each of 5 classes, and 3 more of three of them, which are not always the first."""
    labels = torch.arange(5).repeat_interleave(20)
    extra = set()
    for seed in range(6):
        found = counts(labels[hold_out_images(labels, 38, seed=seed)])
        assert sorted(found.values()) == [7, 7, 8, 8, 8]
        extra.add(tuple(c for c in found if found[c] == 8))
    assert len(extra) > 1


def test_the_draw_is_random_and_of_the_seed():
    """Of 4000 images of a class each of the first and the second half has about half of 400 shots."""
    labels = torch.zeros(4000, dtype=torch.int64)
    index = few_shots(labels, 400, seed=0)
    assert 200 - 4 * 9.5 < int((index < 2000).sum()) < 200 + 4 * 9.5
    assert torch.equal(index, few_shots(labels, 400, seed=0))
    assert not torch.equal(index, few_shots(labels, 400, seed=1))


def test_what_is_held_out_does_not_follow_the_subset_of_the_same_seed():
    labels = torch.zeros(1000, dtype=torch.int64)
    drawn = set(stratified_share(labels, 50, seed=0).tolist())
    _, held = hold_out(labels, 50, seed=0)
    assert 250 - 4 * 11.2 < len(drawn & set(held.tolist())) < 250 + 4 * 11.2
