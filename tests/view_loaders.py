"""Loaders for tests that say how large a batch is, and leave the sampler to the dataset."""

from typing import Any

from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import ViewLoader, sampler_of


def view_loader(
    dataset: ImageDataset,
    *,
    batch_size_global: int,
    seed: int,
    images_per_class: int | None = None,
    **arguments: Any,
) -> ViewLoader:
    """A loader of shuffled or class-aware batches, its order and views by one seed."""
    sampler = sampler_of(
        dataset,
        batch_size_global=batch_size_global,
        seed=seed,
        images_per_class=images_per_class,
    )
    return ViewLoader(dataset, sampler=sampler, seed=seed, **arguments)
