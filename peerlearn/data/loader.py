"""Batches of random views for training.

A training batch is a function of (dataset, recipe, seed, epoch, step) and of nothing else. The
number of workers, the number of ranks and the step at which an epoch is resumed do not matter.
Which files of the dataset can be decoded does matter: another image, drawn by counters too, takes
the place of an unreadable one.

Dimensions: N images, B batch per rank. Image tensors are (B, channels, height, width).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from peerlearn.data.augment import (
    distort,
    normalise,
    pixels,
)
from peerlearn.data.croppers import (
    CroppedBatch,
    Cropper,
    Draws,
    FolderCropper,
    MemoryCropper,
    PackedCropper,
    Recipe,
)
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.held_images import held_in_memory
from peerlearn.data.recipes import Augmentation
from peerlearn.data.sampler import Sampler, block_of, check_class_aware, class_aware, shuffled
from peerlearn.data.unreadable import (
    Unreadable,
    check_unreadable_rate,
)
from peerlearn.errors import UserError


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
        quiet: whether no progress of decoding is shown.
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
        quiet: bool = False,
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
        self._recipe = Recipe(views=tuple(augmentation), image_size=image_size, seed=seed)
        self.unreadable: tuple[Unreadable, ...] = ()
        self._cropper: Cropper
        if backend == "memory":
            held = held_in_memory(
                dataset,
                seed=seed,
                max_unreadable_percent=max_unreadable_percent,
                workers=workers,
                quiet=quiet,
            )
            self.unreadable = tuple(held.unreadable.values())
            self._cropper = MemoryCropper(held, self._recipe, device)
        elif backend == "folder":
            self._cropper = FolderCropper(dataset.images, self._recipe, device, workers)
        elif backend == "ffcv":
            assert not isinstance(dataset.images, Tensor)
            packed = PackedCropper(dataset.images, self._recipe, device, workers)
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

    def _to_device(self, labels: Tensor, batch: "CroppedBatch") -> Tensor:
        return labels[batch.source].to(self._device, non_blocking=True)

    def _draws(self, epoch: int, start_step: int) -> Iterator["Draws"]:
        order = self._sampler.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            yield Draws(
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
