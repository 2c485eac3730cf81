"""Batches for detection training: which images a step takes, how they are resized, and what does not matter."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from peerlearn.data import detection_loader
from peerlearn.data.detection_loader import (
    DetectionBatch,
    DetectionLoader,
    DetectionView,
    resized_size,
)
from peerlearn.data.detection_order import DetectionOrder, grouped_by_aspect
from peerlearn.data.detection_sets import DetectionDataset, dataset_of, no_objects
from peerlearn.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CPU = torch.device("cpu")
AS_IT_IS = DetectionView(short_sides=(), longest_side=1, flip=False)
RANDOM = DetectionView(short_sides=(16, 24, 32), longest_side=60, flip=True)
SIZES = [(30, 20), (20, 30), (40, 25), (24, 24), (33, 21), (26, 20), (21, 40)]
# A black image has this box white, and nothing else.
BOX = (4, 3, 15, 9)


def made(folder: Path, sizes: list[tuple[int, int]] = SIZES) -> DetectionDataset:
    """Images of noise of these widths and heights, each with a box and a label of its own; the first has none."""
    annotated = []
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"{i:03}.png"
        Image.fromarray(noise).save(path)
        objects = no_objects((width, height))
        if i:
            objects.add((i, 1, width - 2, height), i, difficult=False)
        annotated.append((path, (width, height), objects))
    return dataset_of("made", "train", [str(i) for i in range(len(sizes))], annotated, "made")


def white_box(folder: Path, size: tuple[int, int] = (60, 40)) -> DetectionDataset:
    image = np.zeros((size[1], size[0], 3), np.uint8)
    x1, y1, x2, y2 = BOX
    image[y1:y2, x1:x2] = 255
    Image.fromarray(image).save(folder / "box.png")
    objects = no_objects(size)
    objects.add(BOX, 0, difficult=False)
    return dataset_of("made", "train", ["box"], [(folder / "box.png", size, objects)], "made")


def loader(
    dataset: DetectionDataset, view: DetectionView = RANDOM, **changes: object
) -> DetectionLoader:
    arguments = {"batch_size_global": 4, "seed": 0, "channels": 3, "device": CPU}
    return DetectionLoader(dataset, view, **{**arguments, **changes})


def plain(batch: DetectionBatch) -> tuple:
    """All that a batch holds, to be compared byte for byte."""
    layered = [(image.shape, image.numpy().tobytes()) for image in batch.images]
    boxes = [each.numpy().tobytes() for each in batch.boxes]
    labels = [each.tolist() for each in batch.labels]
    return batch.index.tolist(), layered, boxes, labels, batch.unreadable


def plain_batches(loader: DetectionLoader, start: int, stop: int) -> list[tuple]:
    return [plain(batch) for batch in loader.batches(start, stop)]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (375, 500, (800, 1067)),
        (500, 375, (1067, 800)),
        (500, 500, (800, 800)),
        # The longer side would be 1600.
        (250, 500, (667, 1333)),
        (500, 250, (1333, 667)),
        # As published: 334 * 800 / 500 = 534.4, and 480 / 333 * 500 = 720.7.
        (500, 334, (1198, 800)),
        (1, 5000, (1, 1333)),
        (5000, 1, (1333, 1)),
    ],
)
def test_sizes_are_those_of_resize_shortest_edge(
    height: int, width: int, expected: tuple[int, int]
):
    assert resized_size(height, width, short_side=800, longest_side=1333) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000), st.integers(1, 2000))
def test_sizes_follow_the_published_lines(height: int, width: int, short_side: int, longest: int):
    """Written as in detectron2/data/transforms/augmentation_impl.py, ResizeShortestEdge.get_output_shape."""
    size = short_side * 1.0
    scale = size / min(height, width)
    newh, neww = (size, scale * width) if height < width else (scale * height, size)
    if max(newh, neww) > longest:
        scale = longest * 1.0 / max(newh, neww)
        newh = newh * scale
        neww = neww * scale
    expected = max(int(newh + 0.5), 1), max(int(neww + 0.5), 1)
    assert resized_size(height, width, short_side=short_side, longest_side=longest) == expected


def test_images_are_resized_by_pillow_and_boxes_with_them(tmp_path: Path):
    dataset = white_box(tmp_path, (60, 41))
    view = DetectionView(short_sides=(24,), longest_side=100, flip=False)
    (batch,) = loader(dataset, view, batch_size_global=1).batches(0, 1)
    with Image.open(dataset.images[0]) as image:
        expected = np.asarray(image.resize((35, 24), Image.Resampling.BILINEAR))
    assert torch.equal(batch.images[0].permute(1, 2, 0), torch.from_numpy(expected.copy()))
    # Each axis has its own ratio: 35 / 60 and 24 / 41.
    by_hand = [4 * 35 / 60, 3 * 24 / 41, 15 * 35 / 60, 9 * 24 / 41]
    assert torch.equal(batch.boxes[0], torch.tensor([by_hand]))
    assert batch.boxes[0].dtype == torch.float32
    assert batch.labels[0].dtype == torch.int64


@pytest.mark.parametrize("short_side", [80, 40, None])
def test_a_mirrored_box_lies_where_its_object_is(tmp_path: Path, short_side: int | None):
    dataset = white_box(tmp_path)
    sides = () if short_side is None else (short_side,)
    view = DetectionView(short_sides=sides, longest_side=1000, flip=True)
    seen: dict[tuple, Tensor] = {}
    for batch in loader(dataset, view, batch_size_global=1).batches(0, 12):
        (box,) = batch.boxes[0].tolist()
        seen[tuple(box)] = batch.images[0]
    scale = 1 if short_side is None else short_side / 40
    assert set(seen) == {
        tuple(scale * x for x in BOX),
        tuple(scale * x for x in (60 - 15, 3, 60 - 4, 9)),
    }
    for (x1, y1, x2, y2), image in seen.items():
        bright = (image[0] > 127).nonzero()
        assert bright.amin(0).tolist() == [y1, x1]
        assert (bright.amax(0) + 1).tolist() == [y2, x2]


def test_boxes_end_at_the_image_and_empty_ones_are_dropped(tmp_path: Path):
    dataset = white_box(tmp_path)
    boxes = torch.tensor([[-1.0, -1, 61, 41], [60, 0, 61, 40], [5, 39.999996, 9, 41], [0, 0, 1, 1]])
    dataset = replace(dataset, boxes=(boxes,), labels=(torch.tensor([3, 4, 5, 6]),))
    (batch,) = loader(dataset, AS_IT_IS, batch_size_global=1).batches(0, 1)
    assert batch.boxes[0].tolist() == [[0, 0, 60, 40], [0, 0, 1, 1]]
    assert batch.labels[0].tolist() == [3, 6]


def test_one_channel_is_the_luma_of_pillow(tmp_path: Path):
    dataset = made(tmp_path)
    view = DetectionView(short_sides=(16,), longest_side=60, flip=False)
    for batch in loader(dataset, view, channels=1).batches(0, 3):
        for number, image in zip(batch.index.tolist(), batch.images, strict=True):
            with Image.open(dataset.images[number]) as opened:
                grey = opened.convert("L").resize(
                    (image.shape[2], image.shape[1]), Image.Resampling.BILINEAR
                )
            assert image.shape[0] == 1
            assert image[0].tolist() == np.asarray(grey).tolist()


def test_one_channel_of_a_grey_file_is_any_of_its_three(tmp_path: Path):
    dataset = white_box(tmp_path)
    ramp = np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) % 256
    Image.fromarray(ramp.astype(np.uint8)).save(dataset.images[0])
    three, one = (
        plain_batches(loader(dataset, batch_size_global=1, channels=channels), 0, 6)
        for channels in (3, 1)
    )
    for with_three, with_one in zip(three, one, strict=True):
        assert with_three[1][0][1] == 3 * with_one[1][0][1]
        assert with_three[2:] == with_one[2:]


def test_views_are_drawn_anew_each_time_and_every_choice_comes(tmp_path: Path):
    dataset = white_box(tmp_path)
    seen = Counter(
        (batch.images[0].shape[1], batch.boxes[0][0, 0].item() > 20 * batch.images[0].shape[2] / 60)
        for batch in loader(dataset, batch_size_global=1).batches(0, 600)
    )
    assert sorted(seen) == [(side, flip) for side in (16, 24, 32) for flip in (False, True)]
    # 100 each; the standard deviation is 9.
    assert 70 < min(seen.values()) <= max(seen.values()) < 130


def stream(sizes: Tensor, batch_size: int, seed: int, steps: int) -> list[list[tuple[int, int]]]:
    """(image, draw) of each batch, in plain loops over the order of batches of one image, which has no groups."""
    drawn = grouped_by_aspect(
        torch.ones_like(sizes), batch_size=1, seed=seed, start_step=0, stop_step=2000
    )
    waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    batches = []
    for image, draw in zip(drawn.index[:, 0].tolist(), drawn.draw[:, 0].tolist(), strict=True):
        group = waiting[bool(sizes[image, 0] > sizes[image, 1])]
        group.append((image, draw))
        if len(group) == batch_size:
            batches.append(list(group))
            group.clear()
        if len(batches) == steps:
            return batches
    raise AssertionError("the stream is too short")


def order_of(sizes: Tensor, batch_size: int, seed: int, start: int, stop: int) -> DetectionOrder:
    return grouped_by_aspect(
        sizes, batch_size=batch_size, seed=seed, start_step=start, stop_step=stop
    )


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=12),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    steps=st.integers(0, 30),
    data=st.data(),
)
def test_the_order_is_that_of_two_waiting_groups(sizes, batch_size, seed, steps, data):
    sizes = torch.tensor(sizes)
    order = order_of(sizes, batch_size, seed, 0, steps)
    assert order.index.shape == order.draw.shape == (steps, batch_size)
    if steps:
        batches = [
            list(zip(*rows, strict=True))
            for rows in zip(order.index.tolist(), order.draw.tolist(), strict=True)
        ]
        assert batches == stream(sizes, batch_size, seed, steps)
    # Pure groups.
    wide = sizes[order.index, 0] > sizes[order.index, 1]
    assert torch.equal(wide.all(1), wide.any(1))
    # From any step on, the same.
    start = data.draw(st.integers(0, steps))
    resumed = order_of(sizes, batch_size, seed, start, steps)
    assert torch.equal(resumed.index, order.index[start:])
    assert torch.equal(resumed.draw, order.draw[start:])


@given(
    wide=st.integers(0, 9),
    high=st.integers(0, 9),
    batch_size=st.integers(1, 9),
    steps=st.integers(1, 60),
)
def test_every_image_is_drawn_as_often_as_any_other(wide, high, batch_size, steps):
    if not wide + high:
        return
    sizes = torch.tensor([[2, 1]] * wide + [[1, 2]] * high)
    order = order_of(sizes, batch_size, 0, 0, steps)
    times = order.index.flatten().bincount(minlength=len(sizes))
    for members in (times[:wide], times[wide:]):
        if len(members):
            assert members.max() - members.min() <= 1
    # What keeps one group behind the other is that less than a batch of it is waiting.
    if wide and high:
        waited = sum(-(-(batch_size - 1) // size) for size in (wide, high))
        assert times.max() - times.min() <= 1 + waited
    # An image's draws are counted from 0 without gaps, so that no view comes twice.
    for image in range(len(sizes)):
        assert order.draw[order.index == image].tolist() == list(range(times[image]))


PINNED = [[2, 5, 4, 0], [6, 1, 3, 1], [0, 2, 5, 4], [6, 3, 6, 1]]


def test_values_of_the_order_are_pinned_so_that_no_refactoring_changes_runs():
    order = order_of(torch.tensor(SIZES), 4, 7, 0, 4)
    assert order.index.tolist() == PINNED
    assert order_of(torch.tensor(SIZES), 4, 8, 0, 4).index.tolist() != PINNED


def test_neither_workers_nor_ranks_nor_the_first_step_matter(tmp_path: Path):
    dataset = made(tmp_path)
    whole = plain_batches(loader(dataset), 0, 9)
    assert len({tuple(batch[0]) for batch in whole}) == 9
    processes = loader(dataset, workers=2)
    assert plain_batches(processes, 0, 9) == whole
    # Again by the same processes, from a step on.
    for start in (1, 4, 8, 9):
        assert plain_batches(processes, start, 9) == whole[start:]
        assert plain_batches(loader(dataset), start, 9) == whole[start:]
    ranks = [
        plain_batches(loader(dataset, rank=rank, world_size=2, workers=rank), 3, 9)
        for rank in (0, 1)
    ]
    for batch, *parts in zip(whole[3:], *ranks, strict=True):
        for field in range(5):
            assert batch[field] == parts[0][field] + parts[1][field]


def test_another_seed_gives_other_batches_and_views(tmp_path: Path):
    dataset = white_box(tmp_path)
    one, other = (
        plain_batches(loader(dataset, batch_size_global=2, seed=seed), 0, 8) for seed in (0, 1)
    )
    assert one != other


def test_a_batch_may_be_larger_than_the_dataset(tmp_path: Path):
    dataset = made(tmp_path, [(20, 30), (21, 30)])
    (batch,) = loader(dataset, batch_size_global=5).batches(0, 1)
    assert sorted(Counter(batch.index.tolist()).values()) == [2, 3]
    assert len(batch.images) == len(batch.boxes) == len(batch.labels) == 5


def test_ranks_must_share_a_batch_evenly(tmp_path: Path):
    with pytest.raises(UserError, match="batch_size 4 cannot be shared by 3 ranks"):
        loader(made(tmp_path), world_size=3)


def damage(dataset: DetectionDataset) -> DetectionDataset:
    """Image 1 is damaged, and 4 is not as large as its annotation says."""
    dataset.images[1].write_bytes(b"no image")
    Image.new("RGB", (34, 21)).save(dataset.images[4])
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_has_a_substitute_with_boxes_and_label_of_its_own(
    tmp_path: Path, workers: int
):
    dataset = damage(made(tmp_path))
    told = {}
    for batch in loader(dataset, AS_IT_IS, workers=workers).batches(0, 8):
        found = [image.index for image in batch.unreadable]
        assert found == [number for number in batch.index.tolist() if number in (1, 4)]
        for number, image, boxes, labels in zip(
            batch.index.tolist(), batch.images, batch.boxes, batch.labels, strict=True
        ):
            # Noise: only the image's own file has these pixels.
            (shown,) = (
                i for i in range(7) if i not in (1, 4) and torch.equal(image, dataset.read(i))
            )
            assert (shown == number) == (number not in (1, 4))
            assert torch.equal(boxes, dataset.boxes[shown])
            assert torch.equal(labels, dataset.labels[shown])
            if shown != number:
                # The same in every step.
                assert told.setdefault(number, shown) == shown
        for image in batch.unreadable:
            assert image.path == str(dataset.images[image.index])
            assert (
                image.reason
                == {
                    1: "no image in any known format",
                    4: "it has 34x21 pixels and its annotation says 33x21",
                }[image.index]
            )
    assert sorted(told) == [1, 4]


def test_images_for_the_test_have_the_last_short_side_and_are_not_mirrored(tmp_path: Path):
    dataset = made(tmp_path)
    numbers = [5, 0, 3]
    for workers in (0, 2):
        seen = detection_loader.test_images(
            dataset, numbers, RANDOM, channels=3, device=CPU, workers=workers
        )
        for expected, (number, image) in zip(numbers, seen, strict=True):
            assert number == expected
            with Image.open(dataset.images[number]) as opened:
                height, width = resized_size(
                    opened.height, opened.width, short_side=32, longest_side=60
                )
                resized = opened.resize((width, height), Image.Resampling.BILINEAR)
            assert image.permute(1, 2, 0).tolist() == np.asarray(resized).tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, r"cannot decode .*001\.png \(no image in any known format\): .*"),
        (4, r"cannot decode .*004\.png \(it has 34x21 pixels and its annotation says 33x21\): .*"),
    ],
)
def test_a_damaged_image_of_the_test_is_named(tmp_path: Path, number: int, line: str, workers: int):
    dataset = damage(made(tmp_path))
    with pytest.raises(UserError, match=f"^{line}$"):
        list(
            detection_loader.test_images(
                dataset, [number], AS_IT_IS, channels=3, device=CPU, workers=workers
            )
        )
