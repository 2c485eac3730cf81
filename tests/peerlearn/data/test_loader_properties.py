"""The loader as a sampler, against an order worked out in plain integers."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewBatch, ViewLoader
from peerlearn.data.recipes import AUGMENTATIONS, Augmentation
from peerlearn.errors import UserError
from tests.view_loaders import HAS_FFCV, view_loader

BACKENDS = st.sampled_from(["memory", "folder", *(["ffcv"] if HAS_FFCV else [])])
SEEDS = st.integers(-(2**63), 2**63 - 1)
EPOCHS = st.integers(0, 2**40)
PERMUTATION = 2
# Without hues, which blow up the rounding of nearly grey pixels.
RECIPE = Augmentation(
    jitter=(0.4, 0.4, 0.0, 0.0),
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.5,
)


def shuffled(length: int, seed: int, epoch: int) -> list[int]:
    """The images sorted by SplitMix64's mix of (stream, seed, epoch, image), as signed numbers."""

    def mixed(image: int) -> int:
        state = 4
        for word in (PERMUTATION, seed, epoch, image):
            state = ((state + 0x9E3779B97F4A7C15) ^ word) % 2**64
            state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
            state ^= state >> 31
        return state - 2**64 if state >= 2**63 else state

    return sorted(range(length), key=mixed)


@cache
def numbered(length: int) -> ImageDataset:
    """Image i is of the grey level i all over, so that any view of it says which it is; its label is 3 i."""
    images = torch.arange(length, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 5, 6)
    return ImageDataset(
        name="numbered",
        split="train",
        images=images.clone(),
        labels=torch.arange(length) * 3,
        class_names=(),
        mean=(0.0,),
        std=(1.0,),
    )


@cache
def noisy(length: int) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (length, 3, 7, 6), dtype=torch.uint8, generator=generator)
    return ImageDataset(
        name="noisy",
        split="train",
        images=images,
        labels=None,
        class_names=(),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def make(dataset: ImageDataset, batch_size_global: int, **changes: object) -> ViewLoader:
    arguments = {
        "augmentation": AUGMENTATIONS["crop_flip"],
        "backend": "memory",
        "image_size": 4,
        "batch_size_global": batch_size_global,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return view_loader(dataset, **{**arguments, **changes})


def grey_levels(view: torch.Tensor) -> list[int]:
    levels = (view * 255).flatten(1)
    assert (levels - levels.round()).abs().max() < 1e-3
    assert (levels.round() == levels.round()[:, :1]).all()
    return levels[:, 0].round().int().tolist()


@settings(max_examples=60)
@given(
    length=st.integers(1, 40),
    per_rank=st.integers(1, 5),
    world_size=st.integers(1, 4),
    backend=BACKENDS,
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_a_rank_takes_its_block_of_each_batch_of_the_shuffled_images(
    length, per_rank, world_size, backend, seed, epoch
):
    """Numbers, labels and the pixels of both views are of one image, row by row."""
    size = per_rank * world_size
    length = max(length, size)
    order = shuffled(length, seed, epoch)
    for rank in range(world_size):
        loader = make(
            numbered(length), size, backend=backend, seed=seed, rank=rank, world_size=world_size
        )
        assert loader.steps_per_epoch == length // size
        batches = list(loader.epoch(epoch))
        assert len(batches) == length // size
        for step, batch in enumerate(batches):
            start = step * size + rank * per_rank
            images = order[start : start + per_rank]
            assert batch.index.tolist() == images
            assert batch.labels.tolist() == [3 * image for image in images]
            assert [grey_levels(view) for view in batch.views] == [images, images]


@st.composite
def journeys(draw: st.DrawFn, steps: int, batch_size: int) -> list[tuple[int, int, int]]:
    """(first step, step after the last, processes) of the starts in which a job does an epoch."""
    cuts = sorted({0, steps, *draw(st.lists(st.integers(0, steps), max_size=3))})
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    return [(start, stop, draw(st.sampled_from(divisors))) for start, stop in pairwise(cuts)]


def global_batches(parts: list[Iterator[ViewBatch]], count: int) -> Iterator[ViewBatch]:
    """What the ranks hold together in their next so many steps."""
    for _ in range(count):
        batches = [next(part) for part in parts]
        yield ViewBatch(
            index=torch.cat([batch.index for batch in batches]),
            labels=None,
            views=tuple(map(torch.cat, zip(*(batch.views for batch in batches), strict=True))),
            unreadable=(),
        )


@settings(max_examples=25)
@given(
    batch_size=st.sampled_from([1, 2, 4, 6]),
    extra=st.integers(0, 20),
    backend=BACKENDS,
    data=st.data(),
)
def test_an_epoch_is_the_same_however_often_it_is_taken_up_and_by_how_many(
    batch_size, extra, backend, data
):
    """Indices and pixels, with fresh loaders for every start: nothing depends on what went before."""
    dataset = noisy(batch_size + extra)
    recipe = {"augmentation": RECIPE, "backend": backend, "seed": 5}
    whole = list(make(dataset, batch_size, **recipe).epoch(3))
    parts = []
    for start, stop, world_size in data.draw(journeys(len(whole), batch_size)):
        ranks = [
            make(dataset, batch_size, **recipe, rank=rank, world_size=world_size).epoch(3, start)
            for rank in range(world_size)
        ]
        parts += global_batches(ranks, stop - start)
    assert len(parts) == len(whole)
    for part, batch in zip(parts, whole, strict=True):
        assert torch.equal(part.index, batch.index)
        for ours, theirs in zip(part.views, batch.views, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(sizes=st.permutations([2, 3, 5, 8]), backend=BACKENDS, epoch=EPOCHS)
def test_a_view_does_not_depend_on_the_size_of_the_batch(sizes, backend, epoch):
    seen: dict[int, list[torch.Tensor]] = {}
    for size in sizes[:2]:
        for batch in make(noisy(11), size, backend=backend, seed=1).epoch(epoch):
            for row, image in enumerate(batch.index.tolist()):
                seen.setdefault(image, []).append(torch.stack([v[row] for v in batch.views]))
    twice = [views for views in seen.values() if len(views) == 2]
    assert len(twice) >= 5
    for one, other in twice:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@settings(max_examples=15)
@given(length=st.integers(2, 12), batch_size=st.integers(1, 12), seed=SEEDS)
def test_an_epoch_shows_no_image_twice_and_no_image_is_left_out_for_ever(length, batch_size, seed):
    loader = make(numbered(length), min(batch_size, length), seed=seed, views=1)
    seen: set[int] = set()
    for epoch in range(20):
        shown = [image for batch in loader.epoch(epoch) for image in batch.index.tolist()]
        assert len(set(shown)) == len(shown) == length - length % min(batch_size, length)
        seen |= set(shown)
    assert seen == set(range(length))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=6, unique=True)
)
def test_every_seed_and_epoch_has_an_order_of_its_own(pairs):
    orders = set()
    for seed, epoch in pairs:
        (batch,) = make(numbered(30), 30, seed=seed, views=1).epoch(epoch)
        orders.add(tuple(batch.index.tolist()))
    assert len(orders) == len(pairs)


@given(length=st.integers(0, 12), batch_size=st.integers(-3, 15), world_size=st.integers(1, 5))
def test_batches_that_cannot_be_had_are_refused_and_all_others_are_not(
    length, batch_size, world_size
):
    if batch_size < 1:
        refusal = rf"batch_size must be at least 1, got {batch_size}"
    elif batch_size > length:
        refusal = rf"has {length} images, .*lower batch_size \({batch_size}\) or raise data.limit"
    elif batch_size % world_size:
        refusal = rf"batch_size {batch_size} .* {world_size} ranks: make it a multiple of"
    else:
        loader = make(numbered(length), batch_size, world_size=world_size)
        assert loader.steps_per_epoch == length // batch_size
        return
    with pytest.raises(UserError, match=refusal) as raised:
        make(numbered(length), batch_size, world_size=world_size)
    assert not re.search(r"\n", str(raised.value))
