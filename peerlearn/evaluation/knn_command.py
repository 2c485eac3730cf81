"""`peerlearn knn`: weighted kNN accuracy of exported networks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from peerlearn.config import require
from peerlearn.evaluation.data import EvaluationDataConfig, load_splits
from peerlearn.evaluation.evaluator import Evaluator, EvaluatorConfig, run
from peerlearn.evaluation.results import Score
from peerlearn.evaluation.score_table import ACCURACY_COLUMNS
from peerlearn.evaluation.selection import Selection
from peerlearn.evaluation.uncertainty import accuracy_metrics

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks

# exp of more than this exceeds float64.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True, kw_only=True)
class KNNConfig(EvaluatorConfig):
    """Weighted kNN of exported networks.

    Attributes:
        k: number of neighbours that vote; several numbers are all scored by one search.
        temperature: temperature of the votes, exp(cosine / temperature); several are all scored, each with every k.
        batch_size: number of images encoded at once.
        cache: whether features are kept on disk, and those that are there are taken.
        data: images to vote and images to score on.
    """

    k: int | list[int] = 200
    temperature: float | list[float] = 0.1
    batch_size: int = 256
    cache: bool = True
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = self.pairs()
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(bool(pairs), "k and temperature need a value")
        require(all(k >= 1 for k, _ in pairs), f"k must be at least 1, got {self.k}")
        require(
            all(0 < temperature < math.inf for _, temperature in pairs),
            f"temperature must be positive and finite, got {self.temperature}",
        )
        require(
            all(1 / t + math.log(k) < _LARGEST_EXPONENT for k, t in pairs),
            f"temperature {self.temperature} is too low for k {self.k}: k exp(1 / temperature) must fit float64",
        )

    def pairs(self) -> list[tuple[int, float]]:
        """Every k with every temperature."""
        ks = self.k if isinstance(self.k, list) else [self.k]
        temperatures = (
            self.temperature if isinstance(self.temperature, list) else [self.temperature]
        )
        return list(product(ks, temperatures))


def score(config: KNNConfig, selection: Selection, ranks: "Ranks") -> Iterator[Score]:
    """Encode both splits with every selected network and score each with every k and temperature.

    Raises:
        UserError: a dataset or an export that cannot be had, or that do not fit each other.
    """
    # Imported here: a wrong key should not wait for torch.
    from peerlearn.evaluation.feature_cache import Extraction
    from peerlearn.evaluation.feature_sets import load_feature_sets
    from peerlearn.knn import KNNProtocol, knn_sweep, knn_top1

    splits = load_splits(config.data, selection, ranks)
    how = Extraction(
        ranks=ranks, batch_size=config.batch_size, workers=config.data.workers, cached=config.cache
    )
    known, asked = load_feature_sets(selection, (splits.train, splits.test), how)
    if not ranks.main:
        return
    pairs = config.pairs()
    images = splits.protocol()
    for name in filter(selection.wants, known.features):
        swept = knn_sweep(
            known.features[name],
            known.labels,
            asked.features[name],
            protocols=[KNNProtocol(k=k, temperature=temperature) for k, temperature in pairs],
            num_classes=splits.train.num_classes,
        )
        for (k, temperature), votes in zip(pairs, swept, strict=True):
            yield Score(
                network=name,
                dataset=splits.title,
                metrics=accuracy_metrics(knn_top1(votes, asked.labels), len(splits.test)),
                protocol={
                    "k": min(k, len(splits.train)),
                    "temperature": temperature,
                    "similarity": "cosine",
                    "features": "pooled backbone output",
                    **images,
                },
                variant=_pair_text(k, temperature) if len(pairs) > 1 else "",
            )


def _pair_text(k: int, temperature: float) -> str:
    return f"k {k}, temperature {temperature}"


def _title(config: KNNConfig) -> str:
    pairs = config.pairs()
    return "kNN top-1 (%)" + (f", {_pair_text(*pairs[0])}" if len(pairs) == 1 else "")


KNN = Evaluator(
    verb="knn",
    config=KNNConfig,
    score=score,
    columns=ACCURACY_COLUMNS,
    title=_title,
    description="Score exported networks by weighted kNN of their features.",
    example="peerlearn knn --checkpoint runs/demo --k 10 20 200 --temperature 0.07 0.1",
    essential=(
        *("checkpoint", "network", "k", "temperature", "device", "results"),
        *("data.name", "data.root", "data.limit", "data.validation_images"),
        *("data.shots", "data.workers"),
    ),
)
main = partial(run, KNN)
