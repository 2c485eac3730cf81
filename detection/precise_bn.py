"""PreciseBN: the statistics of batch norm over many batches with the weights as they are (Wu and Johnson 2021).

Detectron2 measures them anew before each test, as MoCo's recipes ask for.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peerlearn.compute.dist import Ranks


@torch.no_grad()
def measure_batch_norm(
    module: nn.Module, passes: Iterable[Callable[[], object]], ranks: Ranks
) -> None:
    """Give every batch norm the mean and the variance of its inputs over the passes of all ranks, in float64.

    The passes are those of training, in which each batch is normalised by its own statistics. Where there is no batch
    norm, none of them is run. All ranks call it together, with as many passes each.

    Args:
        module: module in training mode.
        passes: functions that each run the module on a batch of this rank.
        ranks: processes that measure together.
    """
    norms = [module for module in module.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    sums = [norm.running_mean.new_zeros(3, norm.num_features).double() for norm in norms]  # type: ignore[union-attr]
    handles = [_watch(norm, total) for norm, total in zip(norms, sums, strict=True)]
    counts = [int(norm.num_batches_tracked) for norm in norms]  # type: ignore[arg-type]
    try:
        for run in passes:
            run()
    finally:
        for handle in handles:
            handle.remove()
    for norm, total, count in zip(norms, sums, counts, strict=True):
        number, plain, squared = ranks.add_up(total)
        mean = plain / number
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.running_mean.copy_(mean)
        # Rounding may take it below 0.
        norm.running_var.copy_((squared / number - mean.square()).clamp_min(0))
        norm.num_batches_tracked.fill_(count)


def _watch(norm: nn.BatchNorm2d, total: Tensor) -> RemovableHandle:
    """Add up the number, the values and the squares of a norm's inputs, (3, channels)."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double()
        total[0] += values.numel() // values.shape[1]
        total[1] += values.sum((0, 2, 3))
        total[2] += values.square().sum((0, 2, 3))

    return norm.register_forward_pre_hook(add)
