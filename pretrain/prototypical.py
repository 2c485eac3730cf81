"""Prototypical networks: episodes of few labelled images, with peers that learn from each other.

Dimensions: M networks, B batch, W ways, S shots, Q queries of a class, F features, E episodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from peerlearn.compute.device import full_float32
from peerlearn.counter_random import TRAINING_EPISODES, random_bits
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import sampler_of
from peerlearn.data.recipes import Augmentation
from peerlearn.data.sampler import EpochOrder, Sampler, counted
from peerlearn.evaluation.episodes import Distance, draw_from
from peerlearn.runs.score_names import EPISODE_TOP1, score_name
from pretrain.best_networks import BestNetworks
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.episode_monitor import EpisodeMonitor, validation_episodes
from pretrain.exchange import Exchange
from pretrain.finite import require_finite
from pretrain.losses import MCLTerms, batch_terms_by_network, widen
from pretrain.method import Method, Watch
from pretrain.method_config import PrototypicalConfig
from pretrain.terms import PrototypicalTerms
from pretrain.training_data import TrainingData


class Prototypical(Method):
    """``L = L_prototypical + L_MCL``: every network's queries find their class's prototype, and peers are compared.

    All networks see the same episodes. Prototypes are means of the networks' features (Snell et al. 2017, equation 1);
    the contrastive terms compare the episode's embeddings, whose labels are its classes (the paper, section 4.3).
    Plain labelled batches instead of episodes leave the contrastive terms alone. For one network that is the rival of
    Laenen and Bertinetto 2021, NCA, but for two things: cosines stand for distances, and the logs of the positives'
    shares are averaged, where NCA takes the log of their sum.

    Attributes:
        best: networks of the epoch whose validation episodes the networks, on average, answered best.
    """

    views = 1
    labels = "split_by_class"
    best: BestNetworks

    def __init__(
        self,
        cohort: Cohort,
        config: PretrainConfig,
        exchange: Exchange,
        *,
        steps_per_epoch: int = 1,
    ) -> None:
        super().__init__(cohort, config, exchange, steps_per_epoch=steps_per_epoch)
        self.best = BestNetworks(cohort)

    @classmethod
    def sampler(cls, config: PretrainConfig, dataset: ImageDataset) -> Sampler:
        """Episodes, or batches of the class-aware sampler."""
        settings = config.prototypical
        if config.draws_episodes:
            return episode_sampler(dataset, settings, seed=config.seed)
        plain = sampler_of(
            dataset,
            batch_size_global=config.batch_size,
            seed=config.seed,
            images_per_class=settings.images_per_class,
        )
        return replace(plain, steps=config.steps_per_epoch(len(dataset)))

    @classmethod
    def check(cls, config: PretrainConfig, data: TrainingData) -> None:
        """Make sure that the validation classes make an episode.

        Raises:
            UserError: they do not.
        """
        if config.monitor.every_epochs:
            validation_episodes(config, data, episodes=1)

    def terms(self, views: tuple[Tensor, ...], labels: Tensor | None) -> PrototypicalTerms:
        """The terms of one batch, one view (B, channels, S, S) of each image and their labels (B,).

        An episode is shared by the ranks, whose features come together: each image is encoded once.
        """
        assert labels is not None
        (images,) = views
        own = self.cohort.branches(self.cohort.trunk(images))
        features = [self.ranks.gather_with_gradient(each, dim=0) for each in own]
        labels = self.ranks.gather(labels)
        return PrototypicalTerms(*self._contrast(features, labels), self._find_prototypes(features))

    def _contrast(self, features: list[Tensor], labels: Tensor) -> MCLTerms:
        """The four contrastive terms of the global batch; empty ones where none trains."""
        config = self.config
        if not config.contrastive:
            nothing = features[0].new_zeros(0, dtype=torch.float32)
            return MCLTerms(nothing, nothing, nothing, nothing)
        return batch_terms_by_network(
            self.cohort.embed(features),
            labels,
            temperature=config.temperature,
            soft_temperature=config.soft_temperature,
            same_sample_positive=config.same_sample_positive,
        )

    def _find_prototypes(self, features: list[Tensor]) -> Tensor:
        """(M,): the loss of every network's queries; (0,) where the batch is no episode."""
        if not self.config.draws_episodes:
            return features[0].new_zeros(0, dtype=torch.float32)
        settings = self.config.prototypical
        loss = partial(
            prototypical_loss,
            ways=settings.ways,
            shots=settings.shots,
            distance=settings.distance,
            temperature=settings.distance_temperature,
        )
        return torch.stack([loss(each) for each in features])

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside the cohort."""
        return self.best.state_tensors()

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""
        self.best.load_state_tensors(state)

    def build_monitor(
        self, data: TrainingData, *, augmentation: Sequence[Augmentation], image_size: int
    ) -> Watch:
        """Accuracy over episodes of the validation classes."""
        monitor = EpisodeMonitor(self.config, data, image_size=image_size, device=self.ranks.device)
        return lambda untrained: monitor.measure(self.cohort)

    def measured(self, step: int, row: Mapping[str, float]) -> None:
        """Keep the networks if they are the best so far: one epoch for all, as they learned together."""
        names = [score_name(m, EPISODE_TOP1) for m in range(len(self.cohort.backbones))]
        self.best.offer(self.cohort, step=step, score=fmean(row[name] for name in names))


def episode_sampler(dataset: ImageDataset, settings: PrototypicalConfig, *, seed: int) -> Sampler:
    """Batches that are episodes, drawn by counters.

    A batch has first the S support images and then the Q queries, each time one of every class, so that the ranks and
    the parts that batch norm splits have all classes.

    Raises:
        UserError: there are fewer classes than ways, or a class has too few images.
    """
    draw = partial(
        draw_from,
        dataset,
        ways=settings.ways,
        shots=settings.shots,
        queries=settings.queries,
    )
    draw(episodes=1, seed=seed)

    def order(epoch: int) -> EpochOrder:
        drawn = draw(
            episodes=settings.steps_per_epoch,
            seed=int(random_bits(TRAINING_EPISODES, seed, epoch)),
        )
        images = torch.cat([drawn.support, drawn.query], dim=2)
        return counted(images.transpose(1, 2).flatten(1))

    return Sampler(settings.images_per_episode, settings.steps_per_epoch, order)


def prototypical_loss(
    features: Tensor, *, ways: int, shots: int, distance: Distance, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of an episode's queries over its classes' prototypes (Snell et al. 2017, equations 1 and 2).

    Args:
        features: (W (S + Q), F), those of the support first; each W rows are of the classes 0 .. W - 1.
        ways: W.
        shots: S.
        distance: sqeuclidean, not divided by F; or cosine, whose logits are the cosines.
        temperature: of the softmax over prototypes.

    Returns:
        A scalar, float32, or float64 for float64 features.

    Raises:
        NonFiniteError: the features hold NaN or Inf.
    """
    with full_float32(features.device):
        features = widen(features)
        require_finite("prototypical", "features", features[None])
        if distance == "sqeuclidean":
            # What all features share takes the digits of what they differ in, and moves no distance.
            features = features - features.detach().mean(0)
        by_class = features.unflatten(0, (-1, ways))
        prototype, query = by_class[:shots].mean(0), by_class[shots:].flatten(0, 1)
        if distance == "sqeuclidean":
            # -|q - p|^2 + |q|^2: the softmax does not hear the second.
            logits = 2 * query @ prototype.T - prototype.square().sum(-1)
        else:
            logits = F.normalize(query, dim=-1) @ F.normalize(prototype, dim=-1).T
        target = torch.arange(ways, device=features.device).repeat(len(by_class) - shots)
        return F.cross_entropy(logits / temperature, target)
