"""Batch norm over parts of one device's batch, or over the batches of all ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks
from pretrain.losses import widen


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


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the global batch of all ranks, on any device (torch's own needs GPUs).

    Ranks must bring batches of one size. In eval mode, and for a single rank, it is plain batch norm, with the same
    parameters and buffers.
    """

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same."""
        if not self.training or self.ranks.world_size == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = self.ranks.world_size * input.numel() // input.shape[1]
        with torch.autocast(input.device.type, enabled=False):
            wide = widen(input)
            # Two passes, for E[x^2] - E[x]^2 loses the digits of a small variance.
            mean = self._sum_over_ranks(wide) / count
            centred = wide - mean.view(1, -1, 1, 1)
            variance = self._sum_over_ranks(centred.square()) / count
            scale = torch.rsqrt(variance + self.eps)
            if self.weight is not None:
                scale = scale * self.weight
            output = centred * scale.view(1, -1, 1, 1)
            if self.bias is not None:
                output = output + self.bias.view(1, -1, 1, 1)
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
            self.num_batches_tracked += 1
        return output.to(input.dtype)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        parts = self.ranks.gather_with_gradient(values.sum((0, 2, 3)).unsqueeze(0))
        return parts.sum(0)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Turn every batch norm of images in ``module`` into a `SplitBatchNorm2d`, in place.

    Raises:
        ValueError: a batch norm is of a kind that cannot be turned.
    """
    for child in _turn(module, SplitBatchNorm2d):
        child.splits = splits  # type: ignore[assignment]


def sync_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Turn every batch norm of images in ``module`` into a `SyncBatchNorm2d`, in place.

    Raises:
        ValueError: a batch norm is of a kind that cannot be turned.
    """
    for child in _turn(module, SyncBatchNorm2d):
        child.ranks = ranks  # type: ignore[assignment]


def _turn(module: nn.Module, kind: type[nn.BatchNorm2d]) -> list[nn.Module]:
    """timm fuses batch norm and activation in subclasses of ``BatchNorm2d``; their forward is not plain batch norm."""
    turned: list[nn.Module] = []
    for name, child in module.named_modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = kind
            turned.append(child)
        elif isinstance(child, nn.BatchNorm2d) and type(child) is not kind:
            raise ValueError(
                f"{name} is a {type(child).__name__}, which cannot be split or synchronised"
            )
    return turned
