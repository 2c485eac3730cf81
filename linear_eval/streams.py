"""Training images with random crops and flips, on their way through frozen networks, shared by all ranks.

Dimension letters: B batch, D feature dimensions.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from linear_eval.classifiers import Batches
from linear_eval.config import LinearConfig
from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewLoader, sampler_of
from peerlearn.data.recipes import Augmentation
from peerlearn.errors import UserError
from peerlearn.evaluation.feature_sets import with_ensemble
from peerlearn.evaluation.networks import by_input


def view_loader(
    config: LinearConfig, dataset: ImageDataset, *, image_size: int, batch_size: int, ranks: Ranks
) -> ViewLoader:
    """One random crop, and a flip, of every training image per epoch, this rank's part of each batch.

    NOTE: the last incomplete batch of an epoch is dropped; MoCo's linear protocol takes it.
    """
    low, high = config.crop_scale
    return ViewLoader(
        dataset,
        Augmentation(crop_scale=(low, high)),
        sampler=sampler_of(dataset, batch_size_global=batch_size, seed=config.seed),
        backend="folder" if dataset.has_files else "memory",
        image_size=image_size,
        seed=config.seed,
        device=ranks.device,
        views=1,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.data.workers,
    )


def step_size(config: LinearConfig, images: int, ranks: Ranks) -> int:
    """Images per step: those asked for, or as many as there are.

    Raises:
        UserError: the ranks cannot share them in equal parts.
    """
    size = min(config.batch_size, images)
    if size % ranks.world_size:
        raise ranks.told_once(
            UserError(
                f"{size} images per step cannot be shared by {ranks.world_size} processes: set batch_size to a "
                f"multiple of {ranks.world_size} up to {images}"
            )
        )
    return size


def streamed_batches(
    config: LinearConfig,
    dataset: ImageDataset,
    backbones: Mapping[str, nn.Module],
    ranks: Ranks,
    *,
    ensemble: bool = False,
) -> Batches:
    """Batches of features of augmented images: every rank encodes its part, and all get the whole batch.

    With ``ensemble`` the joint features of all networks stand beside theirs.
    """
    batch_size = step_size(config, len(dataset), ranks)
    loaders = [
        (view_loader(config, view, image_size=size, batch_size=batch_size, ranks=ranks), names)
        for view, size, names in by_input(backbones, dataset)
    ]

    def epoch(number: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        for batches in zip(*(loader.epoch(number) for loader, _ in loaders), strict=True):
            features: dict[str, Tensor] = {}
            with torch.no_grad():
                for batch, (_, names) in zip(batches, loaders, strict=True):
                    images = batch.views[0].contiguous(memory_format=torch.channels_last)
                    for name in names:
                        features[name] = ranks.gather(backbones[name](images).float())
            labels = batches[0].labels
            assert labels is not None
            joined = with_ensemble(features) if ensemble else features
            yield joined, ranks.gather(labels)

    return Batches(epoch, batch_size, loaders[0][0].steps_per_epoch)
