"""Loaders for tests that say how large a batch is, and leave the sampler to the dataset; packed datasets for them."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest

from peerlearn.data.beton_dataset import is_packed, packed_dataset
from peerlearn.data.beton_writer import pack
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
    """A loader of shuffled or class-aware batches, its order and views by one seed. Backend ffcv packs as raw first."""
    if arguments["backend"] == "ffcv":
        dataset = packed_copy(dataset)
    sampler = sampler_of(
        dataset,
        batch_size_global=batch_size_global,
        seed=seed,
        images_per_class=images_per_class,
    )
    return ViewLoader(dataset, sampler=sampler, seed=seed, **arguments)


HAS_FFCV = importlib.util.find_spec("ffcv") is not None
NEEDS_FFCV = pytest.mark.skipif(not HAS_FFCV, reason="needs the extra ffcv")
BACKENDS = ["memory", "folder", pytest.param("ffcv", marks=NEEDS_FFCV)]
# Packed files of this process. They go with it.
_packed = tempfile.TemporaryDirectory(prefix="packed-")


def packed_copy(dataset: ImageDataset, **options: Any) -> ImageDataset:
    """The dataset from a packed file, raw unless told otherwise, which is made once for each content."""
    if is_packed(dataset):
        return dataset
    key = f"{dataset.fingerprint()[:16]}-{abs(hash((dataset.mean, dataset.std, str(options))))}"
    file = Path(_packed.name, f"{key}.beton")
    if not file.exists():
        pack(dataset, file, **{"format": "raw", "max_unreadable_percent": 100.0, **options})
    return packed_dataset(file, dataset.name, dataset.split)
