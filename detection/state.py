"""What the training of a detector consists of, how it is saved and restored, and its batches and losses."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from detection.backbone import Body, load_body
from detection.config import DetectConfig
from detection.data import Data
from detection.inference import view_of
from detection.model import build_detector, set_draws
from detection.norms import parameter_groups, prepare_norms
from detection.precise_bn import measure_batch_norm
from detection.saved import describe, save_detector
from peerlearn.compute.dist import Ranks
from peerlearn.compute.guards import StepGuard, require_finite_weights
from peerlearn.compute.optimizers import (
    bytes_to_come,
    load_optimizer_tensors,
    optimizer_tensors,
)
from peerlearn.compute.precision import Precision
from peerlearn.compute.resumable import Resumable
from peerlearn.counter_random import INITIAL_WEIGHTS, random_bits
from peerlearn.data.bad_images import UnreadableImages
from peerlearn.data.detection_loader import DetectionBatch, DetectionLoader
from peerlearn.data.unreadable import Unreadable
from peerlearn.errors import UserError
from peerlearn.runs.directory import RunDirectory
from peerlearn.runs.save_config import SaveConfig

# Moco's issue 40: frozen norm layers and self-supervised weights end in NaN at this rate.
_FROZEN_LIMIT = 0.02

logger = logging.getLogger(__name__)

# Images in [0, 1] and their targets: what the detector is called with.
Part = tuple[list[Tensor], list[dict[str, Tensor]]]


class Batch(NamedTuple):
    """The batch of one rank in one step.

    Attributes:
        images: numbers of its images.
        parts: parts that are computed one after another.
        unreadable: images in whose place another one stands.
    """

    images: list[int]
    parts: list[Part]
    unreadable: tuple[Unreadable, ...]


class Detection(Resumable):
    """The training of one detector."""

    def __init__(
        self,
        config: DetectConfig,
        run: RunDirectory,
        ranks: Ranks,
        *,
        export: Path,
        network: str,
        data: Data,
    ) -> None:
        self.config = config
        self.run = run
        self.ranks = ranks
        self.step = 0
        self.network = network
        self.data = data
        (self.weights,) = config.weights
        assert config.seed is not None
        self.seed = config.seed
        _check_shares(config, ranks)
        self.body, self.detector = ranks.main_first(lambda: self._build(export))
        _warn_of_frozen_norm(config)
        _warn_of_late_milestones(config)
        self.detector.to(ranks.device).train()
        self.optimizer = torch.optim.SGD(
            parameter_groups(
                self.detector,
                weight_decay=config.weight_decay,
                norm_weight_decay=config.norm_weight_decay,
            ),
            lr=config.lr,
            momentum=config.momentum,
        )
        self.guard = StepGuard([self.detector], max_skipped_in_a_row=config.max_skipped_steps)
        self.precision = Precision(config.precision, ranks.device)
        self.best = Best()
        self.unwritten_row: dict[str, float] | None = None
        self.unreadable = UnreadableImages(len(data.train), config.data.max_unreadable_percent)

    def _build(self, export: Path) -> tuple[Body, GeneralizedRCNN]:
        model, train = self.config.model, self.data.train
        torch.manual_seed(int(random_bits(INITIAL_WEIGHTS, self.seed)))
        body = load_body(
            export,
            images=train.name,
            c4=model.detector == "d2_c4",
            trained=self.weights == "export",
        )
        detector = build_detector(model, body, train.num_classes)
        prepare_norms(model, detector, self.ranks)
        return body, detector

    @property
    def saves(self) -> SaveConfig:
        return SaveConfig(every_steps=self.config.save_every)

    @property
    def steps_per_epoch(self) -> int:
        return max(len(self.data.train) // self.config.batch_size, 1)

    @property
    def total_steps(self) -> int:
        return self.config.total_steps

    @cached_property
    def fingerprint(self) -> str:
        chosen_by = self.data.validation
        return self.data.train.fingerprint() + (chosen_by.fingerprint() if chosen_by else "")

    @property
    def dataset_name(self) -> str:
        return self.data.train.title

    def headline(self) -> str:
        config = self.config
        return (
            f"{config.model.detector} on network {self.network} ({self.body.architecture}, {self.weights} weights), "
            f"{len(self.data.train):,} images of {self.dataset_name}, "
            f"{config.scaling()}"
        )

    def trained(self) -> nn.Module:
        detector: nn.Module = self.detector
        return detector

    def bytes_to_come(self) -> int:
        return bytes_to_come(self.optimizer)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "detector": dict(self.detector.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer),
        }

    def state(self) -> dict[str, Any]:
        return {
            "best": dataclasses.asdict(self.best),
            "unreadable": self.unreadable.state(),
            "unwritten_row": self.unwritten_row,
        }

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        try:
            self.detector.load_state_dict(tensors["detector"])
        except RuntimeError as error:
            raise ValueError(f"the detector does not fit: {error}") from error
        load_optimizer_tensors(self.optimizer, tensors["optimizer"])
        self.best = Best(**state["best"])
        self.unwritten_row = state["unwritten_row"]
        self.unreadable.load_state(state["unreadable"])

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start .. stop - 1 of this rank."""
        loader = DetectionLoader(
            self.data.train,
            view_of(self.config.model, training=True),
            batch_size_global=self.config.batch_size,
            seed=self.seed,
            channels=self.body.image_channels,
            device=self.ranks.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            workers=self.config.data.workers,
        )
        for batch in loader.batches(start, stop):
            parts = list(_parts(batch, self.config.accumulation_steps))
            yield Batch(batch.index.tolist(), parts, batch.unreadable)

    def losses(self, part: Part, step: int, number: int) -> dict[str, Tensor]:
        """The losses of the ``number``-th part of a step's batch, float32 () each.

        The samplers draw by seed, step and place of the image in the global batch.
        """
        images = len(part[0])
        first = self.ranks.rank * (self.config.batch_size // self.ranks.world_size)
        places = range(first + number * images, first + (number + 1) * images)
        set_draws(self.detector, [(self.seed, step, place) for place in places])
        with self.precision.autocast():
            losses: dict[str, Tensor] = self.detector(*part)
        return losses

    def measure_norms(self) -> None:
        """PreciseBN, over the batches that training would take next. All ranks call it together."""
        number = self.config.precise_bn_iterations
        batches = self.batches(self.step, self.step + number)
        passes = (
            partial(self.losses, part, step, place)
            for step, batch in enumerate(batches, self.step)
            for place, part in enumerate(batch.parts)
        )
        if number:
            measure_batch_norm(self.detector, passes, self.ranks)

    def save_as(self, name: str, *, must: bool) -> bool:
        """Write the detector as it is into the run's folder. A disk that does not take it costs this detector.

        Returns:
            Whether it is written.

        Raises:
            NonFiniteError: it holds NaN or Inf.
            UserError: the disk did not take one that ``must`` be.
        """
        require_finite_weights(self.detector)
        description = describe(
            self.body,
            self.config.model,
            self.data.train.class_names,
            network=self.network,
            weights=self.weights,
            dataset=self.dataset_name,
            step=self.step,
        )
        folder = self.run.root / name
        try:
            save_detector(folder, self.detector, description)
        except OSError as error:
            message = f"{folder} could not be written ({error.strerror})"
            if must:
                raise UserError(f"{message}: make room, then the same command writes it") from error
            logger.warning("%s: training goes on without this detector", message)
            self.run.event("detector_missed", step=self.step, reason=error.strerror)
            return False
        return True

    def note_unreadable(self, found: Sequence[Unreadable]) -> None:
        """Record the unreadable images of a step, and tell of the first. All ranks call it together.

        Raises:
            UserError: too many of the training images cannot be read.
        """
        known = self.unreadable.in_epoch
        self.unreadable.note(found, ranks=self.ranks, run=self.run)
        if self.ranks.main and not known:
            logger.warning(
                "some training images cannot be read, and others take their places: %s lists them",
                self.run.event_log,
            )


@dataclasses.dataclass
class Best:
    """The average precision of the best detector on disk on the validation split, and its step."""

    ap: float = -1.0
    step: int = 0


def _parts(batch: DetectionBatch, number: int) -> Iterator[Part]:
    """A batch in so many parts of one size, in the form that the detector takes."""
    images = [image.float() / 255 for image in batch.images]
    # Class 0 is the background.
    targets = [
        {"boxes": boxes, "labels": labels + 1}
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
    ]
    size = len(images) // number
    for first in range(0, len(images), size):
        yield images[first : first + size], targets[first : first + size]


def _check_shares(config: DetectConfig, ranks: Ranks) -> None:
    shares = ranks.world_size * config.accumulation_steps
    if config.batch_size % shares:
        raise ranks.told_once(
            UserError(
                f"batch_size {config.batch_size} cannot be shared by {ranks.world_size} processes in "
                f"accumulation_steps {config.accumulation_steps} parts: make it a multiple of {shares}"
            )
        )


def _warn_of_frozen_norm(config: DetectConfig) -> None:
    if config.model.norm == "frozen" and config.lr >= _FROZEN_LIMIT:
        logger.warning(
            "model.norm frozen and lr %g often end in NaN, with self-supervised weights above all: set model.norm "
            "sync, or base_lr below %g",
            *(config.lr, _FROZEN_LIMIT * config.base_batch_size / config.batch_size),
        )


def _warn_of_late_milestones(config: DetectConfig) -> None:
    if late := [each for each in config.milestones if each >= config.iterations]:
        logger.warning(
            "the learning rate does not fall at milestones %s, as training ends after %s iterations: "
            "set milestones too",
            *(", ".join(map(str, late)), config.iterations),
        )
