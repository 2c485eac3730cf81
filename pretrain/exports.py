"""Writing a cohort's networks as exports: folders that timm loads."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peerlearn.data.augment import is_seen_whole
from peerlearn.data.datasets import ImageDataset
from peerlearn.data.image_folders import DecodeError
from peerlearn.errors import UserError
from peerlearn.export import save_export
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.export_folders import network_folder
from pretrain.card import card_facts
from pretrain.cohort import Cohort
from pretrain.config import PretrainConfig
from pretrain.initial_weights import InitialWeights


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """What an export has to tell of the images its networks were trained on.

    Attributes:
        dataset: its name.
        split: of the dataset.
        images: how many.
        channels: of each image.
        image_size: side of the views in pixels.
        mean: per channel, what views were normalised with.
        std: likewise.
        num_classes: C, of the labels that the networks were trained to tell apart; 0 = none.
        seen_whole: whether evaluation views show them whole; None = unknown.
    """

    dataset: str
    split: str
    images: int
    channels: int
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    num_classes: int = 0
    seen_whole: bool | None = None

    @classmethod
    def of(
        cls, dataset: ImageDataset, image_size: int, *, num_classes: int = 0
    ) -> "TrainingImages":
        """The facts of a dataset whose views are ``image_size`` pixels wide."""
        return cls(
            dataset=dataset.title,
            split=dataset.split,
            images=len(dataset),
            channels=dataset.channels,
            image_size=image_size,
            mean=dataset.mean,
            std=dataset.std,
            num_classes=num_classes,
            seen_whole=_are_seen_whole(dataset, image_size),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values; ``TrainingImages(**values)`` reads them back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


# So many image files are decoded to learn their sizes.
_LOOKED_AT = 16


def _are_seen_whole(dataset: ImageDataset, image_size: int) -> bool | None:
    """Whether evaluation views show the images whole: all that are looked at; None if none can be decoded."""
    if isinstance(dataset.images, Tensor):
        return is_seen_whole(*dataset.images.shape[2:], size=image_size)
    seen = []
    for index in range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT)):
        with contextlib.suppress(DecodeError):
            seen.append(is_seen_whole(*dataset.read(index).shape[1:], size=image_size))
    return all(seen) if seen else None


def export_cohort(
    cohort: Cohort,
    folder: Path,
    *,
    config: PretrainConfig,
    images: TrainingImages,
    step: int,
    initial: Sequence[InitialWeights] = (),
    prefix: str = "",
    row: Mapping[str, Any],
) -> None:
    """Write every network's backbone, with its classifier if it has one, below ``folder``.

    The prefix of their names is `KEY_PREFIX` for momentum networks. ``initial`` tells what networks started from;
    ``row`` is `measured_row` of the step.
    """
    started = {each.network: each.on_card() for each in initial}
    names = config.cohort.architectures()
    for m, (backbone, name) in enumerate(zip(cohort.backbones, names, strict=True)):
        save_export(
            backbone,
            folder / network_folder(f"{prefix}{m}"),
            architecture=name,
            in_chans=images.channels,
            small_images=config.cohort.small_images,
            image_size=images.image_size,
            mean=images.mean,
            std=images.std,
            seen_whole=images.seen_whole,
            classifier=cohort.classifiers[m] if cohort.classifiers else None,  # type: ignore[arg-type]
            provenance={
                "method": config.method,
                "networks": config.cohort.networks,
                "network": m,
                "dataset": images.dataset,
                "split": images.split,
                "images": images.images,
                "step": step,
                "epochs": config.epochs,
                "seed": config.seed,
                **({"frozen": True} if m in cohort.frozen else {}),
                **({"started from": started[m]} if m in started else {}),
            },
            facts=card_facts(config, title=images.dataset, network=f"{prefix}{m}", row=row),
        )


def measured_row(run: RunDirectory, step: int) -> dict[str, Any]:
    """The row of metrics.jsonl at a step; empty where there is none, or the file is damaged."""
    with contextlib.suppress(OSError, UserError):
        return next((row for row in run.metric_rows() if row["step"] == step), {})
    return {}
