"""The keys of single pretraining methods: groups of `pretrain.config.PretrainConfig`."""

import math
from dataclasses import dataclass
from typing import Literal

from peerlearn.config import added, require


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """MoCo's queue of negatives and its momentum networks.

    Attributes:
        size: number of keys held per network, K.
        momentum: momentum of the key networks' moving average, per step.
        momentum_schedule: course of the momentum over the run: constant, or cosine (from `momentum` to 1 at the end).
    """

    size: int = 65536
    momentum: float = 0.999
    momentum_schedule: Literal["constant", "cosine"] = added("constant")

    def __post_init__(self) -> None:
        require(self.size >= 1, f"queue.size must be at least 1, got {self.size}")
        require(0 <= self.momentum <= 1, f"queue.momentum must be within 0..1, got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """What the method supervised adds to the contrastive terms: cross-entropy (Eq. 7), and peers' class probabilities.

    Attributes:
        teaching: kind of learning from the peers' logits: none, dml, ensemble_teaching (Eq. 8), cl_ilr, one, or okddip
            (whose last network is the leader).
        teaching_temperature: temperature of the teaching's softmax, T; null = the method's own, 1 of dml and
            ensemble_teaching, 3 of the others.
        detach_teacher: whether the teachers get no gradient; null = the method's own, false for okddip alone.
        weights_per_class: whether ensemble_teaching weighs its networks for every class apart, as theta of Eq. 9 is
            printed.
        ramp_epochs: number of epochs over which the teaching of cl_ilr, one and okddip is faded in.
        images_per_class: number of images of one class in a group of the class-aware sampler (section 3.3); null =
            plain shuffling.
        num_negatives: number of negatives of every anchor, drawn at random, K; null = all of the batch.
    """

    teaching: Literal["none", "dml", "ensemble_teaching", "cl_ilr", "one", "okddip"] = "none"
    teaching_temperature: float | None = None
    detach_teacher: bool | None = None
    weights_per_class: bool = False
    ramp_epochs: float = 80.0
    images_per_class: int | None = 2
    num_negatives: int | None = None

    def __post_init__(self) -> None:
        for name in ("teaching_temperature", "ramp_epochs"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                f"supervised.{name} must be positive and finite, got {value}",
            )
        for name in ("images_per_class", "num_negatives"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"supervised.{name} must be at least 1, got {value}"
            )
        require(
            self.detach_teacher is not False or self.teaching != "ensemble_teaching",
            "supervised.detach_teacher must be null or true with ensemble_teaching, which is defined so (Eq. 8)",
        )


@dataclass(frozen=True, kw_only=True)
class PrototypicalConfig:
    """How the method prototypical trains: episodes of some classes, few images each (Snell et al. 2017).

    Attributes:
        batches: kind of batch: episodes, by which prototypes are learnt; or images_per_class, plain labelled batches of
            batch_size images that train by contrastive terms alone, as NCA does.
        ways: number of classes of a training episode.
        shots: number of support images of each class of a training episode.
        queries: number of query images of each class of a training episode.
        steps_per_epoch: number of training episodes, or of plain labelled batches, in an epoch.
        distance: distance of a query from a prototype: sqeuclidean or cosine.
        distance_temperature: temperature of the softmax over prototypes; of cosine usually 0.1 or less.
        images_per_class: number of images of one class in a group of a plain labelled batch.
        validation_ways: number of classes of a validation episode.
        validation_shots: number of support images of each class of a validation episode; null = shots.
        validation_queries: number of query images of each class of a validation episode.
        validation_episodes: number of validation episodes, the same after every epoch.
    """

    batches: Literal["episodes", "images_per_class"] = "episodes"
    ways: int = 30
    shots: int = 1
    queries: int = 15
    steps_per_epoch: int = 100
    distance: Literal["sqeuclidean", "cosine"] = "sqeuclidean"
    distance_temperature: float = 1.0
    images_per_class: int = 8
    validation_ways: int = 5
    validation_shots: int | None = None
    validation_queries: int = 15
    validation_episodes: int = 400

    def __post_init__(self) -> None:
        for name in ("ways", "validation_ways", "images_per_class"):
            value = getattr(self, name)
            require(value >= 2, f"prototypical.{name} must be at least 2, got {value}")
        for name in (
            *("shots", "queries", "steps_per_epoch", "validation_shots", "validation_queries"),
            "validation_episodes",
        ):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"prototypical.{name} must be at least 1, got {value}"
            )
        require(
            0 < self.distance_temperature < math.inf,
            "prototypical.distance_temperature must be positive and finite, "
            f"got {self.distance_temperature}",
        )

    @property
    def images_per_episode(self) -> int:
        """Of a training episode, W (S + Q)."""
        return self.ways * (self.shots + self.queries)
