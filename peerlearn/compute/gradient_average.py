"""The gradients' mean over the ranks, which travels while backward still computes."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from peerlearn.compute.dist import Ranks, Sum, buckets_of


class GradientAverage:
    """Replaces every gradient by its mean over the ranks, as `Ranks.average_` does and bit for bit.

    A bucket of gradients is sent as soon as backward has made the last of them. The buckets lie as the parameters'
    shapes say, and they are sent from the last to the first on every rank, whichever is ready first: backward comes to
    the last layers first. So the sums have one order, and no rank waits for a bucket that another has not sent.
    A parameter without a gradient counts as 0 and stays without.

    Attributes:
        bytes_sent: number of bytes of a step's gradients that a rank hands to the sums.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        self._buckets: list[list[nn.Parameter]] = []
        self._to_come: list[int] = []
        self._sent: list[Sum] = []
        self.bytes_sent = 0
        if ranks.world_size == 1:
            return
        self._buckets = list(buckets_of([p for p in parameters if p.requires_grad]))[::-1]
        self.bytes_sent = sum(p.nbytes for bucket in self._buckets for p in bucket)
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._note, number))

    def begin(self) -> None:
        """Send what the next backward pass, the last one of the step, makes."""
        self._to_come = [len(bucket) for bucket in self._buckets]

    @torch.no_grad()
    def finish(self) -> None:
        """Send the rest, and wait for all. Every rank calls it once a step, whatever became of its backward pass."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, total in zip(self._buckets, self._sent, strict=True):
            means = total.wait().split([parameter.numel() for parameter in bucket])
            for parameter, mean in zip(bucket, means, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view(parameter.shape))
        self._to_come, self._sent = [], []

    def _note(self, number: int, parameter: Tensor) -> None:
        """Backward has made a gradient of this bucket."""
        if not self._to_come:
            return
        self._to_come[number] -= 1
        while len(self._sent) < len(self._buckets) and not self._to_come[len(self._sent)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._sent.append(self._ranks.begin_sum(flat.div_(self._ranks.world_size)))
