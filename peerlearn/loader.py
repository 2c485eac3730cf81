"""Batches of random views for training, and of evaluation views in order.

What a training batch holds is a function of (dataset, recipe, seed, epoch, step) and of nothing
else: neither the number of workers nor of ranks, nor where an epoch is taken up again.

Dimension letters: N images, B batch per rank. Image tensors are (B, channels, height, width).
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from peerlearn.augment import (
    Augmentation,
    ViewParameters,
    distort,
    draw_view_parameters,
    evaluation_view,
    normalise,
    resized_crop,
)
from peerlearn.counter_random import PERMUTATION, permutation
from peerlearn.datasets import ImageDataset
from peerlearn.errors import UserError
from peerlearn.image_folders import decode_image
from peerlearn.workers import Jobs, results, worker_pool

# Of the device memory free at the start; the rest belongs to the networks.
_RESIDENT_SHARE = 0.25
_DECODE_CHUNK = 64
_PROGRESS_INTERVAL_SECONDS = 10.0

logger = logging.getLogger(__name__)


class ViewBatch(NamedTuple):
    """What one rank trains on in one step.

    index: int64 (B,) on the CPU, each image's number in the dataset.
    labels: int64 (B,) on the device, None for a dataset without labels.
    views: one float32 (B, channels, size, size) per view, on the device, normalised.
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    labels: Tensor | None
    views: tuple[Tensor, ...]


class ViewLoader:
    """Random views of a dataset, epoch by epoch, for one rank.

    An epoch is the permutation of (seed, epoch), cut into global batches, the last incomplete one
    dropped; of each, rank r takes the r-th contiguous block. Views are those of
    ``draw_view_parameters`` with draw number 0, for no image comes twice in an epoch.

    ``backend`` says where crops are cut:
    memory   on the device, from images held in memory, image files being decoded once at the
             start; all must be of one size. They stay on a CUDA device if they take at most a
             quarter of its free memory, else in main memory.
    folder   in ``workers`` processes (0: in this one), which decode the images of a batch anew in
             each epoch and hand over crops rounded to uint8: up to 1/510 away from memory's.
    Flips and colours follow on the device in both.

    Raises UserError if the ranks cannot share ``batch_size_global`` evenly, if the dataset is
    smaller than that, if memory meets images of several sizes and, also while an epoch runs, for an
    image that cannot be decoded, naming its file.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        augmentation: Augmentation,
        *,
        backend: Literal["memory", "folder"],
        image_size: int,
        batch_size_global: int,
        seed: int,
        device: torch.device,
        views: int = 2,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size_global < 1 or batch_size_global % world_size:
            raise UserError(
                f"batch_size {batch_size_global} cannot be shared by {world_size} ranks: "
                f"make it a multiple of {world_size}"
            )
        if len(dataset) < batch_size_global:
            raise UserError(
                f"{dataset.name} {dataset.split} has {len(dataset)} images, fewer than one batch: "
                f"lower batch_size ({batch_size_global}) or raise data.limit"
            )
        self.steps_per_epoch = len(dataset) // batch_size_global
        self._dataset = dataset
        self._device = device
        self._batch_size_global = batch_size_global
        self._rank, self._world_size = rank, world_size
        self._recipe = _Recipe(
            augmentation=augmentation, views=views, image_size=image_size, seed=seed
        )
        self._cropper: _Cropper
        if backend == "memory":
            images = held_in_memory(dataset, workers=workers).images
            assert isinstance(images, Tensor)
            self._cropper = _MemoryCropper(images, self._recipe, device)
        elif backend == "folder":
            self._cropper = _FolderCropper(dataset.images, self._recipe, device, workers)
        else:
            raise ValueError(f"unknown backend {backend!r}")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ViewBatch]:
        """The batches of an epoch from ``start_step`` on, the same as in the whole epoch."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is not in 0..{self.steps_per_epoch}")
        augmentation, dataset = self._recipe.augmentation, self._dataset
        for batch in self._cropper.cut(self._draws(epoch, start_step)):
            views = (
                distort(_pixels(crops, self._device), parameters, augmentation)
                for crops, parameters in zip(batch.crops, batch.parameters, strict=True)
            )
            yield ViewBatch(
                index=batch.index,
                labels=None if dataset.labels is None else self._to_device(dataset.labels, batch),
                views=tuple(normalise(view, dataset.mean, dataset.std) for view in views),
            )

    def _to_device(self, labels: Tensor, batch: "_CroppedBatch") -> Tensor:
        return labels[batch.index].to(self._device, non_blocking=True)

    def _draws(self, epoch: int, start_step: int) -> Iterator["_Draws"]:
        order = permutation(len(self._dataset), PERMUTATION, self._recipe.seed, epoch)
        per_rank = self._batch_size_global // self._world_size
        for step in range(start_step, self.steps_per_epoch):
            first = step * self._batch_size_global + self._rank * per_rank
            index = order[first : first + per_rank]
            yield _Draws(epoch=epoch, index=index, draw=torch.zeros_like(index))


def evaluation_batches(
    dataset: ImageDataset,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Tensor]:
    """The evaluation views of images start..stop-1 in order, normalised, on the device.

    Yields float32 (batch_size, channels, image_size, image_size); the last may be smaller.
    ``workers`` processes decode image files and round their views to uint8; images in memory are
    viewed on the device. Raises UserError for an image that cannot be decoded.
    """
    positions = range(len(dataset))[start:stop]
    cuts = [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]
    images = dataset.images
    if isinstance(images, Tensor):
        batches = (images[cut.start : cut.stop].to(device) for cut in cuts)
        views = (evaluation_view(batch, size=image_size) for batch in batches)
    else:
        function = partial(_evaluation_views, size=image_size)
        jobs = [images[cut.start : cut.stop] for cut in cuts]
        pool = worker_pool(function, jobs, workers=workers, device=device)
        views = (_pixels(result, device) for result in results(pool))
    for view in views:
        yield normalise(view, dataset.mean, dataset.std)


def held_in_memory(dataset: ImageDataset, *, workers: int = 0) -> ImageDataset:
    """The dataset with its image files decoded, by ``workers`` processes (0: by this one).

    Raises UserError for a file that cannot be decoded and for images of several sizes.
    """
    if isinstance(dataset.images, Tensor):
        return dataset
    files = dataset.images
    chunks = [files[first : first + _DECODE_CHUNK] for first in range(0, len(files), _DECODE_CHUNK)]
    size = decode_image(files[0]).shape
    images = torch.empty((len(files), *size), dtype=torch.uint8)
    done, reported = 0, time.monotonic()
    pool = worker_pool(_decoded, chunks, workers=workers, device=torch.device("cpu"))
    for chunk, decoded in zip(chunks, results(pool), strict=True):
        for file, image in zip(chunk, decoded, strict=True):
            if image.shape != size:
                raise UserError(
                    f"{file} is {_extent(image.shape)} and {files[0]} is {_extent(size)} pixels: "
                    "images of several sizes need data.backend folder"
                )
            images[done] = image
            done += 1
        if time.monotonic() - reported > _PROGRESS_INTERVAL_SECONDS:
            reported = time.monotonic()
            logger.info("decoded %d of %d images of %s", done, len(files), dataset.name)
    return replace(dataset, images=images)


def _extent(shape: torch.Size) -> str:
    return f"{shape[2]}x{shape[1]}"


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    augmentation: Augmentation
    views: int
    image_size: int
    seed: int

    def parameters(
        self, draws: "_Draws", *, height: int | Tensor, width: int | Tensor
    ) -> tuple[ViewParameters, ...]:
        """One set for each view of a batch of images of these sizes."""
        return tuple(
            draw_view_parameters(
                self.augmentation,
                seed=self.seed,
                epoch=draws.epoch,
                index=draws.index,
                draw=draws.draw,
                view=view,
                height=height,
                width=width,
            )
            for view in range(self.views)
        )


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """The images of one batch of this rank, (B,), and each one's draw number within the epoch."""

    epoch: int
    index: Tensor
    draw: Tensor


@dataclass(frozen=True, kw_only=True)
class _CroppedBatch:
    """``crops``: per view (B, channels, size, size), uint8 or float32 in [0, 1], on any device."""

    index: Tensor
    parameters: tuple[ViewParameters, ...]
    crops: tuple[Tensor, ...]


class _Cropper(Protocol):
    def cut(self, batches: Iterator[_Draws]) -> Iterator[_CroppedBatch]: ...


class _MemoryCropper:
    def __init__(self, images: Tensor, recipe: _Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._images = images.to(device) if _fits(images, device) else images

    def cut(self, batches: Iterator[_Draws]) -> Iterator[_CroppedBatch]:
        height, width = self._images.shape[2:]
        for draws in batches:
            parameters = self._recipe.parameters(draws, height=height, width=width)
            images = self._images[draws.index.to(self._images.device)].to(self._device)
            crops = (resized_crop(images, one.box, self._recipe.image_size) for one in parameters)
            yield _CroppedBatch(index=draws.index, parameters=parameters, crops=tuple(crops))


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= _RESIDENT_SHARE * free_bytes


@dataclass(frozen=True, kw_only=True)
class _CropJob:
    """A batch on its way to a worker: arrays, which travel by value, and undecoded images."""

    epoch: int
    index: np.ndarray
    draw: np.ndarray
    images: Sequence[Path] | np.ndarray


class _CropResult(NamedTuple):
    height: Tensor
    width: Tensor
    crops: tuple[Tensor, ...]


class _FolderCropper:
    def __init__(
        self, images: Tensor | tuple[Path, ...], recipe: _Recipe, device: torch.device, workers: int
    ) -> None:
        self._images, self._recipe = images, recipe
        self._jobs = Jobs(())
        self._pool = worker_pool(
            partial(_cut, recipe=recipe),
            self._jobs,
            workers=workers,
            device=device,
            persistent=True,
        )

    def cut(self, batches: Iterator[_Draws]) -> Iterator[_CroppedBatch]:
        sent, awaited = tee(batches)
        # Not a method of this object: the cycle would keep the workers until a garbage collection.
        self._jobs.pending = map(partial(_crop_job, self._images), sent)
        for draws, result in zip(awaited, results(self._pool), strict=True):
            # Cheaper to draw again than to carry eleven small tensors out of the worker.
            parameters = self._recipe.parameters(draws, height=result.height, width=result.width)
            yield _CroppedBatch(index=draws.index, parameters=parameters, crops=result.crops)


def _crop_job(all_images: Tensor | tuple[Path, ...], draws: _Draws) -> _CropJob:
    # The images go along, so that no worker holds a copy of the dataset or its million paths.
    images = (
        all_images[draws.index].numpy()
        if isinstance(all_images, Tensor)
        else [all_images[i] for i in draws.index.tolist()]
    )
    return _CropJob(
        epoch=draws.epoch, index=draws.index.numpy(), draw=draws.draw.numpy(), images=images
    )


def _cut(job: _CropJob, *, recipe: _Recipe) -> _CropResult:
    images = list(
        torch.from_numpy(job.images)
        if isinstance(job.images, np.ndarray)
        else map(decode_image, job.images)
    )
    draws = _Draws(
        epoch=job.epoch, index=torch.from_numpy(job.index), draw=torch.from_numpy(job.draw)
    )
    height = torch.tensor([image.shape[1] for image in images])
    width = torch.tensor([image.shape[2] for image in images])
    crops = (
        torch.stack(
            [
                _resized_cut(image, box, recipe.image_size)
                for image, box in zip(images, parameters.box.tolist(), strict=True)
            ]
        )
        for parameters in recipe.parameters(draws, height=height, width=width)
    )
    return _CropResult(height, width, tuple(crops))


def _resized_cut(image: Tensor, box: list[int], size: int) -> Tensor:
    """``resized_crop`` of one image, rounded to uint8 (channels, size, size).

    Its dense resampling matrices pay on a device; on one large image this is faster.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width].to(torch.float32)
    resized = interpolate(crop, (size, size), mode="bilinear", antialias=True)
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


def _evaluation_views(files: Sequence[Path], *, size: int) -> Tensor:
    views = [evaluation_view(decode_image(file)[None], size=size) for file in files]
    return torch.cat(views).mul_(255).round_().to(torch.uint8)


def _decoded(files: Sequence[Path]) -> list[Tensor]:
    return [decode_image(file) for file in files]


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    """Images on the device as float32 in [0, 1]."""
    images = images.to(device, non_blocking=True)
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images
