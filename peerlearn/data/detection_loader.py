"""Batches of images with boxes for detection training, and images for a detector's test.

A training batch is a function of (dataset, view, seed, global batch size, step) and of nothing else. The number of
workers, the number of ranks and the step at which training is resumed do not matter. Which files can be decoded does
matter: another image, drawn by counters too, takes the place of an unreadable one.

Dimensions: B batch per rank, n objects of an image. Images are uint8 (channels, height, width), each of its own size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from peerlearn.counter_random import DETECTION_VIEWS, random_bits, uniform
from peerlearn.data.detection_order import DetectionOrder, grouped_by_aspect
from peerlearn.data.detection_sets import DetectionDataset
from peerlearn.data.image_folders import DecodeError, decode_image
from peerlearn.data.sampler import block_of
from peerlearn.data.unreadable import Unreadable, substitutes
from peerlearn.data.workers import Jobs, results, worker_pool

# A box that is narrower or lower than this after clipping is dropped, as Detectron2 does.
_EMPTY_PIXELS = 1e-5
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, kw_only=True)
class DetectionView:
    """How images are seen.

    Attributes:
        short_sides: lengths of the shorter side in pixels, one of which is drawn for each view; () = as the image is.
        longest_side: largest length of the longer side in pixels, which makes the shorter one shorter still.
        flip: whether every other view is mirrored.
    """

    short_sides: tuple[int, ...]
    longest_side: int
    flip: bool


class DetectionBatch(NamedTuple):
    """The batch of one rank in one step.

    Attributes:
        index: number of each image in the dataset, int64 (B,), on the CPU.
        images: B images, resized and mirrored, on the device.
        boxes: corners x1, y1, x2, y2 of each image's objects in its pixels, from 0, float32 (n, 4), on the device.
        labels: class of each object, int64 (n,), on the device.
        unreadable: images of ``index`` that cannot be decoded, or have not the annotated size, in the batch's order.
            In their places stand the image, the boxes and the labels of a substitute.
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    images: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    unreadable: tuple[Unreadable, ...]


def resized_size(height: int, width: int, *, short_side: int, longest_side: int) -> tuple[int, int]:
    """Height and width after Detectron2's ResizeShortestEdge, but at least one pixel each.

    Args:
        height: height of the image.
        width: width of the image.
        short_side: length that the shorter side gets.
        longest_side: largest length of the longer side; where it would be exceeded, it is kept and both sides shrink.

    Example:
        >>> resized_size(375, 500, short_side=800, longest_side=1333)
        (800, 1067)
    """
    scale = short_side / min(height, width)
    # In the order of Detectron2's operations, so that halves are rounded alike.
    new_height, new_width = (
        (float(short_side), scale * width)
        if height < width
        else (scale * height, float(short_side))
    )
    longer = max(new_height, new_width)
    if longer > longest_side:
        new_height, new_width = (side * (longest_side / longer) for side in (new_height, new_width))
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


class DetectionLoader:
    """Batches of a detection dataset, step by step, for one rank.

    The images of the global batches follow `grouped_by_aspect`. Rank r takes the r-th contiguous block of each. The
    shorter side and whether a view is mirrored are drawn by (seed, draw, image); those of a substitute by the number
    of the image it stands for. Only one iterator of a loader may be in use.

    Args:
        dataset: images to train on, at least one.
        view: how they are seen.
        batch_size_global: number of images of a step, over all ranks.
        seed: seed of the order and of the views.
        channels: 3, or 1 for grey levels (Pillow's luma).
        device: device of the batches.
        rank: number of this rank.
        world_size: number of ranks.
        workers: number of processes that decode images; 0 = this one.

    Raises:
        UserError: the ranks cannot share a batch evenly. While batches are read: an image and all that were drawn in
            its place cannot be decoded.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        view: DetectionView,
        *,
        batch_size_global: int,
        seed: int,
        channels: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        self._block = block_of(rank, world_size, batch_size=batch_size_global)
        self._batch_size, self._seed, self._device = batch_size_global, seed, device
        self._source = _Source(dataset, view, channels)
        self._jobs = Jobs(())
        self._pool = worker_pool(
            partial(_see, channels=channels),
            self._jobs,
            workers=workers,
            device=device,
            persistent=True,
        )

    def batches(self, start_step: int, stop_step: int) -> Iterator[DetectionBatch]:
        """The batches of steps start_step .. stop_step - 1, counted from 0 over the whole training."""
        source, seed = self._source, self._seed
        order = grouped_by_aspect(
            source.dataset.sizes,
            batch_size=self._batch_size,
            seed=seed,
            start_step=start_step,
            stop_step=stop_step,
        )
        sent, awaited = tee(_draws(order, self._block, source.view, seed))
        # Not a method of this object: that cycle would keep the workers alive until a garbage collection.
        self._jobs.pending = ([source.task(draw) for draw in draws] for draws in sent)
        for draws, seen in zip(awaited, results(self._pool), strict=True):
            yield _batch(source, draws, seen, seed=seed, device=self._device)


def test_images(
    dataset: DetectionDataset,
    numbers: Sequence[int],
    view: DetectionView,
    *,
    channels: int,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[int, Tensor]]:
    """Images for a detector's test, with their numbers: resized to the last of the short sides, and never mirrored.

    Args:
        dataset: images to read.
        numbers: numbers of the images, in the order in which they are wanted.
        view: how they are seen.
        channels: 3, or 1 for grey levels.
        device: device of the images.
        workers: number of processes that decode images; 0 = this one.

    Raises:
        UserError: an image cannot be decoded, or has not the annotated size.
    """
    source = _Source(dataset, view, channels)
    short_side = view.short_sides[-1] if view.short_sides else None
    tasks = (source.task(_Draw(number, short_side, False)) for number in numbers)
    pool = worker_pool(partial(_seen, channels=channels), tasks, workers=workers, device=device)
    for number, image in zip(numbers, results(pool), strict=True):
        yield number, image.to(device, non_blocking=True)


class _Draw(NamedTuple):
    """An image that was drawn, and how it is to be seen; without a short side it keeps its size."""

    index: int  # type: ignore[assignment]  # not tuple.index
    short_side: int | None
    flip: bool


class _Task(NamedTuple):
    """A view that is to be made; it carries all that a worker needs, so that none holds a copy of the dataset."""

    file: Path
    height: int
    width: int
    view_height: int
    view_width: int
    flip: bool


class _Seen(NamedTuple):
    """The work of a worker.

    Attributes:
        failures: position -> why there is no image.
        pixels: values of the other images, one after the other, as one tensor is handed over more cheaply than many.
    """

    failures: dict[int, str]
    pixels: Tensor


@dataclass(frozen=True)
class _Source:
    dataset: DetectionDataset
    view: DetectionView
    channels: int

    def task(self, draw: _Draw) -> _Task:
        width, height = self.dataset.sizes[draw.index].tolist()
        resized = (height, width)
        if draw.short_side is not None:
            resized = resized_size(
                height, width, short_side=draw.short_side, longest_side=self.view.longest_side
            )
        return _Task(self.dataset.images[draw.index], height, width, *resized, draw.flip)

    def targets(self, draw: _Draw) -> tuple[Tensor, Tensor]:
        """Boxes and labels of a view."""
        boxes = _in_view(self.dataset.boxes[draw.index], self.task(draw))
        kept = ((boxes[:, 2:] - boxes[:, :2]) > _EMPTY_PIXELS).all(1)
        return boxes[kept], self.dataset.labels[draw.index][kept]


def _draws(
    order: DetectionOrder, block: slice, view: DetectionView, seed: int
) -> Iterator[list[_Draw]]:
    """How the images of a rank are seen, step by step."""
    for index, draw in zip(order.index[:, block], order.draw[:, block], strict=True):
        key = random_bits(DETECTION_VIEWS, seed, draw, index)
        of_side, of_flip = uniform(key[:, None], torch.arange(2)).unbind(1)
        sides = (of_side * len(view.short_sides)).long().tolist()
        flips = ((of_flip < 0.5) & view.flip).tolist()
        yield [
            _Draw(number, view.short_sides[side] if view.short_sides else None, flip)
            for number, side, flip in zip(index.tolist(), sides, flips, strict=True)
        ]


def _see(tasks: Sequence[_Task], *, channels: int) -> _Seen:
    """The views of a batch."""
    failures, pixels = {}, [torch.empty(0, dtype=torch.uint8)]
    for position, task in enumerate(tasks):
        try:
            pixels.append(_seen(task, channels=channels).flatten())
        except DecodeError as error:
            failures[position] = error.reason
    return _Seen(failures, torch.cat(pixels))


def _seen(task: _Task, *, channels: int) -> Tensor:
    """One view.

    Raises:
        DecodeError: the file cannot be decoded, or its boxes are those of an image of another size.
    """
    decoded = decode_image(task.file)
    height, width = decoded.shape[1:]
    if (height, width) != (task.height, task.width):
        raise DecodeError(
            task.file,
            f"it has {width}x{height} pixels and its annotation says {task.width}x{task.height}",
        )
    image = Image.fromarray(decoded.permute(1, 2, 0).numpy()).convert(_MODES[channels])
    size = (task.view_width, task.view_height)
    pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR)))
    layered = pixels.view(task.view_height, task.view_width, channels).permute(2, 0, 1)
    return (layered.flip(2) if task.flip else layered).contiguous()


def _in_view(boxes: Tensor, task: _Task) -> Tensor:
    """Corners in the pixels of a view, and within it."""
    height, width = task.view_height, task.view_width
    ratios = torch.tensor([width / task.width, height / task.height], dtype=torch.float64)
    x1, y1, x2, y2 = (boxes * ratios.repeat(2)).unbind(1)
    if task.flip:
        x1, x2 = width - x2, width - x1
    sides = torch.tensor([width, height, width, height])
    return torch.stack((x1, y1, x2, y2), 1).clamp_min(0).minimum(sides).to(torch.float32)


def _batch(
    source: _Source, draws: Sequence[_Draw], seen: _Seen, *, seed: int, device: torch.device
) -> DetectionBatch:
    pixels = seen.pixels.to(device, non_blocking=True)
    images, targets, unreadable, start = [], [], [], 0
    for position, draw in enumerate(draws):
        shown = draw
        if position in seen.failures:
            file = str(source.dataset.images[draw.index])
            unreadable.append(Unreadable(draw.index, file, seen.failures[position]))
            shown, image = _substitute(source, draw, unreadable[-1], seed=seed)
            images.append(image.to(device))
        else:
            task = source.task(draw)
            shape = (source.channels, task.view_height, task.view_width)
            stop = start + source.channels * task.view_height * task.view_width
            images.append(pixels[start:stop].view(shape))
            start = stop
        targets.append(source.targets(shown))
    counts = [len(labels) for _, labels in targets]
    boxes, labels = (torch.cat(each).to(device) for each in zip(*targets, strict=True))
    return DetectionBatch(
        index=torch.tensor([draw.index for draw in draws]),
        images=tuple(images),
        boxes=boxes.split(counts),
        labels=labels.split(counts),
        unreadable=tuple(unreadable),
    )


def _substitute(
    source: _Source, draw: _Draw, image: Unreadable, *, seed: int
) -> tuple[_Draw, Tensor]:
    """The first of the image's ``substitutes`` that can be seen. The main process reads it: it alone has every path."""
    for index in substitutes(image, images=len(source.dataset), seed=seed):
        shown = draw._replace(index=index)
        try:
            return shown, _seen(source.task(shown), channels=source.channels)
        except DecodeError:
            continue
    raise AssertionError("substitutes end with an error")
