"""Split batch norm: one device normalises its batch in parts, as several devices would."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    timm fuses batch norm and activation in subclasses of ``BatchNorm2d``; their forward is not plain batch norm.

    Raises:
        ValueError: such a subclass is present.
    """
    for name, child in module.named_modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SplitBatchNorm2d
            child.splits = splits  # type: ignore[assignment]
        elif isinstance(child, nn.BatchNorm2d) and not isinstance(child, SplitBatchNorm2d):
            raise ValueError(f"{name} is a {type(child).__name__}, which cannot be split")
