"""How views become loss terms: MoCo with its momentum peers and queue, and SimCLR.

A method is built once per run and asked, per optimiser step, in this order: `begin_step`, `terms` once for every
micro-batch, `end_step`. Every loss sees the queue as it was before the step.

Dimensions: M networks, B batch, K queue, D embedding size.
"""

import torch
from torch import Tensor

from peerlearn.counter_random import SHUFFLE_BN, permutation
from pretrain.cohort import (
    Cohort,
    load_named_state,
    momentum_peers,
    named_state,
    update_momentum,
)
from pretrain.config import PretrainConfig
from pretrain.key_queue import KeyQueue
from pretrain.losses import MCLTerms, queue_terms_by_network, view_terms_by_network


class MoCo:
    """Each query network finds its image's key among the queue's (He et al. 2020; the paper, section 3.4).

    Attributes:
        peers: the momentum networks, one per query network.
        queue: the keys of earlier batches.
    """

    def __init__(self, cohort: Cohort, config: PretrainConfig, device: torch.device) -> None:
        self.cohort = cohort
        self.config = config
        self.peers = momentum_peers(cohort)
        self.queue = KeyQueue(
            config.cohort.networks, config.queue.size, config.cohort.embedding_dim, device=device
        )
        self._fresh_keys: list[Tensor] = []

    def begin_step(self, step: int) -> None:
        """Move the key networks, before they encode anything."""
        self._step = step
        update_momentum(self.peers, self.cohort, self.config.queue.momentum)

    def terms(self, views: tuple[Tensor, Tensor]) -> MCLTerms:
        """The terms of one micro-batch, two views (B, channels, S, S) of each image: four (M,) vectors.

        With ``symmetric`` both views are query and key in turn and the two losses are added, as in MoCo's CIFAR
        recipe.
        """
        first, second = views
        terms = self._one_way(first, second)
        if self.config.symmetric:
            swapped = self._one_way(second, first)
            terms = MCLTerms(*(a + b for a, b in zip(terms, swapped, strict=True)))
        return terms

    def _one_way(self, query_view: Tensor, key_view: Tensor) -> MCLTerms:
        query = self.cohort(query_view)
        key = self._encode_keys(key_view)
        self._fresh_keys.append(key)
        return queue_terms_by_network(
            query,
            key,
            self.queue.keys,
            temperature=self.config.temperature,
            soft_temperature=self.config.soft_temperature,
            same_sample_positive=self.config.same_sample_positive,
            filled=self.queue.filled,
        )

    @torch.no_grad()
    def _encode_keys(self, view: Tensor) -> Tensor:
        if self.config.cohort.batch_norm_splits == 1:
            keys: Tensor = self.peers(view)
            return keys
        # Shuffled, so that no query shares its part's statistics with its key (shuffle-BN, MoCo section 3.3).
        order = permutation(
            len(view), SHUFFLE_BN, self.config.seed, self._step, len(self._fresh_keys)
        ).to(view.device)
        shuffled: Tensor = self.peers(view[order])
        return shuffled[:, order.argsort()]

    def end_step(self) -> None:
        """Put the step's keys into the queue, after every loss has seen it without them."""
        self.queue.enqueue(torch.cat(self._fresh_keys, dim=1))
        self._fresh_keys.clear()

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside the cohort."""
        return {"key_networks": named_state(self.peers), "queue": self.queue.state_tensors()}

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""
        load_named_state(self.peers, state["key_networks"])
        self.queue.load_state_tensors(state["queue"])

    def metrics(self) -> dict[str, float]:
        """The share of the queue that holds keys. The loss rises while it fills: negatives are added."""
        return {"queue/filled_percent": 100.0 * self.queue.filled / self.queue.size}


class SimCLR:
    """The other images of the batch are the negatives (Chen et al. 2020): no key networks, no queue."""

    peers = None

    def __init__(self, cohort: Cohort, config: PretrainConfig) -> None:
        self.cohort = cohort
        self.config = config

    def begin_step(self, step: int) -> None:
        """Nothing moves but the cohort itself."""

    def terms(self, views: tuple[Tensor, Tensor]) -> MCLTerms:
        """The terms of one batch, two views (B, channels, S, S) of each image: four (M,) vectors."""
        # One forward of both views: batch norm sees all 2B images, as in the published code.
        embedding = self.cohort(torch.cat(views))
        return view_terms_by_network(
            embedding.unflatten(1, (2, -1)),
            temperature=self.config.temperature,
            soft_temperature=self.config.soft_temperature,
            same_sample_positive=self.config.same_sample_positive,
        )

    def end_step(self) -> None:
        """Nothing to keep."""

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Nothing beside the cohort."""
        return {}

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Nothing beside the cohort."""

    def metrics(self) -> dict[str, float]:
        """Nothing to watch."""
        return {}


Method = MoCo | SimCLR


def build_method(cohort: Cohort, config: PretrainConfig, device: torch.device) -> Method:
    """The method that ``config.method`` names, on the cohort's device."""
    return MoCo(cohort, config, device) if config.method == "moco" else SimCLR(cohort, config)


def objective(terms: MCLTerms, config: PretrainConfig) -> Tensor:
    """Eq. 6 over the terms that ``config.terms`` switches on: from four (M,) vectors one scalar."""
    off = {
        name: torch.zeros_like(term)
        for name, term in terms._asdict().items()
        if name not in config.terms
    }
    return terms._replace(**off).total(config.alpha, config.beta).sum()
