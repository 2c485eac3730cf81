"""Evaluation views of a dataset's images, in order.

Dimensions: B batch. Image tensors are (B, channels, height, width).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.data.augment import evaluation_view, normalise, pixels
from peerlearn.data.beton_dataset import is_packed
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.image_folders import DecodeError
from peerlearn.data.threads import ahead
from peerlearn.data.unreadable import Unreadable, decode_images
from peerlearn.data.workers import results, worker_pool


class _EvaluationResult(NamedTuple):
    failures: dict[int, str]
    views: Tensor


def evaluation_batches(
    dataset: ImageDataset,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    start: int = 0,
    stop: int | None = None,
    unreadable: list[Unreadable] | None = None,
) -> Iterator[Tensor]:
    """The evaluation views of images start..stop-1 in order, normalised, on the device.

    Args:
        dataset: images to view.
        image_size: height and width of the views in pixels.
        batch_size: images per batch; the last batch may have fewer.
        device: device of the views. Images in memory are resized on it.
        workers: number of processes that decode image files and round their views to uint8; of threads for the images
            of a packed file.
        start: number of the first image.
        stop: number after the last image; None = all.
        unreadable: list to which images that cannot be decoded are added; they are seen as black.

    Yields:
        float32 (B, channels, image_size, image_size).

    Raises:
        DecodeError: an image cannot be decoded, and no list ``unreadable`` is given.
    """
    positions = range(len(dataset))[start:stop]
    cuts = [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]
    images = dataset.images
    views: Iterator[Tensor]
    if isinstance(images, Tensor):
        batches = (images[cut.start : cut.stop].to(device) for cut in cuts)
        views = (evaluation_view(batch, size=image_size) for batch in batches)
    else:
        function = partial(_evaluation_views, size=image_size)
        jobs = [images[cut.start : cut.stop] for cut in cuts]
        # Threads: each process would have to import ffcv.
        evaluated = (
            ahead(function, jobs, threads=workers)
            if is_packed(dataset)
            else results(worker_pool(function, jobs, workers=workers, device=device))
        )
        noted = _noting_unreadable(evaluated, cuts, images, unreadable)
        views = (pixels(batch, device) for batch in noted)
    for view in views:
        yield normalise(view, dataset.mean, dataset.std)


def _noting_unreadable(
    evaluated: Iterator[_EvaluationResult],
    cuts: Sequence[range],
    files: tuple[Path, ...],
    unreadable: list[Unreadable] | None,
) -> Iterator[Tensor]:
    for cut, result in zip(cuts, evaluated, strict=True):
        for position, reason in result.failures.items():
            file = files[cut[position]]
            if unreadable is None:
                raise DecodeError(file, reason)
            unreadable.append(Unreadable(cut[position], str(file), reason))
        yield result.views


def _evaluation_views(files: Sequence[Path], *, size: int) -> _EvaluationResult:
    images, failures = decode_images(files)
    views = [evaluation_view(image[None], size=size) for image in images]
    return _EvaluationResult(failures, torch.cat(views).mul_(255).round_().to(torch.uint8))
