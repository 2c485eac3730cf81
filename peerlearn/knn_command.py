"""`peerlearn knn`: weighted kNN accuracy of exported networks."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerlearn.config import config_to_yaml, parse_config
from peerlearn.errors import UserError
from peerlearn.network_selection import ENSEMBLE, Selection, run_setting, select_networks

if TYPE_CHECKING:
    from torch import Tensor

    from peerlearn.datasets import ImageDataset


@dataclass(frozen=True, kw_only=True)
class EvaluationDataConfig:
    """The dataset to evaluate on.

    Attributes:
        name: a dataset; null = the one the run was trained on.
        root: where it lies; null = the usual places.
        train_limit: only the first n images of the train split.
        test_limit: only the first n images of the test split.
        workers: processes that read image files.
    """

    name: str | None = None
    root: str | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("train_limit", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if self.workers < 0:
            raise ValueError(f"data.workers must be at least 0, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class KNNConfig:
    """Weighted kNN of exported networks.

    Attributes:
        checkpoint: a run (its latest exports), RUN/export/step-N, or one export.
        network: 0, 1, ..., key-0, ..., all or ensemble.
        k: neighbours that vote.
        temperature: their votes weigh exp(cosine / temperature).
        batch_size: images encoded at once.
        device: auto, cpu, cuda, ...
        results: folder of the result files; null = the run's results/, or results/ here for a lone export.
    """

    checkpoint: str
    network: str = "all"
    k: int = 200
    temperature: float = 0.1
    batch_size: int = 256
    device: str = "auto"
    results: str | None = None
    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1:
            raise ValueError(
                f"k and batch_size must be at least 1, got {self.k}, {self.batch_size}"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def main(argv: Sequence[str]) -> int:
    """`peerlearn knn --checkpoint RUN [--key value ...]`. Returns the exit code."""
    config, dry_run = parse_config(
        KNNConfig,
        argv,
        verb="knn",
        description="Score exported networks by weighted kNN of their features.",
        example="peerlearn knn --checkpoint runs/demo --network all",
    )
    if dry_run:
        print(config_to_yaml(config), end="")
        return 0
    selection = select_networks(Path(config.checkpoint), config.network)
    scores, protocol = evaluate(config, selection)
    _print_table(scores, protocol)
    return 0


def evaluate(config: KNNConfig, selection: Selection) -> tuple[dict[str, float], dict[str, Any]]:
    """Encode both splits with every selected network, score each and write its result.json.

    Returns:
        top-1 in percent by network, and the protocol they were measured under.

    Raises:
        UserError: a dataset or an export that cannot be had, or that do not fit each other.
    """
    # Imported here: a wrong key should not wait for torch.
    from peerlearn.export import export_hash
    from peerlearn.knn import ensemble_features, knn_scores, knn_top1
    from peerlearn.results import write_result

    start = time.monotonic()
    train, test = _load_splits(config, selection)
    assert train.labels is not None
    assert test.labels is not None
    features = {
        name: _encode(config, folder, (train, test)) for name, folder in selection.folders.items()
    }
    if selection.ensemble:
        joint = [ensemble_features(side) for side in zip(*features.values(), strict=True)]
        features = {**(features if selection.alone else {}), ENSEMBLE: joint}
    hashes = {name: export_hash(folder) for name, folder in selection.folders.items()}
    folder = Path(config.results) if config.results else (selection.run or Path()) / "results"
    protocol = _protocol(config, train, test)
    scores = {}
    for name, (train_features, test_features) in features.items():
        found = knn_scores(
            train_features,
            train.labels,
            test_features,
            k=config.k,
            temperature=config.temperature,
            num_classes=train.num_classes,
        )
        scores[name] = knn_top1(found, test.labels)
        write_result(
            folder,
            task="knn",
            dataset=train.name,
            step=selection.step,
            network=name,
            metrics=_with_spread(scores[name], len(test)),
            protocol=protocol,
            export_hash=hashes if name == ENSEMBLE else hashes[name],
            seed=run_setting(selection.run, "seed", None),
            seconds=round(time.monotonic() - start, 3),
        )
    return scores, protocol


def _load_splits(config: KNNConfig, selection: Selection) -> tuple["ImageDataset", "ImageDataset"]:
    """The dataset asked for, else the one the run was trained on."""
    from peerlearn.datasets import load_dataset

    data = config.data
    name = data.name or run_setting(selection.run, "dataset", None)
    if name is None:
        raise UserError(f"{config.checkpoint} does not tell its dataset: give one by --data.name")
    root = data.root or (None if data.name else run_setting(selection.run, "data_root", None))
    train = load_dataset(name, "train", root=root, limit=data.train_limit)
    test = load_dataset(name, "test", root=root, limit=data.test_limit)
    if train.labels is None or test.labels is None:
        raise UserError(f"{name} has no labels: kNN needs them; choose another by --data.name")
    return train, test


def _encode(config: KNNConfig, folder: Path, splits: Sequence["ImageDataset"]) -> "list[Tensor]":
    """The features of each split, normalised and sized as the network was trained."""
    from peerlearn.device import choose_device
    from peerlearn.export import load_export
    from peerlearn.features import extract_features
    from peerlearn.progress import progress

    backbone: Any = load_export(folder)
    channels, image_size, _ = backbone.pretrained_cfg["input_size"]
    if channels != splits[0].channels:
        raise UserError(
            f"{folder} takes {channels} channels, {splits[0].name} has {splits[0].channels}: "
            "choose another dataset by --data.name"
        )
    mean, std = (tuple(backbone.pretrained_cfg[name]) for name in ("mean", "std"))
    device = choose_device(config.device)
    features = []
    with progress(sum(len(split) for split in splits), f"{folder.name} images") as report:
        for split in splits:
            (found,) = extract_features(
                [backbone.to(device)],
                dataclasses.replace(split, mean=mean, std=std),
                image_size=image_size,
                batch_size=config.batch_size,
                device=device,
                workers=config.data.workers,
                progress=report.advance,
            )
            features.append(found)
    return features


def _protocol(config: KNNConfig, train: "ImageDataset", test: "ImageDataset") -> dict[str, Any]:
    return {
        "k": min(config.k, len(train)),
        "temperature": config.temperature,
        "similarity": "cosine",
        "features": "pooled backbone output",
        "train_images": len(train),
        "test_images": len(test),
        "train_fingerprint": train.fingerprint(),
        "test_fingerprint": test.fingerprint(),
    }


def _with_spread(top1: float, n: int) -> dict[str, float]:
    """The score in percent with the standard error of a share of n images."""
    share = top1 / 100
    return {
        "top1": top1,
        "n": n,
        "top1_standard_error": 100 * math.sqrt(share * (1 - share) / n),
    }


def _print_table(scores: dict[str, float], protocol: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    n = protocol["test_images"]
    table = Table(
        title="kNN top-1 (%)",
        caption=f"k {protocol['k']}, temperature {protocol['temperature']}, n {n:,}",
    )
    table.add_column("network")
    table.add_column("top-1", justify="right")
    table.add_column("+- s.e.", justify="right")
    for name, score in scores.items():
        error = _with_spread(score, n)["top1_standard_error"]
        table.add_row(name, f"{score:.2f}", f"{error:.2f}")
    Console().print(table)
