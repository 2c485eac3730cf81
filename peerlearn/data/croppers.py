"""Crops of the images of a batch: from memory, from files by worker processes, or from a packed file by threads.

Dimensions: N images, B batch per rank. Image tensors are (B, channels, height, width).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from peerlearn.data.augment import ViewParameters, draw_view_parameters, resized_crop
from peerlearn.data.beton_facts import read_facts
from peerlearn.data.beton_file import packed_rows
from peerlearn.data.held_images import HeldImages, readable_sources
from peerlearn.data.recipes import Augmentation
from peerlearn.data.threads import ahead
from peerlearn.data.unreadable import Decoded, Unreadable, decode_images, read_substitute
from peerlearn.data.workers import Jobs, results, worker_pool

# Largest share of the device's free memory that images may take. The rest is for the networks.
_RESIDENT_SHARE = 0.25
# Up to so many pixels of an image the matrices of ``resized_crop`` are faster than one image after another on a CPU.
_SMALL_PIXELS = 48**2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    views: tuple[Augmentation, ...]
    image_size: int
    seed: int

    def parameters(
        self, draws: "Draws", *, height: int | Tensor, width: int | Tensor
    ) -> tuple[ViewParameters, ...]:
        """One set of parameters for each view of a batch of images of these sizes."""
        return tuple(
            draw_view_parameters(
                augmentation,
                seed=self.seed,
                epoch=draws.epoch,
                index=draws.index,
                draw=draws.draw,
                view=view,
                height=height,
                width=width,
            )
            for view, augmentation in enumerate(self.views)
        )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The images of one batch of this rank, (B,), and how often the epoch has drawn each of them before."""

    epoch: int
    index: Tensor
    draw: Tensor


@dataclass(frozen=True, kw_only=True)
class CroppedBatch:
    """A batch after cropping.

    Attributes:
        index: number of each image in the dataset, (B,).
        source: number of the image that gives pixels and label, (B,): its own, or that of its
            substitute if it is unreadable.
        unreadable: images of ``index`` that cannot be decoded.
        parameters: parameters of each view.
        crops: (B, channels, size, size) for each view, uint8 or float32 in [0, 1], on any device.
    """

    index: Tensor
    source: Tensor
    unreadable: tuple[Unreadable, ...]
    parameters: tuple[ViewParameters, ...]
    crops: tuple[Tensor, ...]


class Cropper(Protocol):
    def cut(self, batches: Iterator[Draws]) -> Iterator[CroppedBatch]: ...


class MemoryCropper:
    def __init__(self, held: HeldImages, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._images = held.images.to(device) if _fits(held.images, device) else held.images
        self._source, self._unreadable = held.source, held.unreadable

    def cut(self, batches: Iterator[Draws]) -> Iterator[CroppedBatch]:
        height, width = self._images.shape[2:]
        for draws in batches:
            parameters = self._recipe.parameters(draws, height=height, width=width)
            source = self._source[draws.index]
            images = self._images[source.to(self._images.device, non_blocking=True)]
            images = images.to(self._device, non_blocking=True)
            crops = (resized_crop(images, one.box, self._recipe.image_size) for one in parameters)
            yield CroppedBatch(
                index=draws.index,
                source=source,
                unreadable=_those_of(draws, self._unreadable),
                parameters=parameters,
                crops=tuple(crops),
            )


def _those_of(draws: Draws, unreadable: Mapping[int, Unreadable]) -> tuple[Unreadable, ...]:
    return tuple(unreadable[i] for i in draws.index.tolist() if i in unreadable)


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= _RESIDENT_SHARE * free_bytes


class PackedCropper:
    """Each image is decoded once for all views, by threads, which end with the epoch.

    Attributes:
        unreadable: images that could not be decoded when they were packed, by their number.
    """

    def __init__(
        self, images: tuple[Path, ...], recipe: Recipe, device: torch.device, workers: int
    ) -> None:
        self._packed, self._numbers = packed_rows(images)
        self._recipe, self._device, self._workers = recipe, device, workers
        reasons = {each.index: each for each in read_facts(self._packed.file).unreadable}
        self.unreadable = {
            index: reasons[int(self._numbers[index])]._replace(index=index)
            for index in self._packed.unreadable[self._numbers].nonzero()[:, 0].tolist()
        }
        self._source = readable_sources(len(images), self.unreadable, seed=recipe.seed)
        largest = int((self._packed.heights * self._packed.widths).max())
        self._together = device.type != "cpu" or largest <= _SMALL_PIXELS

    def cut(self, batches: Iterator[Draws]) -> Iterator[CroppedBatch]:
        sent, awaited = tee(batches)
        numbers = (self._numbers[self._source[draws.index]] for draws in sent)
        read: Callable[[Tensor], Tensor | list[Tensor]] = (
            partial(self._packed.read_together, pinned=self._device.type == "cuda")
            if self._together
            else self._packed.read_each
        )
        with closing(ahead(read, numbers, threads=self._workers)) as decoded:
            for draws, images in zip(awaited, decoded, strict=True):
                source = self._source[draws.index]
                row = self._numbers[source]
                parameters = self._recipe.parameters(
                    draws, height=self._packed.heights[row], width=self._packed.widths[row]
                )
                yield CroppedBatch(
                    index=draws.index,
                    source=source,
                    unreadable=_those_of(draws, self.unreadable),
                    parameters=parameters,
                    crops=tuple(self._crop(images, one.box) for one in parameters),
                )

    def _crop(self, images: Tensor | list[Tensor], box: Tensor) -> Tensor:
        """Cut one box from each image, as ``resized_crop`` does."""
        size = self._recipe.image_size
        if isinstance(images, Tensor):
            on_device = images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            return resized_crop(on_device, box, size)
        cuts = [
            _resized(image.permute(2, 0, 1), one, size)
            for image, one in zip(images, box.tolist(), strict=True)
        ]
        return torch.stack(cuts).div_(255)


@dataclass(frozen=True, kw_only=True)
class _CropJob:
    """A batch on its way to a worker: arrays, which are pickled by value, and images, not yet decoded."""

    epoch: int
    index: np.ndarray
    draw: np.ndarray
    images: Sequence[Path] | np.ndarray


class _CropResult(NamedTuple):
    """The work of a worker. ``failures``: position -> why that image cannot be decoded; its rows are black."""

    failures: dict[int, str]
    height: Tensor
    width: Tensor
    crops: tuple[Tensor, ...]


class FolderCropper:
    def __init__(
        self, images: Tensor | tuple[Path, ...], recipe: Recipe, device: torch.device, workers: int
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

    def cut(self, batches: Iterator[Draws]) -> Iterator[CroppedBatch]:
        sent, awaited = tee(batches)
        # Not a method of this object: that cycle would keep the workers alive until a garbage collection.
        self._jobs.pending = map(partial(_crop_job, self._images), sent)
        for draws, result in zip(awaited, results(self._pool), strict=True):
            source: Tensor = draws.index
            unreadable: tuple[Unreadable, ...] = ()
            if result.failures:
                assert not isinstance(self._images, Tensor)
                source, unreadable = _substitute(result, draws, self._images, self._recipe)
            # Drawing again is cheaper than carrying eleven small tensors out of the worker.
            parameters = self._recipe.parameters(draws, height=result.height, width=result.width)
            yield CroppedBatch(
                index=draws.index,
                source=source,
                unreadable=unreadable,
                parameters=parameters,
                crops=result.crops,
            )


def _crop_job(all_images: Tensor | tuple[Path, ...], draws: Draws) -> _CropJob:
    # The job carries its images, so that no worker holds a copy of the dataset or of its million paths.
    images = (
        all_images[draws.index].numpy()
        if isinstance(all_images, Tensor)
        else [all_images[i] for i in draws.index.tolist()]
    )
    return _CropJob(
        epoch=draws.epoch, index=draws.index.numpy(), draw=draws.draw.numpy(), images=images
    )


def _cut(job: _CropJob, *, recipe: Recipe) -> _CropResult:
    images, failures = (
        Decoded(list(torch.from_numpy(job.images)), {})
        if isinstance(job.images, np.ndarray)
        else decode_images(job.images)
    )
    draws = Draws(
        epoch=job.epoch, index=torch.from_numpy(job.index), draw=torch.from_numpy(job.draw)
    )
    height = torch.tensor([image.shape[1] for image in images])
    width = torch.tensor([image.shape[2] for image in images])
    size = recipe.image_size
    views = []
    for parameters in recipe.parameters(draws, height=height, width=width):
        crops = torch.empty(len(images), images[0].shape[0], size, size, dtype=torch.uint8)
        for image, box, crop in zip(images, parameters.box.tolist(), crops, strict=True):
            _cut_resized(image, box, crop)
        views.append(crops)
    return _CropResult(failures, height, width, tuple(views))


def _substitute(
    result: _CropResult, draws: Draws, files: Sequence[Path], recipe: Recipe
) -> tuple[Tensor, tuple[Unreadable, ...]]:
    """Fill the black rows of a result with substitutes.

    The main process does this, because it alone has every path. Unreadable images are few.

    Returns:
        ``source`` and ``unreadable`` of the batch.
    """
    source, unreadable = draws.index.clone(), []
    for position, reason in result.failures.items():
        row = slice(position, position + 1)
        index = int(draws.index[position])
        image = Unreadable(index, str(files[index]), reason)
        unreadable.append(image)
        source[position], pixels = read_substitute(image, files, seed=recipe.seed)
        job = _CropJob(
            epoch=draws.epoch,
            index=draws.index[row].numpy(),
            draw=draws.draw[row].numpy(),
            images=pixels[None].numpy(),
        )
        cut = _cut(job, recipe=recipe)
        result.height[row], result.width[row] = cut.height, cut.width
        for crops, crop in zip(result.crops, cut.crops, strict=True):
            crops[row] = crop
    return source, tuple(unreadable)


def _cut_resized(image: Tensor, box: list[int], out: Tensor) -> None:
    """Set ``out``, uint8 (channels, size, size), to the ``resized_crop`` of one image, rounded."""
    resized = _resized(image, box, out.shape[-1])
    # numpy turns floats into bytes several times as fast as torch does.
    np.copyto(out.numpy(), resized.round_().clamp_(0, 255).numpy(), casting="unsafe")


def _resized(image: Tensor, box: list[int], size: int) -> Tensor:
    """``resized_crop`` of one image, in grey levels, float32 (channels, size, size).

    ``resized_crop`` multiplies by dense matrices, which is fast for batches on a device. For one large image this
    function is faster.
    """
    top, left, height, width = box
    rows = slice(max(top, 0), max(top + height, 0))
    columns = slice(max(left, 0), max(left + width, 0))
    crop = image[None, :, rows, columns].to(torch.float32)
    if crop.shape[2:] != (height, width):
        above, before = min(max(-top, 0), height), min(max(-left, 0), width)
        below, after = height - above - crop.shape[2], width - before - crop.shape[3]
        crop = pad(crop, (before, after, above, below))
    resized = interpolate(crop, (size, size), mode="bilinear", antialias=True)
    return resized[0]
