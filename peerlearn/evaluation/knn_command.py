"""`peerlearn knn`: weighted kNN accuracy of exported networks."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.config import config_to_yaml, parse_config, require
from peerlearn.evaluation.data import EvaluationDataConfig, load_splits, warn_of_missing_classes
from peerlearn.evaluation.selection import (
    ENSEMBLE,
    Selection,
    results_folder,
    run_setting,
    select_runs,
)
from peerlearn.evaluation.uncertainty import accuracy_metrics

if TYPE_CHECKING:
    from peerlearn.compute.dist import Ranks
    from peerlearn.data.datasets import ImageDataset


# exp of more than this exceeds float64.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """Weighted kNN of exported networks.

    Attributes:
        checkpoint: a run (its latest exports), RUN/export/step-N, or one export; several: their scores are averaged.
        network: 0, 1, ..., key-0, ..., all or ensemble.
        k: neighbours that vote; several numbers are all scored by one search.
        temperature: their votes weigh exp(cosine / temperature); several likewise, each with every k.
        batch_size: images encoded at once.
        device: auto, cpu, cuda, ...
        results: folder of the result files; null = the run's results/, or results/ here for a lone export.
        cache: keep features on disk and take those that are there.
        data: the images.
    """

    checkpoint: str | list[str]
    network: str = "all"
    k: int | list[int] = 200
    temperature: float | list[float] = 0.1
    batch_size: int = 256
    device: str = "auto"
    results: str | None = None
    cache: bool = True
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(all(k >= 1 for k in self.ks()), f"k must be at least 1, got {self.k}")
        require(
            all(0 < temperature < math.inf for temperature in self.temperatures()),
            f"temperature must be positive and finite, got {self.temperature}",
        )
        require(
            all(
                1 / t + math.log(k) < _LARGEST_EXPONENT
                for t in self.temperatures()
                for k in self.ks()
            ),
            f"temperature {self.temperature} is too low for k {self.k}: k exp(1 / temperature) must fit float64",
        )
        require(bool(self.ks()) and bool(self.temperatures()), "k and temperature need a value")
        require(
            all(self.checkpoints()) and bool(self.checkpoints()),
            "checkpoint must name at least one run or export",
        )

    def checkpoints(self) -> list[str]:
        """One or several."""
        return [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint

    def ks(self) -> list[int]:
        """One or several."""
        return [self.k] if isinstance(self.k, int) else self.k

    def temperatures(self) -> list[float]:
        """One or several."""
        single = isinstance(self.temperature, int | float)
        return [self.temperature] if single else self.temperature  # type: ignore[list-item,return-value]


def main(argv: Sequence[str]) -> int:
    """`peerlearn knn --checkpoint RUN ... [--key value ...]`. Returns the exit code."""
    config, dry_run = parse_config(
        KNNConfig,
        argv,
        verb="knn",
        description="Score exported networks by weighted kNN of their features.",
        example="peerlearn knn --checkpoint runs/demo --k 10 20 200 --temperature 0.07 0.1",
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return 0
    selections = select_runs(config.checkpoints(), config.network)
    # Imported here: a wrong key should not wait for torch.
    from peerlearn.compute.dist import joined_ranks
    from peerlearn.evaluation.score_table import report_scores

    with joined_ranks(config.device) as ranks:
        found = [evaluate(config, selection, ranks) for selection in selections]
        if ranks.main:
            swept = len(config.ks()) * len(config.temperatures()) > 1
            protocol = "" if swept else f", {_pair_text(config.ks()[0], config.temperatures()[0])}"
            report_scores(
                found,
                {"top-1": "top1"},
                title=f"kNN top-1 (%){protocol}",
                folder=Path(config.results or "results"),
            )
    return 0


def evaluate(config: KNNConfig, selection: Selection, ranks: "Ranks") -> dict[str, Path]:
    """Encode both splits with every selected network, score each and write its result.json files.

    Returns:
        The files by network, and by k and temperature where there are several; empty but on the main rank.

    Raises:
        UserError: a dataset or an export that cannot be had, or that do not fit each other.
    """
    from peerlearn.evaluation.feature_cache import Extraction, load_features
    from peerlearn.evaluation.results import write_result
    from peerlearn.export import export_hash
    from peerlearn.knn import KNNProtocol, ensemble_features, knn_sweep, knn_top1

    start = time.monotonic()
    train, test = ranks.main_first(lambda: load_splits(config.data, selection))
    if ranks.main:
        warn_of_missing_classes(train, test)
    assert train.labels is not None
    assert test.labels is not None
    how = Extraction(
        ranks=ranks, batch_size=config.batch_size, workers=config.data.workers, cached=config.cache
    )
    sides = [load_features(selection.folders, split, how) for split in (train, test)]
    if not ranks.main:
        return {}
    if selection.ensemble:
        for side in sides:
            side[ENSEMBLE] = ensemble_features(list(side.values()))
    hashes = {name: export_hash(folder) for name, folder in selection.folders.items()}
    pairs = list(product(config.ks(), config.temperatures()))
    shared = _protocol(train, test)
    paths = {}
    for name in sides[0] if selection.alone else (ENSEMBLE,):
        swept = knn_sweep(
            sides[0][name],
            train.labels,
            sides[1][name],
            protocols=[KNNProtocol(k=k, temperature=temperature) for k, temperature in pairs],
            num_classes=train.num_classes,
        )
        for (k, temperature), found in zip(pairs, swept, strict=True):
            row = name if len(pairs) == 1 else f"{name}, {_pair_text(k, temperature)}"
            paths[row] = write_result(
                results_folder(config.results, selection),
                task="knn",
                dataset=train.name,
                step=selection.step,
                network=name,
                metrics=accuracy_metrics(knn_top1(found, test.labels), len(test)),
                protocol={"k": min(k, len(train)), "temperature": temperature, **shared},
                export_hash=hashes.get(name, hashes),
                seed=run_setting(selection.run, "seed", None),
                seconds=round(time.monotonic() - start, 3),
            )
    return paths


def _pair_text(k: int, temperature: float) -> str:
    return f"k {k}, temperature {temperature}"


def _protocol(train: "ImageDataset", test: "ImageDataset") -> dict[str, Any]:
    return {
        "similarity": "cosine",
        "features": "pooled backbone output",
        "train_images": len(train),
        "test_images": len(test),
        "train_fingerprint": train.fingerprint(),
        "test_fingerprint": test.fingerprint(),
    }
