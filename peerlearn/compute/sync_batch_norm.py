"""Batch norm over the batches of all ranks."""

import torch
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the global batch of all ranks, on any device (torch's own needs GPUs).

    Ranks may bring batches of several sizes. In eval mode, and for a single rank, it is plain batch norm, with the same
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
        with torch.autocast(input.device.type, enabled=False):
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            # Two passes, for E[x^2] - E[x]^2 loses the digits of a small variance.
            total, count = self._sums_over_ranks(wide)
            mean = total / count
            centred = wide - mean.view(1, -1, 1, 1)
            variance = self._sums_over_ranks(centred.square())[0] / count
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

    def _sums_over_ranks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, channels, H, W): the sum of each channel, (channels,), and the number of its values, (1,)."""
        count = values.new_full((1,), values.numel() // values.shape[1])
        sums = torch.cat([values.sum((0, 2, 3)), count]).unsqueeze(0)
        channels: Tensor = self.ranks.gather_with_gradient(sums).sum(0)
        return channels[:-1], channels[-1:].detach()


def sync_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Turn every batch norm of images in ``module`` into a `SyncBatchNorm2d`, in place.

    Raises:
        ValueError: a batch norm is of a kind that cannot be turned.
    """
    for child in turn_batch_norm(module, SyncBatchNorm2d):
        child.ranks = ranks  # type: ignore[assignment]


def turn_batch_norm(module: nn.Module, kind: type[nn.BatchNorm2d]) -> list[nn.Module]:
    """Give every batch norm of images in ``module`` another class, in place, and return those that got it.

    timm fuses batch norm and activation in subclasses of ``BatchNorm2d``; their forward is not plain batch norm.

    Raises:
        ValueError: a batch norm is of such a kind.
    """
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
