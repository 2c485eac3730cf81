"""Features of a dataset: the pooled output of one or several backbones, without augmentation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peerlearn.datasets import ImageDataset
from peerlearn.loader import evaluation_batches
from peerlearn.unreadable import Unreadable


@torch.no_grad()
def extract_features(
    backbones: Sequence[nn.Module],
    dataset: ImageDataset,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
    workers: int,
    progress: Callable[[int], object] = lambda images: None,
    unreadable: list[Unreadable] | None = None,
) -> list[Tensor]:
    """Encode every image once with every backbone, in eval mode and in the dataset's order.

    Args:
        backbones: map (B, channels, S, S) to (B, num_features).
        image_size: S, side of the evaluation view.
        progress: is told the number of images of each batch done.
        unreadable: where a list is given, images that cannot be decoded are appended to it, and their rows are
            zeros, to be left out of any score.

    Returns:
        One (N, num_features) float32 tensor per backbone, on the CPU.

    Raises:
        UserError: an image cannot be decoded, and no list was given.
    """
    known = len(unreadable or ())
    features: list[list[Tensor]] = [[] for _ in backbones]
    with eval_mode(backbones):
        for images in evaluation_batches(
            dataset,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            workers=workers,
            unreadable=unreadable,
        ):
            images = images.contiguous(memory_format=torch.channels_last)
            for found, backbone in zip(features, backbones, strict=True):
                found.append(backbone(images).float().cpu())
            progress(len(images))
    whole = [torch.cat(found) for found in features]
    for rows in whole:
        for image in (unreadable or [])[known:]:
            rows[image.index] = 0
    return whole


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run the modules in eval mode, then put each back into the mode it was in."""
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
