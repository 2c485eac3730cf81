"""Batches of random views for training.

A training batch is a function of (dataset, recipe, seed, epoch, step) and of nothing else. The
number of workers, the number of ranks and the step at which an epoch is resumed do not matter.
Which files of the dataset can be decoded does matter: another image, drawn by counters too, takes
the place of an unreadable one.

Dimensions: N images, B batch per rank. Image tensors are (B, channels, height, width).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from peerlearn.data.augment import (
    ViewParameters,
    distort,
    draw_view_parameters,
    normalise,
    pixels,
    resized_crop,
)
from peerlearn.data.beton_facts import read_facts
from peerlearn.data.beton_file import packed_rows
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.held_images import HeldImages, held_in_memory, readable_sources
from peerlearn.data.recipes import Augmentation
from peerlearn.data.sampler import Sampler, block_of, check_class_aware, class_aware, shuffled
from peerlearn.data.threads import ahead
from peerlearn.data.unreadable import (
    Decoded,
    Unreadable,
    check_unreadable_rate,
    decode_images,
    read_substitute,
)
from peerlearn.data.workers import Jobs, results, worker_pool
from peerlearn.errors import UserError

# Largest share of the device's free memory that images may take. The rest is for the networks.
_RESIDENT_SHARE = 0.25
# Up to so many pixels of an image the matrices of ``resized_crop`` are faster than one image after another on a CPU.
_SMALL_PIXELS = 48**2


class ViewBatch(NamedTuple):
    """The batch of one rank in one step.

    Attributes:
        index: number of each image in the dataset, int64 (B,), on the CPU.
        labels: class of each image, int64 (B,), on the device; None for a dataset without labels.
        views: one float32 (B, channels, size, size) per view, on the device, normalised.
        unreadable: images of ``index`` that cannot be decoded, in the batch's order. Their rows hold
            the label and the views of a substitute (``peerlearn.data.unreadable.substitutes``).
    """

    index: Tensor  # type: ignore[assignment]  # not tuple.index
    labels: Tensor | None
    views: tuple[Tensor, ...]
    unreadable: tuple[Unreadable, ...]


def sampler_of(
    dataset: ImageDataset, *, batch_size_global: int, seed: int, images_per_class: int | None = None
) -> Sampler:
    """Batches of the dataset's images, shuffled or, with ``images_per_class``, class-aware.

    Raises:
        UserError: the dataset has not even a batch, or not the labels that groups of a class need.
    """
    if batch_size_global < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size_global}")
    if len(dataset) < batch_size_global:
        raise UserError(
            f"{dataset.title} {dataset.split} has {len(dataset)} images, fewer than one batch: "
            f"lower batch_size ({batch_size_global}) or raise data.limit"
        )
    steps = len(dataset) // batch_size_global
    if images_per_class is None:
        order = partial(shuffled, len(dataset), batch_size=batch_size_global, seed=seed)
        return Sampler(batch_size_global, steps, lambda epoch: order(epoch=epoch))
    labels = _labels(dataset)
    check_class_aware(labels, batch_size=batch_size_global, images_per_class=images_per_class)
    grouped = partial(
        class_aware,
        labels,
        batch_size=batch_size_global,
        images_per_class=images_per_class,
        seed=seed,
    )
    return Sampler(batch_size_global, steps, lambda epoch: grouped(epoch=epoch))


class ViewLoader:
    """Random views of a dataset, epoch by epoch, for one rank.

    The sampler chooses the images of the global batches. Rank r takes the r-th contiguous block of each batch, which
    may cut a group. Views follow ``draw_view_parameters``, so an image that an epoch draws again gets other
    views. The views of a substitute are drawn by the number of the image it stands for, so that its
    two uses differ. Its label is its own, so a group with a substitute may have two classes.

    The backend ``memory`` holds all images in memory, which must be of one size, and cuts crops on
    the device. Image files are decoded once, at the start. The images stay on a CUDA device if they
    take at most a quarter of its free memory, else in main memory. The backend ``folder`` decodes
    the images of a batch anew in each epoch, by worker processes, which hand over crops rounded to
    uint8: they differ from memory's by up to 1/510. The backend ``ffcv`` takes images of a packed file, which threads
    decode ahead, whole and once for all views; they are cut on the device, and equal memory's where the file holds
    the pixels. Flips and colours follow on the device in all three.

    Args:
        dataset: images to view.
        augmentation: recipe of the views, or one recipe for each of them.
        sampler: images of every batch, over all ranks.
        backend: memory, folder or ffcv, as above.
        image_size: height and width of the views in pixels.
        seed: seed of the views.
        device: device of the views.
        views: number of views of each image.
        rank: number of this rank.
        world_size: number of ranks.
        workers: number of processes that decode images, with ffcv of threads; 0 = this one.
        max_unreadable_percent: largest share of images that memory or ffcv may fail to decode. With folder
            the caller counts, over an epoch and all ranks, and calls ``check_unreadable_rate``.

    Attributes:
        steps_per_epoch: number of batches in an epoch.
        unreadable: images of the whole dataset that memory or ffcv could not decode before the start. With
            folder, each batch tells its own.

    Raises:
        UserError: the ranks cannot share a batch evenly, memory finds images of several sizes, or memory or ffcv too
            many unreadable ones. While an epoch runs, folder raises it for an image of which no substitute can be
            decoded, and ffcv where its file turns out damaged.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        augmentation: Augmentation | Sequence[Augmentation],
        *,
        sampler: Sampler,
        backend: Literal["memory", "folder", "ffcv"],
        image_size: int,
        seed: int,
        device: torch.device,
        views: int = 2,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_unreadable_percent: float = 1.0,
    ) -> None:
        self._block = block_of(rank, world_size, batch_size=sampler.batch_size)
        self.steps_per_epoch = sampler.steps
        self._sampler = sampler
        self._dataset = dataset
        self._device = device
        if isinstance(augmentation, Augmentation):
            augmentation = [augmentation] * views
        if len(augmentation) != views:
            raise ValueError(f"{views} views need as many recipes, got {len(augmentation)}")
        self._recipe = _Recipe(views=tuple(augmentation), image_size=image_size, seed=seed)
        self.unreadable: tuple[Unreadable, ...] = ()
        self._cropper: _Cropper
        if backend == "memory":
            held = held_in_memory(
                dataset,
                seed=seed,
                max_unreadable_percent=max_unreadable_percent,
                workers=workers,
                quiet=rank > 0,
            )
            self.unreadable = tuple(held.unreadable.values())
            self._cropper = _MemoryCropper(held, self._recipe, device)
        elif backend == "folder":
            self._cropper = _FolderCropper(dataset.images, self._recipe, device, workers)
        elif backend == "ffcv":
            assert not isinstance(dataset.images, Tensor)
            packed = _PackedCropper(dataset.images, self._recipe, device, workers)
            self.unreadable = tuple(packed.unreadable.values())
            check_unreadable_rate(
                len(self.unreadable), len(dataset), max_unreadable_percent, self.unreadable
            )
            self._cropper = packed
        else:
            raise ValueError(f"unknown backend {backend!r}")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ViewBatch]:
        """The batches of an epoch from ``start_step`` on, equal to those of the whole epoch."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is not in 0..{self.steps_per_epoch}")
        recipes, dataset = self._recipe.views, self._dataset
        for batch in self._cropper.cut(self._draws(epoch, start_step)):
            views = (
                distort(pixels(crops, self._device), parameters, recipe)
                for crops, parameters, recipe in zip(
                    batch.crops, batch.parameters, recipes, strict=True
                )
            )
            yield ViewBatch(
                index=batch.index,
                labels=None if dataset.labels is None else self._to_device(dataset.labels, batch),
                views=tuple(normalise(view, dataset.mean, dataset.std) for view in views),
                unreadable=batch.unreadable,
            )

    def _to_device(self, labels: Tensor, batch: "_CroppedBatch") -> Tensor:
        return labels[batch.source].to(self._device, non_blocking=True)

    def _draws(self, epoch: int, start_step: int) -> Iterator["_Draws"]:
        order = self._sampler.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            yield _Draws(
                epoch=epoch,
                index=order.index[step, self._block],
                draw=order.draw[step, self._block],
            )


def _labels(dataset: ImageDataset) -> Tensor:
    if dataset.labels is None:
        raise UserError(
            f"{dataset.title} {dataset.split} has no labels, which batches by images_per_class need: "
            "choose another data.name or data.split, or leave images_per_class out"
        )
    return dataset.labels


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    views: tuple[Augmentation, ...]
    image_size: int
    seed: int

    def parameters(
        self, draws: "_Draws", *, height: int | Tensor, width: int | Tensor
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
class _Draws:
    """The images of one batch of this rank, (B,), and how often the epoch has drawn each of them before."""

    epoch: int
    index: Tensor
    draw: Tensor


@dataclass(frozen=True, kw_only=True)
class _CroppedBatch:
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


class _Cropper(Protocol):
    def cut(self, batches: Iterator[_Draws]) -> Iterator[_CroppedBatch]: ...


class _MemoryCropper:
    def __init__(self, held: HeldImages, recipe: _Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._images = held.images.to(device) if _fits(held.images, device) else held.images
        self._source, self._unreadable = held.source, held.unreadable

    def cut(self, batches: Iterator[_Draws]) -> Iterator[_CroppedBatch]:
        height, width = self._images.shape[2:]
        for draws in batches:
            parameters = self._recipe.parameters(draws, height=height, width=width)
            source = self._source[draws.index]
            images = self._images[source.to(self._images.device, non_blocking=True)]
            images = images.to(self._device, non_blocking=True)
            crops = (resized_crop(images, one.box, self._recipe.image_size) for one in parameters)
            yield _CroppedBatch(
                index=draws.index,
                source=source,
                unreadable=_those_of(draws, self._unreadable),
                parameters=parameters,
                crops=tuple(crops),
            )


def _those_of(draws: _Draws, unreadable: Mapping[int, Unreadable]) -> tuple[Unreadable, ...]:
    return tuple(unreadable[i] for i in draws.index.tolist() if i in unreadable)


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= _RESIDENT_SHARE * free_bytes


class _PackedCropper:
    """Each image is decoded once for all views, by threads, which end with the epoch.

    Attributes:
        unreadable: images that could not be decoded when they were packed, by their number.
    """

    def __init__(
        self, images: tuple[Path, ...], recipe: _Recipe, device: torch.device, workers: int
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

    def cut(self, batches: Iterator[_Draws]) -> Iterator[_CroppedBatch]:
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
                yield _CroppedBatch(
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
            yield _CroppedBatch(
                index=draws.index,
                source=source,
                unreadable=unreadable,
                parameters=parameters,
                crops=result.crops,
            )


def _crop_job(all_images: Tensor | tuple[Path, ...], draws: _Draws) -> _CropJob:
    # The job carries its images, so that no worker holds a copy of the dataset or of its million paths.
    images = (
        all_images[draws.index].numpy()
        if isinstance(all_images, Tensor)
        else [all_images[i] for i in draws.index.tolist()]
    )
    return _CropJob(
        epoch=draws.epoch, index=draws.index.numpy(), draw=draws.draw.numpy(), images=images
    )


def _cut(job: _CropJob, *, recipe: _Recipe) -> _CropResult:
    images, failures = (
        Decoded(list(torch.from_numpy(job.images)), {})
        if isinstance(job.images, np.ndarray)
        else decode_images(job.images)
    )
    draws = _Draws(
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
    result: _CropResult, draws: _Draws, files: Sequence[Path], recipe: _Recipe
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
