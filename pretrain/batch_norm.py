"""Batch norm over parts of one device's batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.compute.sync_batch_norm import turn_batch_norm


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over ``splits`` contiguous parts of the batch, each with its own statistics (MoCo's CIFAR recipe).

    The running statistics are the mean over the parts, as one of several devices' would be on average. In eval mode
    it is plain batch norm, with the same parameters and buffers.
    """

    splits = 1

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same; B must divide by ``splits`` in training."""
        if not self.training or self.splits == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # One row per part. Parts are slices, not a reshape into more channels, to keep channels_last.
        means = self.running_mean.repeat(self.splits, 1)
        variances = self.running_var.repeat(self.splits, 1)
        parts = [
            F.batch_norm(
                part,
                mean,
                variance,
                self.weight,
                self.bias,
                training=True,
                momentum=self.momentum or 0.0,
                eps=self.eps,
            )
            for part, mean, variance in zip(input.chunk(self.splits), means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked += 1
        return torch.cat(parts)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Turn every batch norm of images in ``module`` into a `SplitBatchNorm2d`, in place.

    Raises:
        ValueError: a batch norm is of a kind that cannot be turned.
    """
    for child in turn_batch_norm(module, SplitBatchNorm2d):
        child.splits = splits  # type: ignore[assignment]
