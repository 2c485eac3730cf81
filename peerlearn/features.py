"""Features of a dataset: the pooled output of one or several backbones, without augmentation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peerlearn.datasets import ImageDataset
from peerlearn.loader import evaluation_batches


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
) -> list[Tensor]:
    """Encode every image once with every backbone, in eval mode and in the dataset's order.

    Args:
        backbones: map (B, channels, S, S) to (B, num_features).
        image_size: S, side of the evaluation view.
        progress: is told the number of images of each batch done.

    Returns:
        One (N, num_features) float32 tensor per backbone, on the CPU.
    """
    features: list[list[Tensor]] = [[] for _ in backbones]
    with eval_mode(backbones):
        for images in evaluation_batches(
            dataset, image_size=image_size, batch_size=batch_size, device=device, workers=workers
        ):
            images = images.contiguous(memory_format=torch.channels_last)
            for found, backbone in zip(features, backbones, strict=True):
                found.append(backbone(images).float().cpu())
            progress(len(images))
    return [torch.cat(found) for found in features]


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
