"""What the networks of a cohort send each other where they lie on different processes (`pretrain.parallel_config`).

Dimensions: M networks, B batch over all processes, R ranks of a team, P processes, D embedding size.

Every team sees the whole batch; of its networks' embeddings each of its ranks makes those of a contiguous part. Losses
need all networks of an image together, and they are computed as in data parallelism: rank r takes part r of P of the
batch, and holds all queues. So embeddings travel between teams, and their gradients come back; weights and queues stay
where they are, and so do images, but for views that a team shuffles among its own ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peerlearn.compute.dist import Ranks
from pretrain.parallel_config import Team


class Exchange:
    """The way of embeddings and logits between teams, for one of the ranks.

    Attributes:
        ranks: all processes.
        team: processes that train the same networks as this one.
        networks: numbers of those networks.
        is_split: whether there is more than one team.
        bytes_sent: bytes of keys, embeddings and their gradients, and of views that are shuffled within a team, that
            this rank has handed to collectives so far.
    """

    def __init__(self, ranks: Ranks, teams: Sequence[Team]) -> None:
        self.ranks = ranks
        self.team = ranks.split([team.ranks for team in teams])
        self.networks = next(team.networks for team in teams if ranks.rank in team.ranks)
        self.is_split = len(teams) > 1
        self.bytes_sent = 0
        self._teams = teams

    @classmethod
    def of_one_team(cls, ranks: Ranks, networks: int) -> "Exchange":
        """Every rank holds all networks: nothing but gradients travels."""
        return cls(ranks, [Team(tuple(range(networks)), tuple(range(ranks.world_size)))])

    def whole(self, own: Tensor) -> Tensor:
        """What all networks make of all images: (M, B, ...) from this rank's (networks, B / R, ...).

        It is differentiable as `Ranks.gather_with_gradient` is: a loss that every rank computes from the whole, or
        from its own part, counts once in the mean over a team's ranks if each rank's is a mean over its images.
        """
        if not self.is_split:
            return self.ranks.gather_with_gradient(own, dim=1)
        if not own.requires_grad:
            # Networks that do not learn: backward comes here on all ranks alike, or they would wait for this one.
            own = own.detach().requires_grad_(torch.is_grad_enabled())
        whole: Tensor = _Whole.apply(own, self)
        return whole

    def part(self, own: Tensor) -> Tensor:
        """What all networks make of this rank's images of the loss: (M, B / P, ...); differentiable as `whole` is."""
        return self.own_part(self.whole(own)) if self.is_split else own

    def own_part(self, whole: Tensor) -> Tensor:
        """This rank's images of the loss, of (M, B, ...)."""
        size = whole.shape[1] // self.ranks.world_size
        return whole[:, self.ranks.rank * size : (self.ranks.rank + 1) * size]

    def labels(self, own: Tensor) -> Tensor:
        """The labels (B,) of all images, from those of this rank's views: those that the first team has read.

        Another team may have had a substitute for an image that it alone could not read.
        """
        if not self.is_split:
            return self.ranks.gather(own)
        return self.gather(own.expand(len(self.networks), -1))[0]

    @torch.no_grad()
    def gather(self, own: Tensor) -> Tensor:
        """`whole` without gradient."""
        if not self.is_split:
            self.bytes_sent += own.nbytes if self.ranks.world_size > 1 else 0
            return self.ranks.gather(own, dim=1)
        # Teams of unlike sizes make unlike numbers of rows; one collective takes one size.
        rest = own.shape[2:]
        batch = own.shape[1] * self.team.world_size
        sizes = [len(t.networks) * (batch // len(t.ranks)) * rest.numel() for t in self._teams]
        sent = own.new_zeros(1, max(sizes))
        sent[0, : own.numel()] = own.detach().reshape(-1)
        self.bytes_sent += sent.nbytes
        rows = self.ranks.gather(sent)
        whole = own.new_empty(sum(len(t.networks) for t in self._teams), batch, *rest)
        for team, size in zip(self._teams, sizes, strict=True):
            # Slices, for the host would wait while a list of numbers goes to the device.
            parts = rows[_slice(team.ranks), :size]
            shape = (len(team.ranks), len(team.networks), batch // len(team.ranks), *rest)
            whole[_slice(team.networks)] = parts.reshape(shape).transpose(0, 1).flatten(1, 2)
        return whole

    def within_team(self, own: Tensor, dim: int = 0) -> Tensor:
        """The tensors of the ranks of this team side by side along ``dim``. No gradient passes."""
        self.bytes_sent += own.nbytes if self.team.world_size > 1 else 0
        return self.team.gather(own, dim=dim)

    def of_all_teams(self, own: Tensor) -> Tensor:
        """`gather` of what this team's networks make of the whole batch, (networks, B, ...), on each of its ranks."""
        if not self.is_split:
            return own
        size = own.shape[1] // self.team.world_size
        return self.gather(own[:, self.team.rank * size : (self.team.rank + 1) * size])

    def own_gradient(self, of_whole: Tensor) -> Tensor:
        """The gradient of this rank's (networks, B / R, ...), from every rank's gradient of the whole."""
        self.bytes_sent += of_whole.nbytes
        total = self.ranks.add_up(of_whole)
        size = total.shape[1] // self.team.world_size
        first = self.team.rank * size
        own = total[_slice(self.networks), first : first + size]
        # The mean over the ranks of the team follows, and the loss is a mean over all ranks.
        return own * (self.team.world_size / self.ranks.world_size)


def _slice(numbers: Sequence[int]) -> slice:
    """Consecutive numbers, as those of a team are."""
    return slice(numbers[0], numbers[-1] + 1)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_whole: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.own_gradient(of_whole.contiguous()), None
