"""What a pretraining method is to the loop that runs it. Dimensions: M networks, B batch.

A method is a class of its own file and a line of `pretrain.config.METHODS`; whatever it leaves as it stands here works
as for a contrastive method on two views without labels.
"""

import importlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from peerlearn.compute.dist import Ranks
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.loader import sampler_of
from peerlearn.data.recipes import Augmentation
from peerlearn.data.sampler import Sampler
from peerlearn.evaluation.classification import ClassificationScores
from peerlearn.runs.directory import RunDirectory
from pretrain.best_networks import BestNetworks
from pretrain.cohort import Cohort
from pretrain.config import METHODS, PretrainConfig
from pretrain.exchange import Exchange
from pretrain.monitor import Monitor
from pretrain.online_probe import OnlineProbe
from pretrain.terms import Terms
from pretrain.training_data import LabelUse, TrainingData

logger = logging.getLogger(__name__)

# Told whether nothing is trained yet; gives every figure by its name in metrics.jsonl.
Watch = Callable[[bool], dict[str, float]]


class Method(Protocol):
    """How images become loss terms, and all that differs with it.

    A method is built once per run and asked, per optimiser step, in this order: `begin_step`, `terms` once for every
    micro-batch, `end_step`, or `drop_step` where the step is left out. Every loss sees what the method keeps as it was
    before the step.

    Attributes:
        views: number of random views of each image.
        labels: what the images' labels are for.
        cohort: networks that learn.
        config: config of the run.
        exchange: what networks on different processes send each other.
        ranks: processes that train together.
        peers: momentum networks, one per network; None without.
        fresh_keys: keys of this step's micro-batches so far, each (M, ranks of a team, B, D), in a list for each view
            that the momentum networks encode; () without them.
        best: networks as they were at the epoch that validation chose; None for methods that do not choose.
        probe: linear classifiers that learn beside the networks, for the monitor; None where none are asked for.
    """

    views: ClassVar[int] = 2
    labels: ClassVar[LabelUse] = "unused"

    cohort: Cohort
    config: PretrainConfig
    exchange: Exchange
    ranks: Ranks
    peers: Cohort | None = None
    fresh_keys: tuple[list[Tensor], ...] = ()
    best: BestNetworks | None = None
    probe: OnlineProbe | None = None

    def __init__(
        self, cohort: Cohort, config: PretrainConfig, exchange: Exchange, *, steps_per_epoch: int
    ) -> None:
        self.cohort = cohort
        self.config = config
        self.exchange = exchange
        self.ranks = exchange.ranks

    @classmethod
    def sampler(cls, config: PretrainConfig, dataset: ImageDataset) -> Sampler:
        """Which images a step takes: shuffled, and each once in an epoch.

        Raises:
            UserError: the dataset has not even a batch, or lacks labels that are needed.
        """
        return sampler_of(dataset, batch_size_global=config.batch_size, seed=config.seed)

    @classmethod
    def check(cls, config: PretrainConfig, data: TrainingData) -> None:
        """Refuse, or warn of, a config that does not go with the images.

        Raises:
            UserError: it does not.
        """

    def begin_step(self, step: int) -> None:
        """Before anything is encoded."""

    @abstractmethod
    def terms(self, views: tuple[Tensor, ...], labels: Tensor | None) -> Terms:
        """The terms of one micro-batch: (M,) vectors.

        Args:
            views: `views` of them, each (B, channels, S, S).
            labels: (B,); None where the dataset has none.

        Raises:
            NonFiniteError: of what all ranks compute alike; `pretrain.finite` has what only one may see.
        """

    def embed(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The cohort's embeddings (M, B, D) of images that it learns from; the probe, if any, sees their features."""
        features = self.cohort.branches(self.cohort.trunk(images))
        if self.probe is not None:
            assert labels is not None
            self.probe.see(features, labels)
        return self.cohort.embed(features)

    def end_step(self) -> None:
        """After the optimiser's step."""

    def drop_step(self) -> None:
        """The step is left out: forget what it brought."""

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps beside the cohort, by group and name."""
        return {}

    def load_state_tensors(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore `state_tensors`."""

    def metrics(self) -> dict[str, float]:
        """Figures of its own for the rows of metrics.jsonl."""
        return {}

    def build_monitor(
        self, data: TrainingData, *, augmentation: Sequence[Augmentation], image_size: int
    ) -> Watch:
        """What is watched while training: kNN accuracy and signs of a collapse."""
        monitor = Monitor(
            self.config,
            data.train,
            data.root,
            augmentation=augmentation,
            backend=data.backend,
            image_size=image_size,
            device=self.ranks.device,
        )
        if self.probe is not None and monitor.train is None:
            logger.warning(
                "the linear probe is not measured: like kNN, it needs labelled test images"
            )
        return lambda untrained: monitor.measure(
            self.cohort, self.peers, probe=None if untrained else self.probe, pixels=untrained
        )

    def measured(self, step: int, row: Mapping[str, float]) -> None:
        """Hear, on every rank, what was measured after an epoch: figures by their names in metrics.jsonl."""

    def results(self, training: Any) -> dict[str, ClassificationScores]:
        """Write the result files of the end of training.

        Args:
            training: the `pretrain.state.Training`, at its last step, exported.

        Returns:
            The accuracies by network; empty for methods that measure none.
        """
        return {}

    @classmethod
    def lacks_results(cls, run: RunDirectory) -> bool:
        """Whether what `results` writes is not there (any more)."""
        return False


def method_class(name: str) -> type[Method]:
    """The class of a method by its name in the config."""
    module, _, attribute = METHODS[name].partition(":")
    chosen: type[Method] = getattr(importlib.import_module(module), attribute)
    return chosen


def build_method(
    cohort: Cohort,
    config: PretrainConfig,
    ranks: Ranks,
    *,
    steps_per_epoch: int = 1,
    exchange: Exchange | None = None,
) -> Method:
    """The method that ``config.method`` names, for one of the ranks that train the cohort together.

    Without an ``exchange`` every rank holds all networks.
    """
    exchange = exchange or Exchange.of_one_team(ranks, config.cohort.networks)
    return method_class(config.method)(cohort, config, exchange, steps_per_epoch=steps_per_epoch)


def networks_of(method: Method) -> Sequence[Cohort]:
    """Every cohort that a step changes: the networks that learn, and their momentum networks."""
    return [method.cohort] if method.peers is None else [method.cohort, method.peers]
