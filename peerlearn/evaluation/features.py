"""Features of a dataset: the pooled output of one or several backbones, without augmentation.

Dimension letters: N images, D feature dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.evaluation_views import evaluation_batches
from peerlearn.data.unreadable import Unreadable
from peerlearn.runs.progress import phase

# Of one rank, sent at once.
_GATHERED_ROWS = 2**16


@torch.no_grad()
def extract_features(
    backbones: Sequence[nn.Module],
    dataset: ImageDataset,
    *,
    image_size: int,
    batch_size: int,
    device: torch.device,
    workers: int,
    progress: Callable[[int], object] | None = None,
    unreadable: list[Unreadable] | None = None,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Encode every image once with every backbone, in eval mode and in the dataset's order.

    Args:
        backbones: map (B, channels, S, S) to (B, D). One that is given twice runs once.
        image_size: S, side of the evaluation view.
        progress: is told the number of images of each batch done, of all ranks together; None = they are shown as a
            part of whatever is reported, "measuring".
        unreadable: where a list is given, images that cannot be decoded are appended to it, and their rows are
            zeros, to be left out of any score. For one process only.
        ranks: the processes that share the work, all of which get all features; None = this one alone.

    Returns:
        One (N, D) float32 tensor per backbone, on the CPU.

    Raises:
        UserError: an image cannot be decoded, and no list was given.
    """
    known = len(unreadable or ())
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    # Contiguous parts, as equal as can be: no image is left out and none is seen twice.
    first, last = (len(dataset) * part // world_size for part in (rank, rank + 1))
    distinct = {id(backbone): backbone for backbone in backbones}
    features: dict[int, list[Tensor]] = {key: [] for key in distinct}
    with eval_mode(backbones), ExitStack() as held:
        if progress is None:
            progress = held.enter_context(phase("measuring", len(dataset), quiet=rank > 0))
        for images in evaluation_batches(
            dataset,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            workers=workers,
            start=first,
            stop=last,
            unreadable=unreadable,
        ):
            images = images.contiguous(memory_format=torch.channels_last)
            for key, backbone in distinct.items():
                features[key].append(backbone(images).float().cpu())
            progress(len(images) * world_size)
    whole = {}
    for key, batches in features.items():
        part = torch.cat(batches) if batches else torch.empty(0)
        whole[key] = _gather_rows(part, len(dataset), ranks) if ranks else part
        for image in (unreadable or [])[known:]:
            whole[key][image.index] = 0
    return [whole[id(backbone)] for backbone in backbones]


def _gather_rows(part: Tensor, total: int, ranks: Ranks) -> Tensor:
    """Every rank's part of ``total`` rows, put together in rank order; parts differ by at most one row."""
    if ranks.world_size == 1:
        return part
    ends = [total * (rank + 1) // ranks.world_size for rank in range(ranks.world_size)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # A rank without an image does not know the width.
    width = max(ranks.collect(part.shape[-1] if len(part) else 0))
    padded = part.new_zeros((max(sizes), width))
    if len(part):
        padded[: len(part)] = part
    gathered = [
        ranks.gather(rows.unsqueeze(0).to(ranks.device)).cpu()
        for rows in padded.split(_GATHERED_ROWS)
    ]
    by_rank = torch.cat(gathered, dim=1)
    return torch.cat([rows[:size] for rows, size in zip(by_rank, sizes, strict=True)])


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
