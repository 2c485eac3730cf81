"""Evaluation views of a dataset's images, in order. Images are (B, channels, height, width)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peerlearn.data.augment import evaluation_view, normalise, pixels
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.image_folders import DecodeError
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

    Yields float32 (batch_size, channels, image_size, image_size); the last may be smaller.
    ``workers`` processes decode image files and round their views to uint8; images in memory are
    viewed on the device. An image that cannot be decoded raises UserError or, where a list
    ``unreadable`` is given, is appended to it and seen as black.
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
        pool = worker_pool(function, jobs, workers=workers, device=device)
        noted = _noting_unreadable(results(pool), cuts, images, unreadable)
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
