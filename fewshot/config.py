"""The config of a few-shot evaluation. Every key of a YAML file and of the command line is a field here."""

import math
from dataclasses import dataclass, field
from typing import Literal

from peerlearn.config import changeable, require
from peerlearn.data.published import DatasetName
from peerlearn.evaluation.evaluator import EvaluatorConfig


@dataclass(frozen=True, kw_only=True)
class FewShotDataConfig:
    """The images that episodes are drawn from.

    Attributes:
        name: name of the dataset; null = the one the run was trained on.
        root: folder of the dataset; null = the usual places.
        split: split whose classes are told apart; it may have classes of its own.
        base_split: split whose mean feature `features cl2n` subtracts; null = none.
        limit: number of images of each split, the first ones; null = all.
        workers: number of processes that read image files.
    """

    name: DatasetName | None = None
    root: str | None = changeable(None)
    split: str = "test"
    base_split: str | None = None
    limit: int | None = None
    workers: int = changeable(2)

    def __post_init__(self) -> None:
        require(
            self.limit is None or self.limit >= 1,
            f"data.limit must be at least 1, got {self.limit}",
        )
        require(self.workers >= 0, f"data.workers must be at least 0, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(EvaluatorConfig):
    """Prototypical evaluation of exported networks over random episodes.

    Attributes:
        ways: number of classes of an episode.
        shots: number of support images of each class; several numbers are all scored.
        queries: number of query images of each class.
        episodes: number of episodes.
        seed: seed of the episodes, which are the same for every network and machine.
        head: rule that classifies queries: centroid (the nearest mean of a class's support features) or
            logistic_regression (fitted on the support of each episode).
        distance: distance of the centroid head: sqeuclidean or cosine.
        penalty_c: inverse strength C of logistic_regression's penalty, as in scikit-learn.
        features: form of the features: raw, unit (of unit length), or cl2n (centred by the mean of the base split,
            then of unit length).
        episodes_file: JSON file of the episodes: read where it is there, else written; null = neither.
        batch_size: number of images encoded at once.
        cache: whether features are kept on disk, and those that are there are taken.
        data: images that episodes are drawn from.
    """

    ways: int = 5
    shots: int | list[int] = field(default_factory=lambda: [1, 5])
    queries: int = 15
    episodes: int = 600
    seed: int = 0
    head: Literal["centroid", "logistic_regression"] = "centroid"
    distance: Literal["sqeuclidean", "cosine"] = "sqeuclidean"
    penalty_c: float = 1.0
    features: Literal["raw", "unit", "cl2n"] = "raw"
    episodes_file: str | None = None
    batch_size: int = changeable(256)
    cache: bool = changeable(True)
    data: FewShotDataConfig = field(default_factory=FewShotDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ways >= 2, f"ways must be at least 2, got {self.ways}")
        for name in ("queries", "episodes", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        numbers = self.shot_numbers()
        require(
            bool(numbers) and min(numbers) >= 1 and len(set(numbers)) == len(numbers),
            f"shots must be numbers of at least 1, each once, got {self.shots}",
        )
        require(-(2**63) <= self.seed < 2**63, f"seed must fit 64 bits, got {self.seed}")
        require(
            0 < self.penalty_c < math.inf,
            f"penalty_c must be positive and finite, got {self.penalty_c}",
        )
        require(
            (self.features == "cl2n") == (self.data.base_split is not None),
            "features cl2n and data.base_split go together: set both, say --features cl2n --data.base_split train",
        )

    def shot_numbers(self) -> list[int]:
        """One or several."""
        return self.shots if isinstance(self.shots, list) else [self.shots]
