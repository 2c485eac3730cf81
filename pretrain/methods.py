"""How views become loss terms: MoCo with its momentum peers and queue, and SimCLR; `pretrain.supervised` beside them.

Dimensions: M networks, B batch, K queue, D embedding size.
"""

import logging

import torch
from torch import Tensor

from peerlearn.compute.schedules import ema_momentum
from peerlearn.counter_random import SHUFFLE_BN, permutation
from pretrain.cohort import (
    Cohort,
    load_named_state,
    momentum_peers,
    named_state,
    update_momentum,
)
from pretrain.config import PretrainConfig
from pretrain.exchange import Exchange
from pretrain.key_queue import KeyQueue
from pretrain.losses import MCLTerms, queue_terms_by_network, view_terms_by_network
from pretrain.method import Method
from pretrain.training_data import TrainingData

logger = logging.getLogger(__name__)


class MoCo(Method):
    """Each query network finds its image's key among the queue's (He et al. 2020; the paper, section 3.4).

    Attributes:
        peers: the momentum networks, one per query network.
        queue: the keys of earlier batches.
    """

    peers: Cohort

    def __init__(
        self,
        cohort: Cohort,
        config: PretrainConfig,
        exchange: Exchange,
        *,
        steps_per_epoch: int = 1,
    ) -> None:
        super().__init__(cohort, config, exchange, steps_per_epoch=steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch
        self._momentum = config.queue.momentum
        self.peers = momentum_peers(cohort)
        self.queue = KeyQueue(
            config.cohort.networks,
            config.queue.size,
            config.cohort.embedding_dim,
            device=self.ranks.device,
        )
        # Those of the swapped views apart.
        self.fresh_keys = ([], [])

    @classmethod
    def check(cls, config: PretrainConfig, data: TrainingData) -> None:
        """Warn of a queue in which images meet keys of their own."""
        dataset = data.train
        if config.queue.size >= len(dataset):
            logger.warning(
                "queue.size %d is more than the other images of %s there are (%d in all): images will meet keys of "
                "their own as negatives; lower queue.size",
                config.queue.size,
                dataset.title,
                len(dataset),
            )

    def begin_step(self, step: int) -> None:
        """Move the key networks, before they encode anything."""
        self._step = step
        self._momentum = ema_momentum(
            step,
            momentum=self.config.queue.momentum,
            schedule=self.config.queue.momentum_schedule,
            total_steps=self.config.epochs * self._steps_per_epoch,
        )
        update_momentum(self.peers, self.cohort, self._momentum)

    def terms(self, views: tuple[Tensor, ...], labels: Tensor | None = None) -> MCLTerms:
        """The terms of one micro-batch, two views (B, channels, S, S) of each image: four (M,) vectors.

        With ``symmetric`` both views are query and key in turn and the two losses are added, as in MoCo's CIFAR
        recipe.
        """
        first, second = views
        terms = self._one_way(first, second, labels, self.fresh_keys[0])
        if self.config.symmetric:
            swapped = self._one_way(second, first, labels, self.fresh_keys[1])
            terms = MCLTerms(*(a + b for a, b in zip(terms, swapped, strict=True)))
        return terms

    def _one_way(
        self, query_view: Tensor, key_view: Tensor, labels: Tensor | None, fresh_keys: list[Tensor]
    ) -> MCLTerms:
        query = self.exchange.part(self.embed(query_view, labels))
        keys = self._encode_keys(key_view)
        fresh_keys.append(keys)
        return queue_terms_by_network(
            query,
            self.exchange.own_part(keys.flatten(1, 2)),
            self.queue.keys,
            temperature=self.config.temperature,
            soft_temperature=self.config.soft_temperature,
            same_sample_positive=self.config.same_sample_positive,
            filled=self.queue.filled,
        )

    @torch.no_grad()
    def _encode_keys(self, view: Tensor) -> Tensor:
        """Every network's keys (M, R, B, D) of the views (B, channels, S, S) of all R ranks of a team.

        Where batch norm has parts, they are shuffled over all ranks of the team, so that no query shares its part's
        statistics with its key (shuffle-BN, MoCo section 3.3).
        """
        ranks, size = self.exchange.team, len(view)
        by_rank = (ranks.world_size, size)
        if not self._shuffles:
            keys: Tensor = self.exchange.gather(self.peers(view)).unflatten(1, by_rank)
            return keys
        order = permutation(
            ranks.world_size * size,
            SHUFFLE_BN,
            self.config.seed,
            self._step,
            sum(map(len, self.fresh_keys)),
        ).to(view.device, non_blocking=True)
        own = order[ranks.rank * size : (ranks.rank + 1) * size]
        views = self.exchange.within_team(view)
        images = views[own].contiguous(memory_format=torch.channels_last)
        in_order = self.exchange.within_team(self.peers(images), dim=1)[:, order.argsort()]
        of_all: Tensor = self.exchange.of_all_teams(in_order).unflatten(1, by_rank)
        return of_all

    @property
    def _shuffles(self) -> bool:
        cohort = self.config.cohort
        parts = self.exchange.team.world_size > 1 or cohort.batch_norm_splits > 1
        return parts and not cohort.sync_batch_norm

    def end_step(self) -> None:
        """Put the step's keys of all ranks into the queue, after every loss has seen it without them.

        In the order of the global batch, of which each rank has a contiguous block: the same at any world size and
        however many micro-batches. The keys of the swapped views follow.
        """
        for keys in filter(None, self.fresh_keys):
            self.queue.enqueue(torch.cat(keys, dim=2).flatten(1, 2))
        self.drop_step()

    def drop_step(self) -> None:
        """Forget the step's keys."""
        for keys in self.fresh_keys:
            keys.clear()

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside the cohort."""
        return {"key_networks": named_state(self.peers), "queue": self.queue.state_tensors()}

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""
        load_named_state(self.peers, state["key_networks"])
        self.queue.load_state_tensors(state["queue"])

    def metrics(self) -> dict[str, float]:
        """The share of the queue that holds keys, and the step's momentum where it moves.

        The loss rises while the queue fills: negatives are added.
        """
        row = {"queue/filled_percent": 100.0 * self.queue.filled / self.queue.size}
        if self.config.queue.momentum_schedule != "constant":
            row["queue/momentum"] = self._momentum
        return row


class SimCLR(Method):
    """The other images of the batch are the negatives (Chen et al. 2020): no key networks, no queue."""

    def terms(self, views: tuple[Tensor, ...], labels: Tensor | None = None) -> MCLTerms:
        """The terms of one batch, two views (B, channels, S, S) of each image: four (M,) vectors."""
        # One forward of both views: batch norm sees all 2B images, as in the published code. Its parts, if any, and
        # every rank have both views of their own images.
        parts = max(self.config.cohort.batch_norm_splits // self.exchange.team.world_size, 1)
        images = torch.stack([view.unflatten(0, (parts, -1)) for view in views], dim=1)
        if labels is not None:
            labels = labels.unflatten(0, (parts, -1)).repeat(1, 2).flatten()
        embedding = self.embed(
            images.flatten(0, 2).contiguous(memory_format=torch.channels_last), labels
        )
        by_view = embedding.unflatten(1, (parts, 2, -1)).transpose(2, 3).flatten(1, 2)
        return view_terms_by_network(
            self.exchange.whole(by_view).transpose(1, 2),
            temperature=self.config.temperature,
            soft_temperature=self.config.soft_temperature,
            same_sample_positive=self.config.same_sample_positive,
        )
